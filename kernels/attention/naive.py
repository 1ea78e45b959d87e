"""Attention as its definition, and the gradient of its definition. Everything else is held to it.

The scores [B, H, T, S] are made for a block of queries at a time, so that they fit in memory at any length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.attention import spans
from kernels.attention.spans import Sight
from kernels.problem import state_dtype

# scores that exist at once
MAX_SCORES = 1 << 24


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    causal: bool,
    window: int,
    scale: float,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """y[t] = sum_s p[t, s] v[s] and lse[t] = log sum_s exp(scores[t, s])."""
    spans.check(starts, ends, k.shape[1])
    sight = Sight.of(q, k, starts, ends, cu_seqlens, causal=causal, window=window)
    values = v.to(state_dtype(v.dtype))
    ys, lses = [], []
    for rows in _blocks(q, k):
        p, lse = _softmax(_heads(q[:, rows], k), k, sight.visible(rows, 0, k.shape[1]), scale)
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
    y: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    *,
    causal: bool,
    window: int,
    scale: float,
    needs: tuple[bool, ...] = (True, True, True, False, False),
    config: Any = None,
) -> tuple[Tensor | None, ...]:
    """ds = p (dp - sum_s p dp) with dp = dy · v;  dq = scale ds k,  dk = scale dsᵀ q,  dv = pᵀ dy.

    p is computed again; all of it is differentiable.
    """
    assert dlse is None, "lse has no gradient"
    dy = torch.zeros_like(y) if dy is None else dy
    spans.check(starts, ends, k.shape[1])
    sight = Sight.of(q, k, starts, ends, cu_seqlens, causal=causal, window=window)
    keys, values = k.to(state_dtype(k.dtype)), v.to(state_dtype(v.dtype))
    dqs, dk, dv = [], torch.zeros_like(keys), torch.zeros_like(values)
    for rows in _blocks(q, k):
        queries = _heads(q[:, rows], k)
        p, _ = _softmax(queries, k, sight.visible(rows, 0, k.shape[1]), scale)
        dys = _heads(dy[:, rows], k)
        dp = torch.einsum("btgrv,bsgv->bgrts", dys, values)
        ds = p * (dp - (p * dp).sum(-1, keepdim=True))
        dv = dv + torch.einsum("bgrts,btgrv->bsgv", p, dys)
        dqs.append(scale * torch.einsum("bgrts,bsgk->btgrk", ds, keys).flatten(2, 3))
        dk = dk + scale * torch.einsum("bgrts,btgrk->bsgk", ds, queries)
    found = (torch.cat(dqs, 1), dk, dv)
    return (*(g.to(q.dtype).contiguous() if needed else None for g, needed in zip(found, needs)), None, None)


def _blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """The queries, as many at a time as have MAX_SCORES scores."""
    (B, T, H), S = q.shape[:3], k.shape[1]
    step = max(1, MAX_SCORES // (B * H * S))
    return (slice(t, min(t + step, T)) for t in range(0, T, step))


def _heads(x: Tensor, k: Tensor) -> Tensor:
    """[B, T, H, K] as [B, T, G, H / G, K] in the state dtype."""
    return x.to(state_dtype(x.dtype)).unflatten(2, (k.shape[2], -1))


def _softmax(queries: Tensor, k: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """p [B, G, H / G, T, S] and the logarithm of what it was divided by; zeros and -inf where nothing is visible."""
    scores = scale * torch.einsum("btgrk,bsgk->bgrts", queries, k.to(queries.dtype))
    visible = visible[:, None, None]
    blind = ~visible.any(-1, keepdim=True)
    # a blind query sees everything until its row is set to zero: no NaN, here or in any gradient
    scores = scores.masked_fill(~(visible | blind), -torch.inf)
    lse = scores.logsumexp(-1)
    return scores.softmax(-1).masked_fill(blind, 0), lse.masked_fill(blind[..., 0], -torch.inf)
