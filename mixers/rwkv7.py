"""RWKV-7 "Goose": a matrix state whose transition is diagonal plus of rank one."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.dplr import dplr
from kernels.dplr.step import SOURCE, step
from kernels.lone import alone
from kernels.problem import state_dtype
from kernels.projections import ROWS
from mixers.heads import GatedNorm, heads_for, previous, split
from mixers.mixer import SequenceMixer, activation_dtype, placed
from mixers.options import positive
from mixers.parts import cast
from mixers.projections import plain_maps, project, project_each, untouched
from mixers.registry import register

# the exponent of the published mix with the token before, for each of the six inputs
MIXES = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}


@register
class RWKV7(SequenceMixer):
    """RWKV-7's time mixing: a delta rule that takes away along one direction and writes along another.

        x^c_t = x_t + μ_c ⊙ (x_{t−1} − x_t)   for each c of r, w, k, v, a, g
        r_t = W_r x^r_t,   v_t = W_v x^v_t,   u_t = W_k x^k_t,   g_t = W_g↑ σ(W_g↓ x^g_t)
        log w_t = −e^(−½) σ(W_w↑ tanh(W_w↓ x^w_t) + b_w),   a_t = σ(W_a↑ W_a↓ x^a_t + b_a)
        κ_t = normalise(ξ ⊙ u_t),   k_t = u_t ⊙ (1 + (a_t − 1) ⊙ α)
        S_t = diag(w_t) S_{t−1} − (a_t ⊙ κ_t) (S_{t−1}ᵀ κ_t)ᵀ + k_t v_tᵀ,   o_t = S_tᵀ r_t,   head by head
        y_t = W_o ((norm(o_t) + (Σ ρ ⊙ r_t ⊙ k_t) v_t) ⊙ g_t)

    norm is a layer norm over each head, with a weight and bias of its own and K · 10^-5 added to the variance. μ, ξ, α
    and ρ are learned vectors. w, a, κ and norm are computed in float32. The layer is that of a network's first block:
    the values that later blocks take over from the first cross layers, which a mixer does not.

    Shapes: x, y [B, T, dim]; state {"S": [B, H, K, K] in float32 (float64 for float64 x), "x": [B, 1, dim], the last
    input, in the dtype that projections are computed in}, H K = dim.
    Cost: 4 dim² + 2 dim (2 rank + gate_rank) multiplications a token and 4 dim K for the state, which does not grow
    with T.

    Args:
        dim: width of x and y.
        heads: H; None: dim / 64, or the next smaller number that divides dim.
        rank: of W_w↑ W_w↓ and W_a↑ W_a↓; None: near 2.5 √dim, a multiple of 32.
        gate_rank: of W_g↑ W_g↓; None: near 5 √dim, a multiple of 32.
        layer, layers: the layer's place in its network, counted from 0, which its start depends on.
        zero_init: W_o and the four W↓ start at 0, as published; most parameters get no gradient in the first step then.
            False: W_o as W_v, W↓ normal with deviation 0.01.
        backend: of the recurrence; see `kernels.dplr.dplr`.

    Source: Peng et al., "RWKV-7 Goose with expressive dynamic state evolution", arXiv 2503.14456;
    github.com/BlinkDL/RWKV-LM.
    """

    family = "matrix-state linear RNN"
    source = "arXiv 2503.14456"
    ops = ("dplr",)

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        rank: int | None = None,
        gate_rank: int | None = None,
        layer: int = 0,
        layers: int = 1,
        zero_init: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        positive("rwkv7", rank=rank, gate_rank=gate_rank)
        if not 0 <= layer < layers:
            raise ValueError(f"rwkv7: layer is {layer}, expected one of 0 to layers − 1 = {layers - 1}")
        self.dim, self.heads, self.backend = dim, heads_for("rwkv7", heads, 64, dim), backend
        self.key_width = dim // self.heads
        rank, gate_rank = rank or _rank(2.5, dim), gate_rank or _rank(5, dim)
        self.mixes = nn.Parameter(torch.empty(len(MIXES), dim))
        self.r_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.w_down, self.w_up = nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim)
        self.a_down, self.a_up = nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim)
        self.g_down, self.g_up = nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, dim, bias=False)
        # ξ, α and ρ
        self.k_scale, self.k_rate = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.full((dim,), 1.02))
        self.bonus = nn.Parameter(torch.full((self.heads, self.key_width), -0.04))
        self.norm = GatedNorm(self.key_width, heads=self.heads, bias=True, center=True, eps=self.key_width * 1e-5)
        self._start(layer / max(layers - 1, 1), layer / layers, zero_init)
        assert self.norm.weight is not None, "the norm of rwkv7 is made with a weight"
        nn.init.constant_(self.norm.weight, ((layer + 1) / layers) ** 0.7)

    @torch.no_grad()
    def _start(self, depth: float, share: float, zero: bool) -> None:
        """The published start; depth goes from 0 in the first layer to 1 in the last, share to 1 after the last."""
        place = torch.arange(self.dim) / self.dim
        for row, exponent in zip(self.mixes, MIXES.values()):
            row.copy_(1 - place ** (exponent * (1 - share)))
        # 0 to 1 over all channels, −1 to 1 over a head's, and that squared with its sign
        line = torch.linspace(0, 1, self.dim)
        within = torch.linspace(-1, 1, self.key_width).repeat(self.heads)
        zigzag = within * within.abs()
        self.w_up.bias.copy_(-5.5 + 6 * line ** (1 + depth**0.3) + 2.5 * zigzag)
        self.a_up.bias.copy_(-0.39 + 0.3 * zigzag + 0.4 * line)
        self.k_scale.copy_(0.76 - 0.1 * line)
        for down, up in ((self.w_down, self.w_up), (self.a_down, self.a_up), (self.g_down, self.g_up)):
            nn.init.zeros_(down.weight) if zero else nn.init.normal_(down.weight, std=0.01)
            _orthogonal(up.weight)
        bound = self.dim**-0.5
        for proj, size in ((self.r_proj, 0.5), (self.k_proj, 0.05), (self.v_proj, 0.5), (self.o_proj, 0.5)):
            nn.init.uniform_(proj.weight, -size * bound, size * bound)
        if zero:
            nn.init.zeros_(self.o_proj.weight)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = placed(self.o_proj, device, dtype)
        shape = batch, self.heads, self.key_width, self.key_width
        return {
            "S": torch.zeros(shape, device=device, dtype=state_dtype(dtype)),
            "x": torch.zeros(batch, 1, self.dim, device=device, dtype=dtype),
        }

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        x = cast(x, activation_dtype(x))
        wide = state_dtype(x.dtype)
        if (found := self._alone(x, state, cu_seqlens)) is not None:
            return found
        before, last = previous(x, state["x"], cu_seqlens)
        xr, xw, xk, xv, xa, xg = torch.addcmul(x, before - x, cast(self.mixes, x.dtype)[:, None, None]).unbind()
        r, u, v = project_each([(xr, self.r_proj), (xk, self.k_proj), (xv, self.v_proj)])
        log_decay = -math.exp(-0.5) * torch.sigmoid(cast(self.w_up(torch.tanh(self.w_down(xw))), wide))
        rate = torch.sigmoid(cast(self.a_up(self.a_down(xa)), wide))
        gate = self.g_up(torch.sigmoid(self.g_down(xg)))
        key = F.normalize(split(cast(u, wide) * cast(self.k_scale, wide), self.heads), dim=-1)
        k = cast(u * (1 + (rate - 1) * cast(self.k_rate, wide)), u.dtype)
        r, k, v, rate, log_decay = (split(rows, self.heads) for rows in (r, k, v, rate, log_decay))
        a, b = cast(-key, u.dtype), cast(rate * key, u.dtype)
        y, S = dplr(r, k, v, a, b, log_decay, state["S"], scale=1.0, cu_seqlens=cu_seqlens, backend=self.backend)
        bonus = (r * k * cast(self.bonus, wide)).sum(-1, keepdim=True) * v
        y = cast(self.norm(y) + bonus.flatten(-2), x.dtype) * gate
        return project(y, self.o_proj)[0], {"S": S, "x": last}

    def _alone(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any] | None:
        """A token of a sequence or few in one native call; None where modules and ops are to be asked, or to refuse."""
        if type(self) is not RWKV7 or not alone(x, cu_seqlens, self.backend, SOURCE) or x.shape[0] > ROWS:
            return None
        firsts, seconds = ("r_proj", "w_down", "k_proj", "v_proj", "a_down", "g_down"), ("w_up", "a_up", "g_up")
        maps, norm = plain_maps(self, *firsts, *seconds, "o_proj"), self.norm
        if maps is None or not untouched(norm, GatedNorm) or not norm.center:
            return None
        found = step(
            x, state["x"], state["S"], self.mixes, maps, (self.k_scale, self.k_rate), self.bonus,
            (norm.weight, norm.bias), heads=self.heads, eps=norm.eps,
        )  # fmt: skip
        return None if found is None else (found[0], {"S": found[1], "x": x.clone()})


def _rank(factor: float, dim: int) -> int:
    """factor √dim, rounded to a multiple of 32, and at least that."""
    return max(32, round(factor * math.sqrt(dim) / 32) * 32)


def _orthogonal(weight: Tensor) -> None:
    """[out, in]: orthogonal rows or columns of length 0.1, longer if there are more outputs than inputs."""
    outputs, inputs = weight.shape
    # torch has no QR decomposition of 16 bits, which may be the default dtype
    wide = torch.empty_like(weight, dtype=state_dtype(weight.dtype))
    weight.copy_(nn.init.orthogonal_(wide, gain=0.1 * math.sqrt(max(outputs / inputs, 1))))
