"""The delta rule as its definition: a loop over time, and the loop of its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import matrix_state


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V], final_state [N, H, K, V])"""
    return matrix_state.forward(step, (q, k, v, beta, log_decay), initial_state, cu_seqlens, scale)


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    needs: tuple[bool, ...],
    config: Any = None,
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dbeta, dlog_decay, dinitial_state), each None where `needs` says so."""
    rows = q, k, v, beta, log_decay
    return matrix_state.backward(step, step_backward, dy, dfinal_state, rows, initial_state, cu_seqlens, scale, needs)


def step(S: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """R = diag(exp(log_decay)) S;  S' = R + k uᵀ with u = β (v − Rᵀ k);  y = S'ᵀ q.

    S [B, H, K, V]; q, k [B, H, K]; v, u, y [B, H, V]; beta [B, H]; log_decay [B, H, K or 1].
    """
    R = S if log_decay is None else log_decay.exp()[..., None] * S
    u = beta[..., None] * (v - torch.einsum("bhkv,bhk->bhv", R, k))
    after = R + k[..., None] * u[..., None, :]
    return after, torch.einsum("bhkv,bhk->bhv", after, q)


def step_backward(
    dS: Tensor,
    dy: Tensor,
    S: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
) -> tuple[Tensor, tuple[Tensor | None, ...], tuple[()]]:
    """From the gradient of S' (without this step's y): that of S, and of the row."""
    decay = None if log_decay is None else log_decay.exp()[..., None]
    R = S if decay is None else decay * S
    error = v - torch.einsum("bhkv,bhk->bhv", R, k)
    u = beta[..., None] * error
    after = R + k[..., None] * u[..., None, :]
    dq = torch.einsum("bhkv,bhv->bhk", after, dy)
    dS = dS + q[..., None] * dy[..., None, :]
    du = torch.einsum("bhkv,bhk->bhv", dS, k)
    dbeta, dv = (du * error).sum(-1), beta[..., None] * du
    dk = torch.einsum("bhkv,bhv->bhk", dS, u) - torch.einsum("bhkv,bhv->bhk", R, dv)
    dR = dS - k[..., None] * dv[..., None, :]
    if decay is None or log_decay is None:
        return dR, (dq, dk, dv, dbeta, None), ()
    dlog_decay = (decay * dR * S).sum(-1)
    if log_decay.shape[-1] == 1:
        dlog_decay = dlog_decay.sum(-1, keepdim=True)
    return decay * dR, (dq, dk, dv, dbeta, dlog_decay), ()
