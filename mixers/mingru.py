"""minGRU: the GRU cut down until it is a scan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.hgru import hgru
from kernels.problem import state_dtype
from mixers.mixer import SequenceMixer, placed
from mixers.options import positive
from mixers.projections import project
from mixers.registry import register


@register
class MinGRU(SequenceMixer):
    """Minimal GRU: gates that see the input only.

        z_t = σ(W_z x_t),   h̃_t = g(W_h x_t),   h_t = (1 − z_t) h_{t−1} + z_t h̃_t,   y_t = W_o h_t

    g(x) = x + ½ for x ≥ 0 and σ(x) below, which keeps h̃ positive (the paper's log-space variant); "identity" is its
    plain variant. 1 − z is computed as σ(−W_z x) in float32.

    Shapes: x, y [B, T, dim]; state {"h": [B, expand · dim]} in float32 (float64 for float64 x).
    Cost: 3 expand dim² multiplications a token.

    Args:
        dim: width of x and y.
        expand: state channels per dim.
        candidate: "positive" or "identity", the g above.
        bias: biases in all projections.
        backend: of the recurrence; see `kernels.hgru.hgru`.

    Source: Feng et al., "Were RNNs all we needed?", arXiv 2410.01201.
    """

    family = "element-wise linear RNN"
    source = "arXiv 2410.01201"
    ops = ("hgru",)

    def __init__(
        self, dim: int, *, expand: int = 1, candidate: str = "positive", bias: bool = True, backend: str = "auto"
    ) -> None:
        super().__init__()
        positive("mingru", expand=expand)
        if candidate not in ("positive", "identity"):
            raise ValueError(f"mingru: candidate is {candidate!r}, expected 'positive' or 'identity'")
        self.dim, self.width, self.candidate, self.backend = dim, dim * expand, candidate, backend
        self.z_proj = nn.Linear(dim, self.width, bias=bias)
        self.h_proj = nn.Linear(dim, self.width, bias=bias)
        self.o_proj = nn.Linear(self.width, dim, bias=bias)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = placed(self.z_proj, device, dtype)
        return {"h": torch.zeros(batch, self.width, device=device, dtype=state_dtype(dtype))}

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        z, c = project(x, self.z_proj, self.h_proj)
        # the forget gate is 1 − z
        h, final = hgru(
            c, -z, None, None, state["h"], activation=self.candidate, cu_seqlens=cu_seqlens, backend=self.backend
        )
        (y,) = project(h, self.o_proj)
        return y, {"h": final}
