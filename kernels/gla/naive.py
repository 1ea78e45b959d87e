"""Gated linear attention as its definition: a loop over time, and the loop of its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import matrix_state


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V], final_state [N, H, K, V])"""
    return matrix_state.forward(step, (q, k, v, log_decay), initial_state, cu_seqlens, scale, (bonus,))


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    needs: tuple[bool, ...],
    config: Any = None,
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dlog_decay, dinitial_state, dbonus), each None where `needs` says so."""
    rows = q, k, v, log_decay
    return matrix_state.backward(
        step, step_backward, dy, dfinal_state, rows, initial_state, cu_seqlens, scale, needs, (bonus,)
    )


def step(
    S: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, bonus: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S' = diag(exp(log_decay)) S + k vᵀ;  y = S'ᵀ q, with a bonus u y = (S + diag(u) k vᵀ)ᵀ q.

    S [B, H, K, V]; q, k [B, H, K]; v, y [B, H, V]; log_decay [B, H, K or 1]; bonus [H, K].
    """
    kv = k[..., None] * v[..., None, :]
    after = (S if log_decay is None else log_decay.exp()[..., None] * S) + kv
    seen = after if bonus is None else S + bonus[..., None] * kv
    return after, torch.einsum("bhkv,bhk->bhv", seen, q)


def step_backward(
    dS: Tensor,
    dy: Tensor,
    S: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    bonus: Tensor | None,
) -> tuple[Tensor, tuple[Tensor | None, ...], tuple[Tensor | None]]:
    """From the gradient of S' (without this step's y): that of S, of the row, and of the bonus [H, K]."""
    decay = None if log_decay is None else log_decay.exp()[..., None]
    q_dy, dbonus = q[..., None] * dy[..., None, :], None
    if bonus is None:
        seen = (S if decay is None else decay * S) + k[..., None] * v[..., None, :]
        dS = dS + q_dy
        dseen, dkv = torch.zeros_like(dS), dS
    else:
        seen = S + bonus[..., None] * k[..., None] * v[..., None, :]
        v_dy = (v * dy).sum(-1, keepdim=True)
        dseen, dkv, dbonus = q_dy, dS + bonus[..., None] * q_dy, (q * k * v_dy).sum(0)
    dq = torch.einsum("bhkv,bhv->bhk", seen, dy)
    dk = torch.einsum("bhkv,bhv->bhk", dkv, v)
    dv = torch.einsum("bhkv,bhk->bhv", dkv, k)
    if decay is None or log_decay is None:
        return dS + dseen, (dq, dk, dv, None), (dbonus,)
    dlog_decay = (decay * dS * S).sum(-1)
    if log_decay.shape[-1] == 1:
        dlog_decay = dlog_decay.sum(-1, keepdim=True)
    return decay * dS + dseen, (dq, dk, dv, dlog_decay), (dbonus,)
