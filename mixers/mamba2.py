"""Mamba-2: a selective state space with one decay a head, which makes it a gated linear attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gla import gla
from kernels.gla.step import can_step, space_step
from kernels.problem import state_dtype
from kernels.short_conv import short_conv
from mixers.heads import GatedNorm, heads_for, split
from mixers.mixer import SequenceMixer, placed
from mixers.options import positive
from mixers.parts import cast
from mixers.projections import project
from mixers.registry import register


@register
class Mamba2(SequenceMixer):
    """Mamba-2 (state space duality): a matrix state with a scalar decay a head, behind a short convolution.

        z_t, u_t, dt_t = W_in x_t,   (v, k, q)_t = SiLU(conv(u)_t),   Δ_t = softplus(dt_t + b)
        S_t = exp(−Δ_t e^A) S_{t−1} + Δ_t k_t v_tᵀ,   o_t = S_tᵀ q_t + D v_t,   head by head
        y_t = W_out rms(o_t ⊙ SiLU(z_t))

    v, k, q are the paper's x, B, C. k and q are shared by the heads of a group, over which the norm goes too. Δ and the
    decay are computed in float32.

    Shapes: x, y [B, T, dim]; state {"S": [B, H, K, V] in float32 (float64 for float64 x), "conv": [B, W − 1,
    expand · dim + 2 groups · K], the last inputs of the convolution}; H V = expand · dim.
    Cost: 3 expand dim² + 2 dim (groups K) multiplications a token and 2 expand dim K for the state.

    Args:
        dim: width of x and y.
        expand: value channels per dim.
        state_dim: K, the key width.
        heads: H; None: one for every 64 value channels, or the next smaller number that divides them.
        groups: sets of keys and queries; divides the heads.
        short_conv: W, the width of the convolution.
        conv_bias: biases in the convolution.
        bias: biases in W_in and W_out.
        backend: of the recurrence; see `kernels.gla.gla`.

    Source: Dao, Gu, "Transformers are SSMs", arXiv 2405.21060; initialised as in its code: e^A uniform in [1, 16],
    D = 1, and b such that softplus(b) is log-uniform in [1e-3, 0.1].
    """

    family = "matrix-state linear RNN"
    source = "arXiv 2405.21060"
    ops = ("gla",)

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 2,
        state_dim: int = 128,
        heads: int | None = None,
        groups: int = 1,
        short_conv: int = 4,
        conv_bias: bool = True,
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        positive("mamba2", expand=expand, state_dim=state_dim, short_conv=short_conv)
        self.dim, self.inner, self.state_dim, self.backend = dim, dim * expand, state_dim, backend
        self.heads, self.groups, self.short_conv = heads_for("mamba2", heads, 64, self.inner), groups, short_conv
        if groups < 1 or self.heads % groups:
            raise ValueError(f"mamba2: groups is {groups}, which does not divide the {self.heads} heads")
        channels = self.inner + 2 * groups * state_dim
        self.in_proj = nn.Linear(dim, self.inner + channels + self.heads, bias=bias)
        bound = short_conv**-0.5
        self.conv = nn.Parameter(torch.empty(channels, short_conv).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if conv_bias else None
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.heads))
        dt = torch.empty(self.heads).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp_min(1e-4)
        # softplus(dt_bias) = dt
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.norm = GatedNorm(self.inner // groups, gate_first=True, heads=groups)
        self.out_proj = nn.Linear(self.inner, dim, bias=bias)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = placed(self.in_proj, device, dtype)
        shape = batch, self.heads, self.state_dim, self.inner // self.heads
        conv = torch.zeros(batch, self.short_conv - 1, self.conv.shape[0], device=device, dtype=dtype)
        return {"S": torch.zeros(shape, device=device, dtype=state_dtype(dtype)), "conv": conv}

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        z, u, dt = project(x, self.in_proj)[0].split_with_sizes([self.inner, self.conv.shape[0], self.heads], -1)
        bias = None if self.conv_bias is None else cast(self.conv_bias, u.dtype)
        u, conv = short_conv(
            u, cast(self.conv, u.dtype), bias, cast(state["conv"], u.dtype), activation="silu", cu_seqlens=cu_seqlens
        )
        v, kq = u.split_with_sizes([self.inner, 2 * self.groups * self.state_dim], -1)
        v, (k, q) = split(v, self.heads), split(kq, 2 * self.groups).chunk(2, 2)
        wide = state_dtype(x.dtype)
        parameters = [cast(p, wide) for p in (self.dt_bias, self.A_log, self.D)]
        if can_step(v, state["S"], cu_seqlens, self.backend, k, q, dt, states=parameters):
            y, S = space_step(q, k, v, dt, state["S"], *parameters)
        else:
            y, S = self._recur(q, k, v, dt, state["S"], parameters, cu_seqlens)
        y = self.norm(y.reshape(*x.shape[:2], self.groups, -1), z)
        return project(y, self.out_proj)[0], {"S": S, "conv": conv}

    def _recur(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dt: Tensor,
        S: Tensor,
        parameters: Sequence[Tensor],
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """o [B, T, H, V] and the last S; q, k [B, T, groups, K]."""
        q, k = (t.repeat_interleave(self.heads // self.groups, 2) for t in (q, k))
        dt_bias, A_log, D = parameters
        dt = F.softplus(cast(dt, S.dtype) + dt_bias)
        inputs = cast(dt.unsqueeze(-1) * cast(v, S.dtype), v.dtype)
        y, S = gla(q, k, inputs, -A_log.exp() * dt, S, scale=1.0, cu_seqlens=cu_seqlens, backend=self.backend)
        return torch.addcmul(y, cast(D, y.dtype).unsqueeze(-1), v), S
