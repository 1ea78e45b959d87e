"""Mamba: a selective state-space model between a short convolution and a gate."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.problem import state_dtype
from kernels.selective_scan import selective_scan
from kernels.short_conv import short_conv
from mixers.mixer import SequenceMixer
from mixers.options import positive
from mixers.projections import project
from mixers.registry import register


@register
class Mamba(SequenceMixer):
    """Selective state-space model (S6): step size, input and output of a diagonal recurrence depend on the data.

        u_t, z_t = W_in x_t,   v_t = SiLU(conv(u)_t),   δ_t, B_t, C_t = W_x v_t,   Δ_t = softplus(W_Δ δ_t + b_Δ)
        h_t = exp(Δ_t A) h_{t−1} + Δ_t v_t B_t,   y_t = W_out ((C_t · h_t + D v_t) ⊙ SiLU(z_t))

    for each of expand · dim channels h_t, A in R^states, A = −exp(A_log); B_t, C_t are shared by all channels, δ_t has
    dt_rank numbers. Δ is computed in float32. At the start A_n = −n, D = 1, softplus(b_Δ) is log-uniform in
    [dt_min, dt_max], but at least dt_floor, and W_Δ is uniform within ± dt_rank^−½.

    Shapes: x, y [B, T, dim]; state {"h": [B, expand · dim, states] in float32 (float64 for float64 x),
    "conv": [B, short_conv − 1, expand · dim], the last u, in the dtype they are computed in}.
    Cost: 3 expand dim² + expand dim (2 dt_rank + 2 states) multiplications a token, and 3 expand dim · states in the
    scan.

    Args:
        dim: width of x and y.
        expand: channels per dim.
        states: state channels per channel.
        short_conv: width of the convolution.
        dt_rank: rank of the step sizes; None: dim / 16, rounded up.
        dt_min, dt_max, dt_floor: the step sizes at the start.
        bias: biases in the projections in and out.
        conv_bias: a bias in the convolution.
        backend: of the selective scan; see `kernels.selective_scan.selective_scan`.

    Source: Gu & Dao, "Mamba: linear-time sequence modeling with selective state spaces", arXiv 2312.00752.
    """

    family = "state-space model"
    source = "arXiv 2312.00752"
    ops = ("selective_scan",)

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 2,
        states: int = 16,
        short_conv: int = 4,
        dt_rank: int | None = None,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_floor: float = 1e-4,
        bias: bool = False,
        conv_bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        positive("mamba", expand=expand, states=states, short_conv=short_conv, dt_rank=dt_rank)
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"mamba: dt_min is {dt_min} and dt_max is {dt_max}, expected 0 < dt_min <= dt_max")
        if dt_floor < 0:
            raise ValueError(f"mamba: dt_floor is {dt_floor}, expected at least 0")
        self.dim, self.width, self.states, self.short_conv = dim, expand * dim, states, short_conv
        self.dt_rank, self.backend = -(-dim // 16) if dt_rank is None else dt_rank, backend
        self.in_proj = nn.Linear(dim, 2 * self.width, bias=bias)
        bound = short_conv**-0.5
        self.conv_weight = nn.Parameter(torch.empty(self.width, short_conv).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.empty(self.width).uniform_(-bound, bound)) if conv_bias else None
        self.x_proj = nn.Linear(self.width, self.dt_rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.width, bias=False)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.empty(self.width).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp_min(dt_floor)
        # softplus(b) = dt
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log = nn.Parameter(torch.arange(1, states + 1, dtype=torch.float32).log().repeat(self.width, 1))
        self.D = nn.Parameter(torch.ones(self.width))
        self.out_proj = nn.Linear(self.width, dim, bias=bias)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = device or self.D.device, dtype or self.D.dtype
        return {
            "h": torch.zeros(batch, self.width, self.states, device=device, dtype=state_dtype(dtype)),
            "conv": torch.zeros(batch, self.short_conv - 1, self.width, device=device, dtype=dtype),
        }

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        u, z = project(x, self.in_proj)[0].chunk(2, -1)
        before = state["conv"].to(u.dtype)
        v, last = short_conv(u, self.conv_weight, self.conv_bias, before, activation="silu", cu_seqlens=cu_seqlens)
        low_rank, B, C = project(v, self.x_proj)[0].split((self.dt_rank, self.states, self.states), -1)
        wide = state_dtype(v.dtype)
        delta = F.softplus(self.dt_proj(low_rank).to(wide) + self.dt_bias.to(wide))
        A, D = -self.A_log.to(wide).exp(), self.D.to(wide)
        y, final = selective_scan(v, delta, A, B, C, D, state["h"], cu_seqlens=cu_seqlens, backend=self.backend)
        return project(y * F.silu(z), self.out_proj)[0], {"h": final, "conv": last}
