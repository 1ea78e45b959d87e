"""HGRN2: HGRN with its state expanded to a matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gla import gla
from kernels.gla.gated_step import step
from kernels.lone import readable
from kernels.problem import state_dtype
from mixers.gated import for_step
from mixers.heads import GatedNorm, heads_for, split
from mixers.mixer import SequenceMixer, placed
from mixers.parts import LowerBounded, cast
from mixers.projections import project
from mixers.registry import register


@register
class HGRN2(LowerBounded, SequenceMixer):
    """Hierarchically gated recurrent network with a matrix state: linear attention, its keys decayed by HGRN's gate.

        f_t = γ + (1 − γ) σ(W_f x_t),   k_t = 1 − f_t,   q_t = SiLU(W_q x_t),   v_t = W_i x_t
        S_t = diag(f_t) S_{t−1} + k_t v_tᵀ,   o_t = S_tᵀ q_t / √K,   head by head
        y_t = W_o rms(o_t)

    γ [dim] is the lower bound: a `Stack` gives each of its layers its own, growing with depth. k is computed as
    (1 − γ) σ(−W_f x) and log f as log(1 − k) where f is above ½, in float32: no cancellation.

    Shapes: x, y [B, T, dim]; state {"S": [B, H, dim / H, dim / H]} in float32 (float64 for float64 x).
    Cost: 4 dim² multiplications a token and 2 dim² / H for the state, which does not grow with T.

    Args:
        dim: width of x and y.
        heads: H; None: dim / 128 (128 is the paper's expansion), or the next smaller number that divides dim.
        lower_bound: γ: None (0), a number, a tensor [dim], or anything callable that returns one.
        backend: of the recurrence; see `kernels.gla.gla`.

    Source: Qin et al., "HGRN2: Gated Linear RNNs with State Expansion", arXiv 2404.07904.
    """

    family = "matrix-state linear RNN"
    source = "arXiv 2404.07904"
    ops = ("gla",)

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        lower_bound: float | Tensor | Callable[[], Tensor] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.backend = dim, heads_for("hgrn2", heads, 128, dim), backend
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.f_proj = nn.Linear(dim, dim, bias=False)
        self.i_proj = nn.Linear(dim, dim, bias=False)
        self.norm = GatedNorm(dim)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self._set_lower_bound("hgrn2", lower_bound, self.dim)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = placed(self.f_proj, device, dtype)
        width = self.dim // self.heads
        shape = batch, self.heads, width, width
        return {"S": torch.zeros(shape, device=device, dtype=state_dtype(dtype))}

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        q, v, f = project(x, self.q_proj, self.i_proj, self.f_proj)
        if (found := self._alone(x, q, v, f, state["S"], cu_seqlens)) is not None:
            y, S = found
            return project(y, self.o_proj)[0], {"S": S}
        log_decay, k = self.gates(f)
        q, k, v, log_decay = (split(t, self.heads) for t in (F.silu(q), cast(k, v.dtype), v, log_decay))
        y, S = gla(q, k, v, log_decay, state["S"], cu_seqlens=cu_seqlens, backend=self.backend)
        return project(self.norm(y.flatten(-2)), self.o_proj)[0], {"S": S}

    def _alone(
        self, x: Tensor, q: Tensor, v: Tensor, f: Tensor, S: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """The norm of one token and the state after it in one native call; None where the ops are to be asked."""
        norm = for_step(self.norm, x, S, cu_seqlens, self.backend)
        if norm is None or type(self) is not HGRN2:
            return None
        bound = self.lower_bound()
        if isinstance(bound, Tensor):
            bound = cast(bound, state_dtype(x.dtype)).expand(self.dim)
            if not readable(x, (), (bound,)):
                return None
        return step(q, None, v, f, None, S, heads=self.heads, lower_bound=bound, whole=True, **norm)

    def gates(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """log f and 1 − f [B, T, dim], in float32 or wider."""
        f, bound = cast(f, state_dtype(f.dtype)), self.lower_bound()
        if isinstance(bound, Tensor):
            bound = cast(bound, f.dtype)
        elif bound == 0:
            return F.logsigmoid(f), torch.sigmoid(-f)
        decay, rest = bound + (1 - bound) * torch.sigmoid(f), (1 - bound) * torch.sigmoid(-f)
        # each branch is clamped where the other is taken, or its gradient would not be finite there
        far = torch.log(decay.clamp_min(torch.finfo(f.dtype).tiny))
        return torch.where(rest < 0.5, torch.log1p(-rest.clamp_max(0.5)), far), rest
