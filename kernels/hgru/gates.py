"""HGRN's gates in plain torch, and their gradient: what turns `hgru` into a scan."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.problem import state_dtype


def _positive(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def _bell(x: Tensor) -> Tensor:
    """The derivative of the sigmoid, σ(x) σ(−x)."""
    return torch.sigmoid(x) * torch.sigmoid(-x)


# name: the function, and its derivative
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "silu": (F.silu, lambda x: torch.sigmoid(x) + x * _bell(x)),
    "identity": (lambda x: x, torch.ones_like),
    "tanh": (torch.tanh, lambda x: 4 * _bell(2 * x)),
    "sigmoid": (torch.sigmoid, _bell),
    "positive": (_positive, lambda x: torch.where(x >= 0, 1.0, _bell(x))),
}


def gates(
    i: Tensor, f: Tensor, lower_bound: Tensor | None, theta: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """The scan's decays λ e^{iθ} and inputs (1 − λ) act(i), [B, T, D] or pairs [B, T, D, 2], in the state dtype."""
    wide, pairs = state_dtype(i.dtype), i.ndim == 4
    i, f = i.to(wide), f.to(wide)
    rest = 1.0 if lower_bound is None else 1 - lower_bound
    decay, share = rest * torch.sigmoid(f), rest * torch.sigmoid(-f)
    if lower_bound is not None:
        decay = lower_bound + decay
    c = ACTIVATIONS[activation][0](i)
    if not pairs:
        return decay, share * c
    if theta is None:
        return torch.stack((decay, torch.zeros_like(decay)), -1), share[..., None] * c
    return torch.stack((decay * theta.cos(), decay * theta.sin()), -1), share[..., None] * c


def gates_backward(
    i: Tensor,
    f: Tensor,
    da: Tensor,
    dx: Tensor,
    lower_bound: Tensor | None,
    theta: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """From the gradients of decays and inputs, in the state dtype: (di, df, dlower_bound, dtheta), in that dtype too.

        dλ = Re(e^{−iθ} da) − act(i) · dx,   df = dλ (1 − γ) σ(f) σ(−f),   dγ = Σ dλ σ(−f),   dθ = Σ λ Im(e^{−iθ} da)

    with sums over all rows.
    """
    wide, pairs = state_dtype(i.dtype), i.ndim == 4
    i, f = i.to(wide), f.to(wide)
    act, derivative = ACTIVATIONS[activation]
    rest = 1.0 if lower_bound is None else 1 - lower_bound
    p, q = torch.sigmoid(f), torch.sigmoid(-f)
    through_input, dtheta = act(i) * dx, None
    if not pairs:
        ddecay, share = da - through_input, rest * q
    else:
        real, imaginary = da.unbind(-1)
        if theta is not None:
            cos, sin = theta.cos(), theta.sin()
            real, imaginary = cos * real + sin * imaginary, cos * imaginary - sin * real
            decay = rest * p if lower_bound is None else lower_bound + rest * p
            dtheta = (decay * imaginary).sum((0, 1))
        ddecay, share = real - through_input.sum(-1), (rest * q)[..., None]
    return share * derivative(i) * dx, ddecay * rest * p * q, (ddecay * q).sum((0, 1)), dtheta
