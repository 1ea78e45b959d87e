"""What mixers with heads share: how many heads, the norm of each head with its gate, the token before, its sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.gated_norm import gated_norm
from kernels.gated_norm.step import step
from kernels.packing import Packing
from kernels.problem import check_cu_seqlens, state_dtype
from kernels.short_conv import short_conv
from mixers.parts import ACTIVATIONS, cast, choice


def heads_for(who: str, heads: int | None, width: int, *dims: int) -> int:
    """The number of heads: as given, or None: dims[0] / width, or the next smaller number that divides every dim.

    Raises:
        ValueError: the heads that were given do not divide a dim.
    """
    if heads is None:
        return next(n for n in range(max(dims[0] // width, 1), 0, -1) if all(dim % n == 0 for dim in dims))
    for dim in dims:
        if heads < 1 or dim % heads:
            raise ValueError(f"{who}: heads is {heads}, which does not divide the {dim} channels; give other heads")
    return heads


def split(x: Tensor, heads: int) -> Tensor:
    """[..., H · K] -> [..., H, K]"""
    return torch.unflatten(x, -1, (heads, -1))


def of_each_row(who: str, values: Tensor, x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Of each row of packed x [1, T, ...] the value [N, ...] of its sequence: [1, T, ...].

    Raises:
        ValueError: cu_seqlens ends before x does; read here before an op would notice.
    """
    try:
        return Packing.of(x, cu_seqlens, False).of_each_row(values)
    except IndexError:
        check_cu_seqlens(who, cu_seqlens, x.shape[1])
        raise


class GatedNorm(nn.Module):
    """Norm of each head, times a gate: y = (x / rms(x) ⊙ w + b) ⊙ act(g), computed in the state dtype.

    Args:
        width: numbers in a head (or in a group of channels).
        activation: of the gate; see `mixers.parts.ACTIVATIONS`.
        weight: a learned weight w [width], or [heads, width] if `heads` is given; False for none.
        bias: a learned bias of the same shape, added after the weight.
        heads: each head with a weight of its own.
        gate_first: norm(x ⊙ act(g)) instead, as in Mamba-2.
        center: subtract the mean first: a layer norm, as in a group norm with a group a head.
        eps: added to the mean square.
    """

    def __init__(
        self,
        width: int,
        *,
        activation: str = "silu",
        weight: bool = True,
        bias: bool = False,
        heads: int | None = None,
        gate_first: bool = False,
        center: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.activation = choice("GatedNorm", "activation", activation, ACTIVATIONS)
        self.gate_first, self.center, self.eps = gate_first, center, eps
        shape = (width,) if heads is None else (heads, width)
        self.weight = nn.Parameter(torch.ones(shape)) if weight else None
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x [B, T, H, V] or, a single head, [B, T, V]; gate [B, T, H · V] or None for 1: [B, T, H · V] in x's dtype."""
        y = step(
            x, gate, self.weight, self.bias,
            center=self.center, activation=self.activation, gate_first=self.gate_first, eps=self.eps,
        )  # fmt: skip
        if y is not None:
            return y
        weight, bias = _beside(x, self.weight), _beside(x, self.bias)
        y = gated_norm(
            x, None if gate is None else cast(gate, x.dtype), weight, bias, norm="layer" if self.center else "rms",
            activation=self.activation, gate_first=self.gate_first, eps=self.eps,
        )  # fmt: skip
        return y if y.ndim == 3 else y.flatten(-2)


def _beside(x: Tensor, parameter: Tensor | None) -> Tensor | None:
    """In the state dtype, unless it is in x's."""
    return parameter if parameter is None or parameter.dtype == x.dtype else cast(parameter, state_dtype(x.dtype))


def previous(x: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """The token before each token [B, T, D], `state` [N, 1, D] before a sequence's first; and the last [N, 1, D].

    Both in x's dtype; a packed sequence never sees another's token.
    """
    if cu_seqlens is None and x.shape[1] == 1:
        return cast(state, x.dtype), x.clone()
    if cu_seqlens is None:
        # a copy of the last: a view would keep all the other tokens in memory
        return torch.cat([cast(state, x.dtype), x], 1)[:, :-1], x[:, -1:].clone()
    taps = torch.arange(1, -1, -1, device=x.device, dtype=x.dtype).expand(x.shape[-1], 2).contiguous()
    return short_conv(x, taps, None, cast(state, x.dtype), cu_seqlens=cu_seqlens)
