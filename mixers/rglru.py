"""RG-LRU: the real-gated linear recurrent unit of Griffin."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.problem import state_dtype
from kernels.scan import scan
from mixers.mixer import SequenceMixer
from mixers.registry import register


@register
class RGLRU(SequenceMixer):
    """Real-gated linear recurrent unit, with gates that are block-diagonal over heads.

        r_t = σ(W_r x_t),   i_t = σ(W_i x_t),   log a_t = −8 softplus(Λ) r_t
        h_t = a_t h_{t−1} + √(1 − a_t²) (i_t ⊙ x_t),   y_t = h_t

    √(1 − a²) is computed as √(−expm1(2 log a)) in float32. Λ starts so that a^(1/r) is uniform in [0.9, 0.999] by its
    square, as published. The layer is the bare unit: the projections around it belong to the block.

    Shapes: x, y [B, T, dim]; state {"h": [B, dim]} in float32 (float64 for float64 x).
    Cost: 2 dim² / heads multiplications a token.

    Args:
        dim: width of x and y.
        heads: blocks of the gates' matrices; must divide dim.
        backend: of the scan; see `kernels.scan.scan`.

    Source: De et al., "Griffin", arXiv 2402.19427, equations 1 to 4.
    """

    family = "element-wise linear RNN"
    source = "arXiv 2402.19427"
    ops = ("scan",)
    C = 8.0

    def __init__(self, dim: int, *, heads: int = 1, backend: str = "auto") -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"rglru: dim is {dim}, which heads = {heads} does not divide")
        self.dim, self.heads, self.backend = dim, heads, backend
        block = dim // heads
        self.r_weight = nn.Parameter(torch.randn(heads, block, block) / math.sqrt(block))
        self.i_weight = nn.Parameter(torch.randn(heads, block, block) / math.sqrt(block))
        self.r_bias = nn.Parameter(torch.zeros(dim))
        self.i_bias = nn.Parameter(torch.zeros(dim))
        log_a = 0.5 * torch.log(torch.empty(dim).uniform_(0.9**2, 0.999**2))
        # softplus(Λ) = −log a / 8
        self.decay = nn.Parameter(torch.log(torch.expm1(-log_a / self.C)))

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = device or self.decay.device, dtype or self.decay.dtype
        return {"h": torch.zeros(batch, self.dim, device=device, dtype=state_dtype(dtype))}

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        wide = state_dtype(x.dtype)
        r = torch.sigmoid(self._gate(x, self.r_weight, self.r_bias).to(wide))
        i = torch.sigmoid(self._gate(x, self.i_weight, self.i_bias).to(wide))
        log_a = -self.C * F.softplus(self.decay.to(wide)) * r
        # the square root's slope is infinite at a = 1, where its input's limit is 0
        scale = torch.sqrt((-torch.expm1(2 * log_a)).clamp_min(torch.finfo(wide).tiny))
        inputs = (scale * i * x.to(wide)).to(x.dtype)
        h, final = scan(log_a.exp(), inputs, state["h"], cu_seqlens=cu_seqlens, backend=self.backend)
        return h, {"h": final}

    def _gate(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        blocks = torch.einsum("bthi,hij->bthj", x.unflatten(-1, (self.heads, -1)), weight)
        return blocks.flatten(-2) + bias
