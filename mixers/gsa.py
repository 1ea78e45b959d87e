"""GSA: gated slot attention, a softmax over a memory of fixed size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gla import gla
from kernels.gla.step import can_step, slot_step
from kernels.gla.transposed import gla_transposed
from kernels.problem import state_dtype
from mixers.heads import GatedNorm, heads_for, split
from mixers.mixer import SequenceMixer, placed
from mixers.options import positive
from mixers.parts import cast
from mixers.projections import project
from mixers.registry import register


@register
class GSA(SequenceMixer):
    """Gated slot attention: keys and values are written into M slots that forget; queries attend to the slots.

        q_t = SiLU(W_q x_t),   k_t = SiLU(W_k x_t),   v_t = SiLU(W_v x_t),   log α_t = log σ(W_f x_t) / 8
        K_t = diag(α_t) K_{t−1} + (1 − α_t) k_tᵀ,   V_t = diag(α_t) V_{t−1} + (1 − α_t) v_tᵀ,   head by head
        o_t = V_tᵀ softmax(K_t q_t),   y_t = W_o rms(SiLU(o_t))

    α_t [M] forgets slot by slot; 1 − α is computed as −expm1(log α) in float32. Each equation is linear attention whose
    keys are the slots: the second pass reads it as such, and the first along its values (`gla_transposed`).

    Shapes: x, y [B, T, dim]; state {"K": [B, H, M, dim / H], "V": [B, H, M, dim / H]} in float32 (float64 for
    float64 x).
    Cost: 4 dim² + dim H M multiplications a token and 4 dim M for the state, which does not grow with T; over
    several tokens the first pass takes a forward and a backward pass of gla.

    Args:
        dim: width of x and y.
        heads: H; None: dim / 64, or the next smaller number that divides dim.
        slots: M; None: dim / H.
        temperature: divides the logarithm of the decays; 8 keeps them near 1.
        backend: of the recurrences; see `kernels.gla.gla`.

    Source: Zhang et al., "Gated Slot Attention for Efficient Linear-Time Sequence Modeling", arXiv 2409.07146.
    """

    family = "matrix-state linear RNN"
    source = "arXiv 2409.07146"
    ops = ("gla",)

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        slots: int | None = None,
        temperature: float = 8.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        positive("gsa", slots=slots, temperature=temperature)
        self.dim, self.heads, self.backend = dim, heads_for("gsa", heads, 64, dim), backend
        self.slots, self.temperature = dim // self.heads if slots is None else slots, temperature
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.f_proj = nn.Linear(dim, self.heads * self.slots, bias=False)
        # SiLU(o) = o σ(o): each number is its own gate
        self.norm = GatedNorm(dim, activation="sigmoid", gate_first=True)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = placed(self.q_proj, device, dtype)
        wide = state_dtype(dtype)
        K = torch.zeros(batch, self.heads, self.slots, self.dim // self.heads, device=device, dtype=wide)
        return {"K": K, "V": K.clone()}

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        rows = project(x, self.q_proj, self.k_proj, self.v_proj, self.f_proj)
        q, k, v, f = (split(row, self.heads) for row in rows)
        if can_step(q, state["K"], cu_seqlens, self.backend, k, v, f, states=(state["V"],)):
            o, K, V = slot_step(q, k, v, f, state["K"], state["V"], temperature=self.temperature)
        else:
            o, K, V = self._read(q, k, v, f, state, cu_seqlens)
        return project(self.norm(o, o), self.o_proj)[0], {"K": K, "V": V}

    def _read(
        self, q: Tensor, k: Tensor, v: Tensor, f: Tensor, state: Any, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """o [B, T, dim], and the last K and V [N, H, M, dim / H]."""
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
        log_decay = F.logsigmoid(cast(f, state_dtype(f.dtype))) / self.temperature
        written = cast(-torch.expm1(log_decay), v.dtype)
        seen, K = self._keys(q, k, written, log_decay, state["K"], cu_seqlens)
        shares = cast(cast(seen, log_decay.dtype).softmax(-1), v.dtype)
        y, V = gla(shares, written, v, log_decay, state["V"], scale=1.0, cu_seqlens=cu_seqlens, backend=self.backend)
        return y.flatten(-2), K, V

    def _keys(
        self, q: Tensor, k: Tensor, written: Tensor, log_decay: Tensor, K: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """K_t q_t [B, T, H, M], and the last K [N, H, M, dim / H]."""
        if cu_seqlens is None and q.shape[1] == 1:
            # a token alone: nothing is repeated
            K = log_decay[:, 0].exp().unsqueeze(-1) * K
            K = K + cast(written[:, 0], K.dtype).unsqueeze(-1) * k.transpose(1, 2)
            return cast((K * q.transpose(1, 2)).sum(-1), q.dtype).unsqueeze(1), K
        return gla_transposed(q, written, k, log_decay, K, cu_seqlens=cu_seqlens, backend=self.backend)
