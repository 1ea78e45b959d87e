"""The diagonal-plus-rank-one rule as its definition: a loop over time, and the loop of its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import matrix_state


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
    return matrix_state.forward(step, (q, k, v, a, b, log_decay), initial_state, cu_seqlens, scale)


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
    rows = q, k, v, a, b, log_decay
    return matrix_state.backward(step, step_backward, dy, dfinal_state, rows, initial_state, cu_seqlens, scale, needs)


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
