"""HGRN: the hierarchically gated recurrent neural network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernels.hgru import hgru
from kernels.hgru.step import SOURCE, step
from kernels.lone import alone
from kernels.problem import state_dtype
from kernels.projections import ROWS
from mixers.heads import GatedNorm
from mixers.mixer import SequenceMixer, placed
from mixers.options import positive
from mixers.parts import LowerBounded, choice
from mixers.projections import plain_maps, project, untouched
from mixers.recompute import in_chunks
from mixers.registry import register


@register
class HGRN(LowerBounded, SequenceMixer):
    """Hierarchically gated recurrent network: an element-wise linear RNN with a forget gate that is bounded from below.

        c_t = SiLU(W_i x_t),   λ_t = γ + (1 − γ) σ(W_f x_t),   g_t = SiLU(W_g x_t)
        h_t = λ_t e^{iθ} h_{t−1} + (1 − λ_t) c_t
        y_t = W_o (norm(h_t) ⊙ g_t)

    θ is learned, does not depend on the data, and starts at θ_j = 10000^(−2j/D). With complex=False there is no θ and
    all is real. γ [D] is the lower bound: a `Stack` gives each of its HGRN layers its own, growing with depth. The
    gates are computed in float32, 1 − λ as (1 − γ) σ(−W_f x): no cancellation in bfloat16.

    Shapes: x, y [B, T, dim]; state {"h": [B, D, 2] (complex, as pairs) or [B, D]}, D = expand · dim, in float32
    (float64 for float64 x); with short_conv = W also "conv_i", "conv_f": the last W − 1 inputs.
    Cost: 7 dim² (complex) or 4 dim² multiplications a token at expand = 1; the state does not grow with T.
    Memory: for the backward pass 12 dim numbers a token at expand = 1 in the activations' dtype (x, i, f, g, h, [Re h |
    Im h], norm(h) ⊙ g), real 6 dim (x, i, f, g, h, norm(h) ⊙ g): 24 or 12 KiB a token and layer in float32 at dim 512.
    With recompute=True 6 dim (x, i, f, g), real 4 dim: 12 or 8 KiB, and the states before at most 16 chunks of 1,024
    rows or more. `python benchmarks/memory.py` counts them.

    Args:
        dim: width of x and y.
        complex: complex state, as in every published result of the paper; False: the real variant.
        expand: state channels per dim.
        norm: "layer" (the paper) or "rms" (flash-linear-attention), over [Re h | Im h].
        gate_first: norm(h ⊙ g) instead of norm(h) ⊙ g, as the paper's figure has it (its code does not).
        bias: biases in all projections.
        short_conv: width of a causal depthwise convolution on the projections i and f; 0 for none.
        lower_bound: γ: None (0), a number, a tensor [D], or anything callable that returns one.
        bidirectional: a second, reversed scan with a θ of its own, summed with the first before the norm.
        recompute: the backward pass makes all but the projections again, one chunk of time after the other.
        backend: of the recurrence, not of convolutions and norms; see `kernels.hgru.hgru`.

    Source: Qin, Yang, Zhong, "Hierarchically Gated Recurrent Neural Network for Sequence Modeling", arXiv 2311.04823;
    github.com/OpenNLPLab/HGRN.
    """

    family = "element-wise linear RNN"
    source = "arXiv 2311.04823"
    ops = ("hgru",)

    def __init__(
        self,
        dim: int,
        *,
        complex: bool = True,
        expand: int = 1,
        norm: str = "layer",
        gate_first: bool = False,
        bias: bool = True,
        short_conv: int = 0,
        lower_bound: float | Tensor | Callable[[], Tensor] | None = None,
        bidirectional: bool = False,
        recompute: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        positive("hgrn", expand=expand)
        if short_conv < 0:
            raise ValueError(f"hgrn: short_conv is {short_conv}, expected a width, or 0 for none")
        if short_conv and bidirectional:
            raise ValueError("hgrn: short_conv looks back in time only; it cannot be combined with bidirectional=True")
        self.dim, self.width, self.complex = dim, dim * expand, complex
        self.causal, self.recompute, self.backend = not bidirectional, recompute, backend
        numbers = self.width * (2 if complex else 1)
        self.i_proj = nn.Linear(dim, numbers, bias=bias)
        self.f_proj = nn.Linear(dim, self.width, bias=bias)
        self.g_proj = nn.Linear(dim, numbers, bias=bias)
        self.o_proj = nn.Linear(numbers, dim, bias=bias)
        center = choice("hgrn", "norm", norm, ("layer", "rms")) == "layer"
        self.norm = GatedNorm(numbers, center=center, bias=center, gate_first=gate_first)
        if complex:
            theta = 10000.0 ** (-2 * torch.arange(self.width) / self.width)
            self.theta = nn.Parameter(theta.expand(1 if self.causal else 2, -1).clone())
        self.short_conv = short_conv
        if short_conv:
            bound = short_conv**-0.5
            self.i_conv = nn.Parameter(torch.empty(numbers, short_conv).uniform_(-bound, bound))
            self.f_conv = nn.Parameter(torch.empty(self.width, short_conv).uniform_(-bound, bound))
        self._set_lower_bound("hgrn", lower_bound, self.width)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = placed(self.f_proj, device, dtype)
        shape = (batch, self.width, 2) if self.complex else (batch, self.width)
        state = {"h": torch.zeros(shape, device=device, dtype=state_dtype(dtype))}
        if self.short_conv:
            for name, conv in (("conv_i", self.i_conv), ("conv_f", self.f_conv)):
                state[name] = torch.zeros(batch, self.short_conv - 1, conv.shape[0], device=device, dtype=dtype)
        return state

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        if x.shape[1] == 1 and (found := self._alone(x, state, cu_seqlens)) is not None:
            return found
        rows = project(x, self.i_proj, self.f_proj, self.g_proj)
        if self.recompute:
            return in_chunks(self._mix, rows, state, cu_seqlens)
        return self._mix(rows, state, cu_seqlens)

    def _alone(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any] | None:
        """A token of a sequence or few in one native call; None where modules and ops are to be asked, or to refuse."""
        plain = type(self) is HGRN and self.causal and not (self.recompute or self.short_conv)
        if not plain or not alone(x, cu_seqlens, self.backend, SOURCE) or x.shape[0] > ROWS:
            return None
        maps, norm = plain_maps(self, "i_proj", "f_proj", "g_proj", "o_proj"), self.norm
        if maps is None or type(norm) is not GatedNorm or not untouched(norm, GatedNorm) or norm.activation != "silu":
            return None
        theta = self._parameters.get("theta", False) if self.complex else None
        found = step(
            x, state["h"], maps, (norm.weight, norm.bias), theta, self._gamma(x), width=self.width, center=norm.center,
            gate_first=norm.gate_first, eps=norm.eps,
        )  # fmt: skip
        return None if found is None else (found[0], {**state, "h": found[1]})

    def _mix(self, rows: Sequence[Tensor], state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        """All that follows the projections i, f, g."""
        i, f, g = rows
        after = dict(state) if self.causal else {}
        if self.short_conv:
            i, after["conv_i"] = _convolve(i, self.i_conv, state["conv_i"], cu_seqlens)
            f, after["conv_f"] = _convolve(f, self.f_conv, state["conv_f"], cu_seqlens)
        h, after["h"] = self.recur(i, f, state["h"] if self.causal else None, 0, cu_seqlens)
        if not self.causal:
            h = h + self.recur(i, f, None, 1, cu_seqlens)[0]
        if self.complex:
            # [Re h | Im h]
            h = h.transpose(-1, -2).flatten(-2)
        (y,) = project(self.norm(h, g), self.o_proj)
        return y, after if self.causal else None

    def recur(
        self, i: Tensor, f: Tensor, h: Tensor | None, direction: int, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The hidden states of raw projections, [B, T, D] or pairs [B, T, D, 2], and the last one."""
        wide, bound = state_dtype(f.dtype), self._gamma(f)
        gamma: Tensor | None = None
        theta: Tensor | None = None
        if isinstance(bound, Tensor):
            gamma = bound
        elif bound:
            gamma = torch.full((self.width,), bound, dtype=wide, device=f.device)
        if self.complex:
            # the projection's rows are interleaved: real and imaginary part of channel j are rows 2j and 2j + 1
            i, theta = i.unflatten(-1, (self.width, 2)), self.theta[direction].to(wide)
        reverse = direction == 1
        return hgru(i, f, gamma, theta, h, reverse=reverse, cu_seqlens=cu_seqlens, backend=self.backend)

    def _gamma(self, x: Tensor) -> Tensor | float:
        """The lower bound: a number, or [D] in the state dtype beside x."""
        bound = self.lower_bound()
        return bound.to(state_dtype(x.dtype)).expand(self.width) if isinstance(bound, Tensor) else bound


def _convolve(x: Tensor, weight: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    from kernels.short_conv import short_conv

    return short_conv(x, weight.to(x.dtype), None, state.to(x.dtype), cu_seqlens=cu_seqlens)
