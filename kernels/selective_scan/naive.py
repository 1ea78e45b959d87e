"""The selective scan as its definition: a loop over time, and the loop of its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.loop import Loop, wanted
from kernels.packing import Packing
from kernels.problem import state_dtype


def forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """(y [B, T, D], final_state [N, D, K])"""
    y, final = _loop(x, delta, A, B, C, D, initial_state, cu_seqlens).forward()
    return y.to(x.dtype), final


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    needs: tuple[bool, ...],
    config: Any = None,
) -> tuple[Tensor | None, ...]:
    """(dx, ddelta, dA, dB, dC, dD, dinitial_state), each None where `needs` says so."""
    loop = _loop(x, delta, A, B, C, D, initial_state, cu_seqlens)
    dy = torch.zeros_like(x) if dy is None else dy
    (dx, ddelta, dB, dC), dinitial, (dA, dD) = loop.backward(step_backward, dy, dfinal_state)
    gradients, like = (dx, ddelta, dA, dB, dC, dD, dinitial), (x, delta, A, B, C, D, initial_state)
    return wanted(gradients, like, needs)


def _loop(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Loop:  # fmt: skip
    packing = Packing.of(x, cu_seqlens, False)
    if initial_state is None:
        initial_state = x.new_zeros((packing.sequences, *A.shape), dtype=state_dtype(x.dtype))
    return Loop(step, (x, delta, B, C), initial_state, packing, (A, D))


def step(
    h: Tensor, x: Tensor, delta: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """h' = exp(Δ A) h + Δ x B;  y = C · h' + D x.   h [B, D, K]; x, Δ, y [B, D]; B, C [B, K]; A [D, K]; D [D]."""
    after = torch.exp(delta[..., None] * A) * h + (delta * x)[..., None] * B[:, None]
    y = torch.einsum("bdk,bk->bd", after, C)
    return after, y if D is None else y + D * x


def step_backward(
    dh: Tensor,
    dy: Tensor,
    h: Tensor,
    x: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    A: Tensor,
    D: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, Tensor | None]]:
    """From the gradient of h' (without this step's y): that of h, of the row, and of A and D."""
    decay = torch.exp(delta[..., None] * A)
    after = decay * h + (delta * x)[..., None] * B[:, None]
    dC = torch.einsum("bdk,bd->bk", after, dy)
    dh = dh + dy[..., None] * C[:, None]
    dinput = torch.einsum("bdk,bk->bd", dh, B)
    dB = torch.einsum("bdk,bd->bk", dh, delta * x)
    # of Δ A
    dexponent = dh * decay * h
    dx, ddelta = delta * dinput, x * dinput + (dexponent * A).sum(-1)
    dA = (dexponent * delta[..., None]).sum(0)
    if D is None:
        return decay * dh, (dx, ddelta, dB, dC), (dA, None)
    return decay * dh, (dx + D * dy, ddelta, dB, dC), (dA, (x * dy).sum(0))
