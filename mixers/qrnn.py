"""QRNN: gates from a short window of inputs, and a pooling over time that has no weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kernels.hgru import hgru
from kernels.problem import state_dtype
from kernels.scan import scan
from kernels.short_conv import short_conv
from mixers.mixer import SequenceMixer, activation_dtype, placed
from mixers.parts import choice
from mixers.projections import project
from mixers.registry import register

# pooling: the projections that it takes beside the candidate z
GATES = {"f": ("f",), "fo": ("f", "o"), "ifo": ("f", "o", "i")}


@register
class QRNN(SequenceMixer):
    """Quasi-recurrent network: a causal convolution over time makes candidates and gates, pooling carries the state.

        z_t = tanh(W_z X_t),   f_t = σ(W_f X_t),   o_t = σ(W_o X_t),   i_t = σ(W_i X_t)
        c_t = f_t c_{t−1} + (1 − f_t) z_t    ("ifo": f_t c_{t−1} + i_t z_t),    y_t = o_t ⊙ c_t    ("f": c_t)

    with X_t the last `window` inputs, x_{t−window+1} to x_t, zeros before the first. 1 − f is computed as σ(−W_f X) in
    float32.

    Shapes: x, y [B, T, dim]; state {"c": [B, dim] in float32 (float64 for float64 x), "x": [B, window − 1, dim], the
    last inputs, the oldest first, in the dtype that projections are computed in}.
    Cost: 3 window dim² multiplications a token ("f": 2, "ifo": 4).

    Args:
        dim: width of x and y.
        window: how many inputs the candidates and gates see.
        pooling: "f", "fo" or "ifo", after the gates it has.
        bias: biases in the projections.
        backend: of the pooling; see `kernels.hgru.hgru` ("ifo": `kernels.scan.scan`).

    Source: Bradbury et al., "Quasi-recurrent neural networks", arXiv 1611.01576.
    """

    family = "element-wise linear RNN"
    source = "arXiv 1611.01576"
    ops = ("hgru", "scan")

    def __init__(
        self, dim: int, *, window: int = 2, pooling: str = "fo", bias: bool = True, backend: str = "auto"
    ) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"qrnn: window is {window}, expected at least 1")
        self.gates = GATES[choice("qrnn", "pooling", pooling, GATES)]
        self.dim, self.window, self.backend = dim, window, backend
        self.proj = nn.Linear(window * dim, (1 + len(self.gates)) * dim, bias=bias)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = placed(self.proj, device, dtype)
        return {
            "c": torch.zeros(batch, self.dim, device=device, dtype=state_dtype(dtype)),
            "x": torch.zeros(batch, self.window - 1, self.dim, device=device, dtype=dtype),
        }

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        windows, last = self._windows(x.to(activation_dtype(x)), state["x"], cu_seqlens)
        (projected,) = project(windows, self.proj)
        z, *gates = projected.chunk(1 + len(self.gates), -1)
        y, final = self._pool(z, dict(zip(self.gates, gates)), state["c"], cu_seqlens)
        return y, {"c": final, "x": last}

    def _pool(
        self, z: Tensor, gate: dict[str, Tensor], state: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(y, the last c)"""
        wide = state_dtype(z.dtype)
        if "i" in gate:
            inputs = (torch.sigmoid(gate["i"].to(wide)) * torch.tanh(z.to(wide))).to(z.dtype)
            decay = torch.sigmoid(gate["f"].to(wide))
            c, final = scan(decay, inputs, state, cu_seqlens=cu_seqlens, backend=self.backend)
        else:
            c, final = hgru(
                z, gate["f"], None, None, state, activation="tanh", cu_seqlens=cu_seqlens, backend=self.backend
            )
        y = (torch.sigmoid(gate["o"].to(wide)) * c).to(c.dtype) if "o" in gate else c
        return y, final

    def _windows(self, x: Tensor, before: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """The last `window` inputs of each token [B, T, window · dim], the oldest first; and the state after them."""
        before = before.to(x.dtype)
        if self.window == 1:
            return x, before
        # a convolution with a single tap of 1 is a delay; packed sequences and the state are its business
        taps = torch.eye(self.window, device=x.device, dtype=x.dtype)[:-1, None].expand(-1, self.dim, -1)
        delayed = [short_conv(x, tap.contiguous(), None, before, cu_seqlens=cu_seqlens) for tap in taps.unbind()]
        return torch.cat([*(y for y, _ in delayed), x], -1), delayed[0][1]
