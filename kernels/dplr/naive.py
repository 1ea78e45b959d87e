"""The diagonal-plus-rank-one rule as its definition: a loop over time, and the loop of its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.loop import Loop
from kernels.packing import Packing
from kernels.problem import state_dtype


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V], final_state [N, H, K, V])"""
    y, final = _loop(q, k, v, a, b, log_decay, initial_state, cu_seqlens).forward()
    return (scale * y).to(v.dtype), final


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    needs: tuple[bool, ...],
    config: Any = None,
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, da, db, dlog_decay, dinitial_state), each None where `needs` says so."""
    loop = _loop(q, k, v, a, b, log_decay, initial_state, cu_seqlens)
    dy = torch.zeros_like(v) if dy is None else dy
    rows, dinitial, _ = loop.backward(step_backward, scale * dy.to(loop.initial.dtype), dfinal_state)
    like = (q, k, v, a, b, log_decay, initial_state)
    return tuple(
        g.to(t.dtype) if needed and g is not None and t is not None else None
        for g, t, needed in zip((*rows, dinitial), like, needs)
    )


def _loop(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None,
) -> Loop:  # fmt: skip
    packing = Packing.of(q, cu_seqlens, False)
    if initial_state is None:
        shape = packing.sequences, q.shape[2], q.shape[3], v.shape[3]
        initial_state = q.new_zeros(shape, dtype=state_dtype(q.dtype))
    return Loop(step, (q, k, v, a, b, log_decay), initial_state, packing)


def step(
    S: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S' = diag(exp(log_decay)) S + b (aᵀ S) + k vᵀ;  y = S'ᵀ q.

    S [B, H, K, V]; q, k, a, b [B, H, K]; v, y [B, H, V]; log_decay [B, H, K or 1].
    """
    p = torch.einsum("bhkv,bhk->bhv", S, a)
    after = S if log_decay is None else log_decay.exp()[..., None] * S
    after = after + b[..., None] * p[..., None, :] + k[..., None] * v[..., None, :]
    return after, torch.einsum("bhkv,bhk->bhv", after, q)


def step_backward(
    dS: Tensor,
    dy: Tensor,
    S: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None,
) -> tuple[Tensor, tuple[Tensor | None, ...], tuple[()]]:
    """From the gradient of S' (without this step's y): that of S, and of the row."""
    after, _ = step(S, q, k, v, a, b, log_decay)
    p = torch.einsum("bhkv,bhk->bhv", S, a)
    dq = torch.einsum("bhkv,bhv->bhk", after, dy)
    dS = dS + q[..., None] * dy[..., None, :]
    dk, db = torch.einsum("bhkv,bhv->bhk", dS, v), torch.einsum("bhkv,bhv->bhk", dS, p)
    dv, dp = torch.einsum("bhkv,bhk->bhv", dS, k), torch.einsum("bhkv,bhk->bhv", dS, b)
    da = torch.einsum("bhkv,bhv->bhk", S, dp)
    through = a[..., None] * dp[..., None, :]
    if log_decay is None:
        return dS + through, (dq, dk, dv, da, db, None), ()
    decayed = log_decay.exp()[..., None] * dS
    dlog_decay = (decayed * S).sum(-1)
    if log_decay.shape[-1] == 1:
        dlog_decay = dlog_decay.sum(-1, keepdim=True)
    return decayed + through, (dq, dk, dv, da, db, dlog_decay), ()
