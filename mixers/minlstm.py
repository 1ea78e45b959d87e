"""minLSTM: the LSTM cut down until it is a scan."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.problem import state_dtype
from kernels.scan import scan
from mixers.mixer import SequenceMixer, placed
from mixers.options import positive
from mixers.parts import choice
from mixers.projections import project
from mixers.registry import register


@register
class MinLSTM(SequenceMixer):
    """Minimal LSTM: forget and input gate see the input only, and share one unit of weight.

        f_t = σ(W_f x_t),   i_t = σ(W_i x_t),   h̃_t = g(W_h x_t)
        h_t = f_t/(f_t + i_t) h_{t−1} + i_t/(f_t + i_t) h̃_t,   y_t = W_o h_t

    g(x) = x + ½ for x ≥ 0 and σ(x) below, which keeps h̃ positive (the paper's log-space variant); "identity" is its
    plain variant. The two shares are σ(±(log f − log i)) in float32: neither cancels, and 0/0 cannot arise.

    Shapes: x, y [B, T, dim]; state {"h": [B, expand · dim]} in float32 (float64 for float64 x).
    Cost: 4 expand dim² multiplications a token.

    Args:
        dim: width of x and y.
        expand: state channels per dim.
        candidate: "positive" or "identity", the g above.
        bias: biases in all projections.
        forget_bias: the forget gate's bias starts that much higher, so that the layer remembers longer from the start.
        backend: of the scan; see `kernels.scan.scan`.

    Source: Feng et al., "Were RNNs all we needed?", arXiv 2410.01201.
    """

    family = "element-wise linear RNN"
    source = "arXiv 2410.01201"
    ops = ("scan",)

    def __init__(
        self,
        dim: int,
        *,
        expand: int = 1,
        candidate: str = "positive",
        bias: bool = True,
        forget_bias: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        positive("minlstm", expand=expand)
        if forget_bias and not bias:
            raise ValueError(f"minlstm: forget_bias is {forget_bias}, but bias=False leaves no bias to start there")
        self.candidate = choice("minlstm", "candidate", candidate, ("positive", "identity"))
        self.dim, self.width, self.backend = dim, dim * expand, backend
        self.f_proj = nn.Linear(dim, self.width, bias=bias)
        self.i_proj = nn.Linear(dim, self.width, bias=bias)
        self.h_proj = nn.Linear(dim, self.width, bias=bias)
        self.o_proj = nn.Linear(self.width, dim, bias=bias)
        if bias:
            with torch.no_grad():
                self.f_proj.bias.add_(forget_bias)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = placed(self.f_proj, device, dtype)
        return {"h": torch.zeros(batch, self.width, device=device, dtype=state_dtype(dtype))}

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        f, i, candidate = project(x, self.f_proj, self.i_proj, self.h_proj)
        wide = state_dtype(f.dtype)
        # f/(f + i) = σ(log f − log i) of f, i that are sigmoids themselves
        logit = F.logsigmoid(f.to(wide)) - F.logsigmoid(i.to(wide))
        c = candidate.to(wide)
        if self.candidate == "positive":
            c = torch.where(c >= 0, c + 0.5, torch.sigmoid(c))
        inputs = (torch.sigmoid(-logit) * c).to(candidate.dtype)
        h, final = scan(torch.sigmoid(logit), inputs, state["h"], cu_seqlens=cu_seqlens, backend=self.backend)
        (y,) = project(h, self.o_proj)
        return y, {"h": final}
