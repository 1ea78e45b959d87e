"""Attention by torch's FlexAttention: one generated Triton kernel for windows, packed and ragged keys, and decays.

The keys that a query sees are a range of rows, first[t] <= s < last[t], made on the device from the starts, ends,
positions, causality and window: one mask for every kind, and blocks of it that nobody sees are skipped. Nothing is read
back to the host, and there is one launch where sdpa.py has one for each sequence or block of queries.

The bias of log_decay is added to the scores inside the kernel. It is the difference of two sums in float64, each held
as a float32 and what that lacks, so that large sums cancel exactly and no GPU has to compute in float64.

FlexAttention's backward pass is reached through autograd, with what its own forward pass kept: the backward pass here
runs the forward pass once more, and of the residuals takes neither y nor lse. It has no atomics, unless a tensor that
the bias was made of wants a gradient; so none does, and the sums of the scores' gradients over the queries, which
log_decay's gradient is made of, are a column of dk beside a column of ones in q, as in forgetting.py. They cancel, and
are computed in float32 whatever q is.
"""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import inductor
from kernels.attention import decay, naive
from kernels.attention.forgetting import before
from kernels.attention.spans import Sight
from kernels.problem import Problem, state_dtype

# Triton's products want heads at least this wide
WIDTH = 16
# rows and columns of the mask's blocks
BLOCK = 128


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem, or why sdpa's kernels do it in one call; empty if it can."""
    options, sizes, reasons = problem.options, problem.sizes, naive.cannot(problem)
    if problem.device.type != "cuda":
        reasons.append(f"generates kernels for cuda, the tensors are on {problem.device.type}")
    elif (reason := inductor.reason("cuda")) is not None:
        reasons.append(reason)
    if importlib.util.find_spec("torch.nn.attention.flex_attention") is None:
        reasons.append("this torch has no FlexAttention")
    if problem.dtypes["q"] == torch.float64:
        reasons.append("FlexAttention has no float64")
    if not any(options[name] for name in ("window", "log_decay", "packed", "starts", "ends")):
        reasons.append("serves a window, log_decay, packed sequences or starts and ends; there is none of them")
    if sizes["T"] == 1:
        reasons.append("serves more than one query; T is 1")
    return reasons


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    causal: bool,
    window: int,
    scale: float,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V] and lse [B, T, H]; zeros and -inf for queries that see no key. Computes in q's dtype."""
    sight = Sight.of(q, k, starts, ends, cu_seqlens, causal=causal, window=window)
    with torch.no_grad():
        y, lse = _call(q.detach(), k.detach(), v.detach(), sight, _own(starts, ends, q), _sums(log_decay, sight), scale)
    return y[..., : v.shape[3]].contiguous(), lse.contiguous()


def backward(
    dy: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    log_decay: Tensor | None,
    y: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    *,
    causal: bool,
    window: int,
    scale: float,
    needs: tuple[bool, ...],
    config: Any = None,
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv and dlog_decay, each None where `needs` says so. Runs the forward pass again."""
    assert dlse is None, "lse has no gradient"
    dy = torch.zeros_like(y) if dy is None else dy
    sight = Sight.of(q, k, starts, ends, cu_seqlens, causal=causal, window=window)
    sums, decays, times = _sums(log_decay, sight), log_decay is not None and needs[5], q.shape[2] // k.shape[2]
    tensors, factor = (q, k, v), scale
    if decays:
        # a head of k for every head of q: gates are of heads, not of groups
        wide = state_dtype(q.dtype)
        keys, values = (x.to(wide).repeat_interleave(times, 2) for x in (k, v))
        tensors, scale = (F.pad(q.to(wide) * scale, (0, 1), value=1.0), F.pad(keys, (0, 1)), values), 1.0
    with torch.enable_grad():
        of_q, of_k, of_v = leaves = [x.detach().requires_grad_() for x in tensors]
        again, _ = _call(of_q, of_k, of_v, sight, _own(starts, ends, q), sums, scale)
        dy = F.pad(dy.to(again.dtype), (0, again.shape[3] - dy.shape[3]))
        dq, dk, dv = torch.autograd.grad(again, leaves, dy)
    dlog_decay = None
    if decays:
        assert log_decay is not None
        dlog_decay = _of_decays(dk[..., -1], starts, ends, cu_seqlens, sight).to(log_decay.dtype).contiguous()
        dq = dq[..., :-1] * factor
        dk, dv = (x.unflatten(2, (-1, times)).sum(3) for x in (dk[..., :-1], dv))
    found = (x.to(q.dtype).contiguous() if needed else None for x, needed in zip((dq, dk, dv), needs))
    return (*found, None, None, dlog_decay)


def _of_decays(of_keys: Tensor, starts: Tensor | None, ends: Tensor | None, cu: Tensor | None, sight: Sight) -> Tensor:
    """[B, S, H] float64 from the sums of the scores' gradients over the queries [B, S, H]."""
    total = before(of_keys)
    if starts is not None or ends is not None:
        if cu is None:
            # nobody forgets at these rows, where all that was added up cancels but for its rounding
            outside = torch.arange(total.shape[1], device=total.device) >= sight.end[:, :1]
            total = total.masked_fill(outside[..., None], 0)
    elif cu is not None:
        # rows of q are rows of k, and what precedes a sequence is none of its business
        total = total - total[:, sight.start[0]]
    return total


def _sums(log_decay: Tensor | None, sight: Sight) -> tuple[Tensor, ...]:
    """Of queries and keys: high [B, H, T], low [B, H, T], high [B, H, S], low [B, H, S]; last zero [B, H, T] int32."""
    if log_decay is None:
        return ()
    # a decay of less than e^-1e30 is zero, and sums of the others are float32 numbers
    keys = decay.Sums.of(log_decay.masked_fill(log_decay < -1e30, -torch.inf))
    queries = keys.at(sight.position.clamp(0, log_decay.shape[1] - 1))
    zero = torch.zeros_like(queries.sums) if queries.last is None else queries.last
    halves = []
    for sums in (queries.sums, keys.sums):
        high = sums.float()
        halves += [high, (sums - high.to(sums.dtype)).float()]
    return tuple(x.transpose(1, 2).contiguous() for x in (*halves, zero.int()))


def _own(starts: Tensor | None, ends: Tensor | None, q: Tensor) -> bool:
    """Whether the sequences of a batch may have keys of their own; if not, one mask does for all."""
    return q.shape[0] > 1 and (starts is not None or ends is not None)


def _call(
    q: Tensor, k: Tensor, v: Tensor, sight: Sight, own: bool, sums: tuple[Tensor, ...], scale: float
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V], or as wide as the kernel wants, and lse [B, T, H]."""
    first, last = sight.start, sight.end
    if sight.window:
        first = torch.maximum(first, sight.position - sight.window + 1)
        last = last if sight.causal else torch.minimum(last, sight.position + sight.window)
    if sight.causal:
        last = torch.minimum(last, sight.position + 1)
    bounds = (x.int().contiguous() for x in (first, last))
    # dq is laid out like q, which so must have a number of its own for each of its elements
    q, k, v = (F.pad(x, (0, max(0, WIDTH - x.shape[3]))).contiguous() for x in (q, k, v))
    (B, T, H, K), (S, G, V) = q.shape, (k.shape[1], k.shape[2], v.shape[3])
    # what is a constant to torch.compile, or decides between graphs
    constants = torch.is_grad_enabled(), q.dtype, H, G, K, V, len(sums), own, scale
    graph = _graph(*constants, B == 1, T <= BLOCK, S <= BLOCK, S == 1, T == S)
    return graph(q, k, v, *bounds, *sums, own=own, scale=repr(scale))


@cache
def _graph(*kind: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """_attend, compiled for all sizes: a code object a kind, so that none counts against another's recompilations."""
    copy = types.FunctionType(_attend.__code__.replace(), _attend.__globals__, _attend.__name__)
    return torch.compile(copy, dynamic=True, fullgraph=True)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, *sums: Tensor, own: bool, scale: str
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V] and lse [B, T, H] of the keys first [B, T] <= s < last [B, T] and what `_sums` returns, if any.

    scale is the number's text, a constant to torch.compile, to which numbers are variables.
    """
    # imports torch.compile's machinery, and so is not imported with the package
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    def visible(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s >= first[b, t]) & (s < last[b, t])

    def forgotten(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        of_high, of_low, to_high, to_low, zero = sums
        bias = (of_high[b, h, t] - to_high[b, h, s]) + (of_low[b, h, t] - to_low[b, h, s])
        return torch.where(zero[b, h, t] > s, -torch.inf, score.float() + bias)

    mask = create_block_mask(
        visible, q.shape[0] if own else 1, None, q.shape[1], k.shape[1], device=q.device, BLOCK_SIZE=BLOCK
    )
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bias, wanted = forgotten if sums else None, AuxRequest(lse=True)
    y, more = flex_attention(q, k, v, bias, mask, float(scale), enable_gqa=True, return_aux=wanted)
    assert more.lse is not None
    return y.transpose(1, 2), more.lse.transpose(1, 2)
