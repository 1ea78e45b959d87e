"""The gated norm and its gradient as their equations, in plain differentiable torch. The others are held to it.

    s = act(gate)      u = x ⊙ s if the gate comes first, else x       d = u − mean(u) if centered, else u
    r = 1 / √(mean(d²) + eps)      n = d r      z = n ⊙ weight + bias      y = z, or z ⊙ s if the gate comes last

and with means over a head's V numbers, dz = dy or dy ⊙ s and dn = dz ⊙ weight:

    du = r (dn − n mean(dn ⊙ n)), less its mean if centered
    dweight = sum of dz ⊙ n      dbias = sum of dz, over all rows
    the gate first: dx = du ⊙ s, ds = du ⊙ x;  last: dx = du, ds = dy ⊙ z;      dgate = ds ⊙ act'(gate)
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.hgru.gates import ACTIVATIONS as OF_HGRU
from kernels.problem import state_dtype


def _gelu_slope(g: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-g / math.sqrt(2)) + g * torch.exp(-0.5 * g * g) / math.sqrt(2 * math.pi)


# act and its derivative
ACTIVATIONS = {name: OF_HGRU[name] for name in ("identity", "silu", "sigmoid", "tanh")}
ACTIVATIONS |= {"gelu": (F.gelu, _gelu_slope), "relu": (F.relu, lambda g: (g > 0).to(g.dtype))}


def forward(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    center: bool,
    activation: str,
    gate_first: bool,
    eps: float,
    config: Any = None,
) -> tuple[Tensor]:
    """(y,) like x; rows do not see each other, and cu_seqlens changes nothing."""
    wide = state_dtype(x.dtype)
    s = None if gate is None else ACTIVATIONS[activation][0](gate.to(wide))
    u = x.to(wide)
    if s is not None and gate_first:
        u = u * s
    y = _scaled(_normalised(u, center, eps)[0], weight, bias)
    if s is not None and not gate_first:
        y = y * s
    return (y.to(x.dtype).contiguous(),)


def backward(
    dy: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    center: bool,
    activation: str,
    gate_first: bool,
    eps: float,
    needs: tuple[bool, ...] = (True, True, True, True),
    config: Any = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dgate, dweight, dbias), each like its input, or None where `needs` says so or there is no such input."""
    wide = state_dtype(x.dtype)
    u = x.to(wide)
    dz = dy = torch.zeros_like(u) if dy is None else dy.to(wide)
    s = None if gate is None else ACTIVATIONS[activation][0](gate.to(wide))
    if s is not None and gate_first:
        u = u * s
    elif s is not None:
        dz = dy * s
    n, r = _normalised(u, center, eps)
    dn = dz if weight is None else dz * weight.to(wide)
    dx = dn - n * (dn * n).mean(-1, keepdim=True)
    if center:
        dx = dx - dn.mean(-1, keepdim=True)
    dx = dx * r
    dgate = None
    if gate is not None and s is not None:
        ds = dx * x.to(wide) if gate_first else dy * _scaled(n, weight, bias)
        dgate = ds * ACTIVATIONS[activation][1](gate.to(wide))
        dx = dx * s if gate_first else dx
    return (
        dx.to(x.dtype).contiguous() if needs[0] else None,
        dgate.to(x.dtype).contiguous() if needs[1] and dgate is not None else None,
        (dz * n).sum((0, 1)).to(weight.dtype) if needs[2] and weight is not None else None,
        dz.sum((0, 1)).to(bias.dtype) if needs[3] and bias is not None else None,
    )


def _normalised(u: Tensor, center: bool, eps: float) -> tuple[Tensor, Tensor]:
    """n and r."""
    d = u - u.mean(-1, keepdim=True) if center else u
    r = torch.rsqrt(d.square().mean(-1, keepdim=True) + eps)
    return d * r, r


def _scaled(n: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    z = n if weight is None else n * weight.to(n.dtype)
    return z if bias is None else z + bias.to(n.dtype)
