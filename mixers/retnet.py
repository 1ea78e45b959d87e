"""RetNet: multi-scale retention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.gla import gla
from kernels.gla.step import can_step, retention_step
from kernels.problem import state_dtype
from mixers.heads import GatedNorm, heads_for, of_each_row, split
from mixers.mixer import SequenceMixer, placed
from mixers.options import positive
from mixers.parts import kept_frequencies, rotate
from mixers.projections import project
from mixers.registry import register


@register
class RetNet(SequenceMixer):
    """Multi-scale retention: linear attention with rotary positions and a fixed decay for each head.

        q_t = R_t W_q x_t,   k_t = R_t W_k x_t,   v_t = W_v x_t,   γ_h = 1 − 2^(−5 − h), h = 0, 1, ...
        S_t = γ_h S_{t−1} + k_t v_tᵀ,   o_t = S_tᵀ q_t / √K,   head by head
        y_t = W_o (rms(o_t) ⊙ SiLU(W_g x_t))

    R_t rotates by t times the rotary frequencies, t counted from the sequence's first token on, also through a state.
    The norm makes the paper's further scalings of o, which only serve 16-bit sums, unnecessary.

    Shapes: x, y [B, T, dim]; state {"S": [B, H, K, V] in float32 (float64 for float64 x), "length": int64 [B], the
    tokens seen}; H K = dim, H V = expand_v · dim.
    Cost: (2 + 3 expand_v) dim² multiplications a token and 2 H K V for the state, which does not grow with T.

    Args:
        dim: width of x and y.
        heads: H; None: dim / 256, or the next smaller number that divides dim and expand_v · dim.
        expand_v: value channels per dim.
        rotary_base: the slowest rotary frequency is nearly 1 / rotary_base.
        weight: a learned weight in the norm of the heads; the paper's has none.
        backend: of the recurrence; see `kernels.gla.gla`.

    Source: Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models", arXiv 2307.08621;
    initialised as in its code: Xavier-uniform, with gain 2^-2.5 but for W_o.
    """

    family = "matrix-state linear RNN"
    source = "arXiv 2307.08621"
    ops = ("gla",)

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        expand_v: float = 2.0,
        rotary_base: float = 10000.0,
        weight: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        positive("retnet", expand_v=expand_v, rotary_base=rotary_base)
        values = max(int(dim * expand_v), 1)
        self.dim, self.heads, self.backend = dim, heads_for("retnet", heads, 256, dim, values), backend
        self.key_width, self.value_width, self.rotary_base = dim // self.heads, values // self.heads, rotary_base
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, values, bias=False)
        self.g_proj = nn.Linear(dim, values, bias=False)
        self.norm = GatedNorm(self.value_width, weight=weight)
        self.o_proj = nn.Linear(values, dim, bias=False)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.g_proj):
            nn.init.xavier_uniform_(projection.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.o_proj.weight)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = placed(self.q_proj, device, dtype)
        wide = state_dtype(dtype)
        S = torch.zeros(batch, self.heads, self.key_width, self.value_width, device=device, dtype=wide)
        return {"S": S, "length": torch.zeros(batch, dtype=torch.int64, device=device)}

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        *qkv, g = project(x, self.q_proj, self.k_proj, self.v_proj, self.g_proj)
        q, k, v = (split(row, self.heads) for row in qkv)
        if can_step(q, state["S"], cu_seqlens, self.backend, k, v):
            wide, before = state["S"].dtype, state["length"]
            frequency = kept_frequencies(self.key_width // 2, self.rotary_base, device=q.device, dtype=wide)
            y, S = retention_step(q, k, v, state["S"], before, frequency)
            length = before + 1
        else:
            y, S, length = self._retain(q, k, v, state, cu_seqlens)
        return project(self.norm(y, g), self.o_proj)[0], {"S": S, "length": length}

    def _retain(
        self, q: Tensor, k: Tensor, v: Tensor, state: Any, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y [B, T, H, V], and the last S and lengths."""
        positions, length = _positions(q, state["length"], cu_seqlens)
        q, k = rotate(q, k, positions, self.rotary_base)
        wide = state["S"].dtype
        log_decay = torch.log1p(-torch.exp2(torch.arange(-5, -5 - self.heads, -1, device=q.device, dtype=wide)))
        log_decay = log_decay.expand(*q.shape[:2], -1).contiguous()
        y, S = gla(q, k, v, log_decay, state["S"], cu_seqlens=cu_seqlens, backend=self.backend)
        return y, S, length


def _positions(x: Tensor, length: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of each row its place in its sequence, [B or 1, T], and the lengths [N] after it; `length` [N] came before."""
    rows = torch.arange(x.shape[1], device=x.device)[None]
    if cu_seqlens is None:
        return length[:, None] + rows, length + x.shape[1]
    return rows + of_each_row("retnet", length - cu_seqlens[:-1], x, cu_seqlens), length + cu_seqlens.diff()
