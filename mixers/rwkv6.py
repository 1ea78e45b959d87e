"""RWKV-6 (Finch): token shift, a decay for every key, and a bonus for the current token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.gla import gla
from kernels.gla.gated_step import step
from kernels.gla.step import can_step, shift_step
from kernels.problem import state_dtype
from mixers.gated import for_step
from mixers.heads import GatedNorm, heads_for, previous, split
from mixers.mixer import SequenceMixer, activation_dtype, placed
from mixers.options import positive
from mixers.parts import cast
from mixers.projections import project, project_each
from mixers.registry import register

# The inputs that are mixed with the token before, each with shares of its own
INPUTS = ("w", "k", "v", "r", "g")


@register
class RWKV6(SequenceMixer):
    """RWKV-6 time mixing: a matrix state whose decays, and shares of the previous token, depend on the data.

        δ_t = x_{t−1} − x_t,   s = tanh((x_t + δ_t ⊙ μ) A) as five rows of `rank`
        x^j_t = x_t + δ_t ⊙ (μ_j + s_j B_j),   j = w, k, v, r, g
        r_t = W_r x^r_t,   k_t = W_k x^k_t,   v_t = W_v x^v_t,   log w_t = −exp(ω + tanh(x^w_t C) D)
        o_t = (S_{t−1} + diag(u) k_t v_tᵀ)ᵀ r_t,   S_t = diag(w_t) S_{t−1} + k_t v_tᵀ,   head by head
        y_t = W_o (norm(o_t) ⊙ SiLU(W_g x^g_t))

    norm is a layer norm of each head (a group norm). Decays and bonus are computed in float32.

    Shapes: x, y [B, T, dim]; state {"S": [B, H, dim / H, dim / H] in float32 (float64 for float64 x), "last":
    [B, 1, dim], the last token}.
    Cost: 5 dim² + (10 rank + 2 decay_rank) dim multiplications a token and 2 dim² / H for the state.

    Args:
        dim: width of x and y.
        heads: H; None: dim / 64, or the next smaller number that divides dim.
        rank: rank of the data-dependent shares A, B.
        decay_rank: rank of the data-dependent decay C, D.
        depth: 0 for a network's first layer to 1 for its last: what the published initialisation depends on.
        backend: of the recurrence; see `kernels.gla.gla`.

    Source: Peng et al., "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", arXiv 2404.05892;
    initialised as its code, but A and C at 1e-4, not at 0, where B and D would learn nothing in the first step.
    """

    family = "matrix-state linear RNN"
    source = "arXiv 2404.05892"
    ops = ("gla",)
    # exp(-exp(8)) is 0 in every dtype; beyond, its gradient would be 0 times infinity
    MOST = 8.0

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        rank: int = 32,
        decay_rank: int = 64,
        depth: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        positive("rwkv6", rank=rank, decay_rank=decay_rank)
        if not 0 <= depth <= 1:
            raise ValueError(f"rwkv6: depth is {depth}, expected 0 (first layer) to 1 (last layer)")
        self.dim, self.heads, self.rank, self.backend = dim, heads_for("rwkv6", heads, 64, dim), rank, backend
        place, last = torch.arange(dim) / dim, torch.arange(dim) / max(dim - 1, 1)
        even, uneven = 1 - place ** (1 - depth), 1 - place ** (0.5 * (1 - depth))
        self.mu = nn.Parameter(even)
        self.mu_inputs = nn.Parameter(torch.stack((even, even, even - 0.3 * depth, uneven, uneven)))
        self.mu_down = nn.Parameter(torch.empty(dim, len(INPUTS) * rank).uniform_(-1e-4, 1e-4))
        self.mu_up = nn.Parameter(torch.empty(len(INPUTS), rank, dim).uniform_(-0.01, 0.01))
        self.decay = nn.Parameter(-6 + 5 * last ** (0.7 + 1.3 * depth))
        self.decay_down = nn.Parameter(torch.empty(dim, decay_rank).uniform_(-1e-4, 1e-4))
        self.decay_up = nn.Parameter(torch.empty(decay_rank, dim).uniform_(-0.01, 0.01))
        zigzag = 0.1 * ((torch.arange(dim) + 1) % 3 - 1)
        self.bonus = nn.Parameter((depth * (1 - last) + zigzag).view(self.heads, -1))
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.r_proj = nn.Linear(dim, dim, bias=False)
        self.g_proj = nn.Linear(dim, dim, bias=False)
        self.norm = GatedNorm(dim // self.heads, heads=self.heads, bias=True, center=True, eps=64e-5)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = placed(self.o_proj, device, dtype)
        width = self.dim // self.heads
        S = torch.zeros(batch, self.heads, width, width, device=device, dtype=state_dtype(dtype))
        return {"S": S, "last": torch.zeros(batch, 1, self.dim, device=device, dtype=dtype)}

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        wide = state_dtype(x.dtype)
        x = cast(x, activation_dtype(x))
        before, last = previous(x, state["last"], cu_seqlens)
        shares = self.mu, self.mu_down, self.mu_up, self.mu_inputs
        decay = self.decay, self.decay_down, self.decay_up
        known = (before, *shares, *decay)
        if can_step(x, state["S"], cu_seqlens, self.backend, *known):
            mixed, log_decay = shift_step(x, before, shares, decay, most=self.MOST)
            _, k, v, r, g = mixed.unbind()
        else:
            w, k, v, r, g = self.shifted(x, before - x)
            log_decay = self.log_decays(w)
        projections = [(k, self.k_proj), (v, self.v_proj), (r, self.r_proj), (g, self.g_proj)]
        k, v, r, g = project_each(projections)
        norm = for_step(self.norm, x, state["S"], cu_seqlens, self.backend, self.bonus, states=(log_decay,))
        if norm is not None:
            y, S = step(r, k, v, log_decay, g, state["S"], heads=self.heads, scale=1.0, bonus=self.bonus, **norm)
            return project(y, self.o_proj)[0], {"S": S, "last": last}
        k, v, r, log_decay = (split(t, self.heads) for t in (k, v, r, log_decay))
        y, S = gla(
            r, k, v, log_decay, state["S"],
            bonus=cast(self.bonus, wide), scale=1.0, cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip
        return project(self.norm(y, g), self.o_proj)[0], {"S": S, "last": last}

    def shifted(self, x: Tensor, delta: Tensor) -> tuple[Tensor, ...]:
        """x plus shares of delta, one [B, T, dim] for each of INPUTS."""
        down = torch.tanh(torch.addcmul(x, delta, cast(self.mu, x.dtype)) @ cast(self.mu_down, x.dtype))
        # [inputs, B · T, rank]
        down = split(down, len(INPUTS)).flatten(0, 1).transpose(0, 1)
        shares = torch.baddbmm(cast(self.mu_inputs, x.dtype).unsqueeze(1), down, cast(self.mu_up, x.dtype))
        return torch.addcmul(x, delta, shares.view(-1, *x.shape)).unbind()

    def log_decays(self, w: Tensor) -> Tensor:
        """log w [B, T, dim] in float32 or wider."""
        low = torch.tanh(w @ cast(self.decay_down, w.dtype)) @ cast(self.decay_up, w.dtype)
        wide = state_dtype(w.dtype)
        return -(cast(self.decay, wide) + cast(low, wide)).clamp_max(self.MOST).exp()
