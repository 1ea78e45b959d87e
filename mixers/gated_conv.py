"""Gated short convolution: the mixer of LFM2, whose whole memory is its last inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.short_conv import short_conv
from mixers.mixer import SequenceMixer
from mixers.projections import project
from mixers.registry import register


@register
class GatedConv(SequenceMixer):
    """Short convolution between two gates that depend on the data.

        b_t, c_t, u_t = W_in x_t,   y_t = W_out (c_t ⊙ Σ_{j < W} w_j ⊙ (b ⊙ u)_{t−j})

    w_j [dim] are the taps of a causal depthwise convolution. Nothing is remembered for longer than W tokens: in LFM2
    such layers alternate with attention.

    Shapes: x, y [B, T, dim]; state {"conv": [B, W − 1, dim]}, the last b ⊙ u, in the dtype they are computed in.
    Cost: 4 dim² multiplications a token.

    Args:
        dim: width of x and y.
        short_conv: W, the width of the convolution.
        bias: biases in the projections and the convolution.
        backend: of the convolution; see `kernels.short_conv.short_conv`.

    Source: Liquid AI, "LFM2 technical report", arXiv 2511.23404.
    """

    family = "convolution"
    source = "arXiv 2511.23404"
    ops = ("short_conv",)

    def __init__(self, dim: int, *, short_conv: int = 3, bias: bool = False, backend: str = "auto") -> None:
        super().__init__()
        if short_conv < 1:
            raise ValueError(f"gated_conv: short_conv is {short_conv}, expected at least 1")
        self.dim, self.short_conv, self.backend = dim, short_conv, backend
        self.in_proj = nn.Linear(dim, 3 * dim, bias=bias)
        self.out_proj = nn.Linear(dim, dim, bias=bias)
        bound = short_conv**-0.5
        self.conv_weight = nn.Parameter(torch.empty(dim, short_conv).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound)) if bias else None

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = device or self.conv_weight.device, dtype or self.conv_weight.dtype
        return {"conv": torch.zeros(batch, self.short_conv - 1, self.dim, device=device, dtype=dtype)}

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        b, c, u = project(x, self.in_proj)[0].chunk(3, -1)
        inputs = b * u
        before = state["conv"].to(inputs.dtype)
        y, after = short_conv(
            inputs, self.conv_weight, self.conv_bias, before, cu_seqlens=cu_seqlens, backend=self.backend
        )
        return project(c * y, self.out_proj)[0], {"conv": after}
