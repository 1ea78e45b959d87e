"""GLA: gated linear attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gla import gla
from kernels.gla.gated_step import step
from kernels.problem import state_dtype
from mixers.gated import for_step
from mixers.heads import GatedNorm, heads_for, split
from mixers.mixer import SequenceMixer, placed
from mixers.options import positive
from mixers.parts import cast
from mixers.projections import project
from mixers.registry import register


@register
class GLA(SequenceMixer):
    """Gated linear attention: a matrix state whose rows decay by factors that depend on the data.

        q_t = W_q x_t,   k_t = W_k x_t,   v_t = W_v x_t,   log α_t = log σ(W_2 W_1 x_t + b) / 16
        S_t = diag(α_t) S_{t−1} + k_t v_tᵀ,   o_t = S_tᵀ q_t / √K,   head by head
        y_t = W_o (rms(o_t) ⊙ SiLU(W_g x_t))

    W_2 W_1 has low rank; log α is computed in float32, so that decays near 1 keep their distance from it.

    Shapes: x, y [B, T, dim]; state {"S": [B, H, K, V]} in float32 (float64 for float64 x), H K = expand_k · dim,
    H V = expand_v · dim.
    Cost: (2 expand_k + 3 expand_v) dim² multiplications a token and 2 H K V for the state, which does not grow with T.

    Args:
        dim: width of x and y.
        heads: H; None: one for every 128 key channels, or the next smaller number that divides both widths.
        expand_k, expand_v: key and value channels per dim.
        rank: rank of the decays' projection.
        temperature: divides the logarithm of the decays; 16 keeps them near 1.
        gate: activation of the output gate; None for no gate.
        backend: of the recurrence; see `kernels.gla.gla`.

    Source: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", arXiv 2312.06635;
    initialised as there: Xavier-uniform with gain 2^-2.5.
    """

    family = "matrix-state linear RNN"
    source = "arXiv 2312.06635"
    ops = ("gla",)

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        rank: int = 16,
        temperature: float = 16.0,
        gate: str | None = "silu",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        positive("gla", expand_k=expand_k, expand_v=expand_v, rank=rank, temperature=temperature)
        keys, values = max(int(dim * expand_k), 1), max(int(dim * expand_v), 1)
        self.dim, self.heads, self.backend = dim, heads_for("gla", heads, 128, keys, values), backend
        self.key_width, self.value_width, self.temperature = keys // self.heads, values // self.heads, temperature
        self.q_proj = nn.Linear(dim, keys, bias=False)
        self.k_proj = nn.Linear(dim, keys, bias=False)
        self.v_proj = nn.Linear(dim, values, bias=False)
        up = nn.Linear(rank, keys)
        nn.init.zeros_(up.bias)
        self.decay_proj = nn.Sequential(nn.Linear(dim, rank, bias=False), up)
        self.g_proj = nn.Linear(dim, values, bias=False) if gate else None
        self.norm = GatedNorm(self.value_width, activation=gate or "identity")
        self.o_proj = nn.Linear(values, dim, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=2**-2.5)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = placed(self.q_proj, device, dtype)
        shape = batch, self.heads, self.key_width, self.value_width
        return {"S": torch.zeros(shape, device=device, dtype=state_dtype(dtype))}

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        q, k, v, decay, g = project(x, self.q_proj, self.k_proj, self.v_proj, self.decay_proj, self.g_proj)
        norm = for_step(self.norm, x, state["S"], cu_seqlens, self.backend)
        if norm is not None:
            y, S = step(q, k, v, decay, g, state["S"], heads=self.heads, temperature=self.temperature, **norm)
            return project(y, self.o_proj)[0], {"S": S}
        q, k, v, decay = (split(row, self.heads) for row in (q, k, v, decay))
        log_decay = F.logsigmoid(cast(decay, state_dtype(decay.dtype))) / self.temperature
        y, S = gla(q, k, v, log_decay, state["S"], cu_seqlens=cu_seqlens, backend=self.backend)
        return project(self.norm(y, g), self.o_proj)[0], {"S": S}
