"""Attention as its definition, and the gradient of its definition. Everything else is held to it.

The scores [B, H, T, S] are made for a block of queries at a time, so that they fit in memory at any length. Packed
sequences go one by one where their rows can be read here: p is 0 for the keys of another, but 0 times NaN is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import decay, spans
from kernels.attention.spans import Sight
from kernels.problem import Problem, state_dtype
from kernels.transforms import has_values

# scores that exist at once
MAX_SCORES = 1 << 24


def cannot(problem: Problem) -> list[str]:
    """Why there is no such attention; empty if there is."""
    needs_causal = problem.options["log_decay"] and not problem.options["causal"]
    return ["log_decay needs causal attention"] if needs_causal else []


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
    """y[t] = sum_s p[t, s] v[s] and lse[t] = log sum_s exp(scores[t, s])."""
    ys, lses = [], []
    for sight, of, to in _parts(q, k, starts, ends, cu_seqlens, causal, window):
        queries, keys, values = q[:, of], k[:, to], v[:, to].to(state_dtype(v.dtype))
        bias = _bias(keys, _rows(log_decay, to), sight)
        for rows in _blocks(queries, keys):
            seen = sight.visible(rows, 0, keys.shape[1])
            p, lse = _softmax(_heads(queries[:, rows], keys), keys, seen, bias(rows), scale)
            ys.append(torch.einsum("bgrts,bsgv->btgrv", p, values).flatten(2, 3))
            lses.append(lse.permute(0, 3, 1, 2).flatten(2, 3))
    return torch.cat(ys, 1).to(q.dtype).contiguous(), torch.cat(lses, 1).contiguous()


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
    needs: tuple[bool, ...] = (True, True, True, False, False, True),
    config: Any = None,
) -> tuple[Tensor | None, ...]:
    """ds = p (dp - sum_s p dp) with dp = dy · v;  dq = scale ds k,  dk = scale dsᵀ q,  dv = pᵀ dy.

    dlog_decay[r] = sum of ds[t, s] over all s < r <= t. p is computed again; all of it is differentiable.
    """
    assert dlse is None, "lse has no gradient"
    dy = torch.zeros_like(y) if dy is None else dy
    parts = _parts(q, k, starts, ends, cu_seqlens, causal, window)
    found = [
        _gradients(dy[:, of], q[:, of], k[:, to], v[:, to], _rows(log_decay, to), sight, scale)
        for sight, of, to in parts
    ]
    dqs, dks, dvs, dlog_decays = zip(*found)
    seen = [to for _, _, to in parts]
    dk, dv = _together(dks, seen, k), _together(dvs, seen, v)
    dlog_decay = None if log_decay is None else _together(dlog_decays, seen, log_decay)
    of_sequences = (
        g.to(q.dtype).contiguous() if needed else None for g, needed in zip((torch.cat(dqs, 1), dk, dv), needs)
    )
    return (*of_sequences, None, None, dlog_decay if needs[5] else None)


def _parts(
    q: Tensor, k: Tensor, starts: Tensor | None, ends: Tensor | None, cu_seqlens: Tensor | None,
    causal: bool, window: int,
) -> list[tuple[Sight, slice, slice]]:  # fmt: skip
    """What queries see, the rows of these queries, and those of the keys that are all they see."""
    spans.check(starts, ends, k.shape[1])
    sees: dict[str, Any] = {"causal": causal, "window": window}
    given = [x for x in (cu_seqlens, starts, ends) if x is not None]
    if cu_seqlens is None or not all(x.is_cpu and has_values(x) for x in given):
        return [(Sight.of(q, k, starts, ends, cu_seqlens, **sees), slice(None), slice(None))]
    cut = [(of, to) for _, of, to in spans.segments(q, k, starts, ends, cu_seqlens) if of.start < of.stop]
    return [(Sight.of(q[:, of], k[:, to], None, None, None, **sees), of, to) for of, to in cut]


def _gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, sight: Sight, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and dlog_decay of a part."""
    keys, values = k.to(state_dtype(k.dtype)), v.to(state_dtype(v.dtype))
    bias = _bias(k, log_decay, sight)
    dqs, dk, dv = [], torch.zeros_like(keys), torch.zeros_like(values)
    dlog_decay = None if log_decay is None else torch.zeros_like(log_decay)
    for rows in _blocks(q, k):
        queries = _heads(q[:, rows], k)
        p, _ = _softmax(queries, k, sight.visible(rows, 0, k.shape[1]), bias(rows), scale)
        dys = _heads(dy[:, rows], k)
        dp = torch.einsum("btgrv,bsgv->bgrts", dys, values)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        dv = dv + torch.einsum("bgrts,btgrv->bsgv", p, dys)
        dqs.append(scale * torch.einsum("bgrts,bsgk->btgrk", ds, keys).flatten(2, 3))
        dk = dk + scale * torch.einsum("bgrts,btgrk->bsgk", ds, queries)
        if dlog_decay is not None:
            earlier = F.pad(ds.flatten(1, 2).cumsum(-1)[..., :-1], (1, 0))
            later = torch.arange(k.shape[1], device=k.device) > sight.position[:, None, rows, None]
            dlog_decay = dlog_decay + earlier.masked_fill(later, 0).sum(2).transpose(1, 2)
    return torch.cat(dqs, 1), dk, dv, dlog_decay


def _together(parts: Sequence[Tensor], where: Sequence[slice], whole: Tensor) -> Tensor:
    """What the parts add up to, in the rows of `whole` that each of them has."""
    if len(parts) == 1 and parts[0].shape == whole.shape:
        return parts[0]
    total = parts[0].new_zeros(whole.shape)
    for to, part in zip(where, parts):
        total[:, to] += part
    return total


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[:, rows]


def _blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """The queries, as many at a time as have MAX_SCORES scores."""
    (B, T, H), S = q.shape[:3], k.shape[1]
    scores = B * H * S
    # of any batch, in an exported program, all at once
    step = max(1, MAX_SCORES // max(1, scores)) if isinstance(scores, int) else T
    return (slice(t, min(t + step, T)) for t in range(0, T, step))


def _heads(x: Tensor, k: Tensor) -> Tensor:
    """[B, T, H, K] as [B, T, G, H / G, K] in the state dtype."""
    return x.to(state_dtype(x.dtype)).unflatten(2, (k.shape[2], -1))


def _bias(k: Tensor, log_decay: Tensor | None, sight: Sight) -> Callable[[slice], Tensor | None]:
    """The function from rows of queries to what is added to their scores [B, G, H / G, T, S], if anything is."""
    if log_decay is None or k.shape[1] == 0:
        return lambda rows: None
    sums, groups = decay.Sums.of(log_decay), k.shape[2]

    def bias(rows: slice) -> Tensor:
        of = sums.at(sight.position[:, rows].clamp(0, k.shape[1] - 1))
        return decay.bias(of, sums, 0, -torch.inf, log_decay.dtype).unflatten(1, (groups, -1))

    return bias


def _softmax(queries: Tensor, k: Tensor, visible: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """p [B, G, H / G, T, S] and the logarithm of what it was divided by; zeros and -inf where nothing is visible."""
    scores = scale * torch.einsum("btgrk,bsgk->bgrts", queries, k.to(queries.dtype))
    scores = scores if bias is None else scores + bias
    visible = visible[:, None, None]
    blind = ~visible.any(-1, keepdim=True)
    # a blind query sees everything until its row is set to zero: no NaN, here or in any gradient
    scores = scores.masked_fill(~(visible | blind), -torch.inf)
    lse = scores.logsumexp(-1)
    return scores.softmax(-1).masked_fill(blind, 0), lse.masked_fill(blind[..., 0], -torch.inf)
