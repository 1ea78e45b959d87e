"""LRU: the linear recurrent unit, a diagonal linear RNN with complex eigenvalues on a ring."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kernels.problem import state_dtype
from kernels.scan import scan
from mixers.mixer import SequenceMixer
from mixers.options import positive
from mixers.projections import project
from mixers.registry import register


@register
class LRU(SequenceMixer):
    """Linear recurrent unit: a complex diagonal recurrence that does not depend on the data.

        λ = exp(−e^ν + i e^θ),   h_t = λ ⊙ h_{t−1} + e^γ ⊙ (B x_t),   y_t = Re(C h_t) + D ⊙ x_t

    ν, θ, γ and D are learned per channel; |λ| < 1 whatever ν is. At the start λ is uniform on the ring
    r_min ≤ |λ| ≤ r_max (by area) with phases in [0, max_phase], γ = log √(1 − |λ|²) keeps h at the size of its input,
    B and C are normal with variances 1/(2 dim) and 1/states for each real and imaginary part, D is standard normal.

    Complex numbers are real pairs: B's rows are the real parts, then the imaginary parts, and C's columns are Re C,
    then −Im C, so that Re(C h) is one real product. The layer is the bare unit: norm, activation and channel mixer
    around it belong to the block.

    Shapes: x, y [B, T, dim]; state {"h": [B, states, 2]} (real and imaginary part) in float32 (float64 for float64 x).
    Cost: 4 dim · states multiplications a token.

    Args:
        dim: width of x and y.
        states: complex state channels; None: dim.
        r_min, r_max: the ring in which eigenvalues start; r_max near 1 remembers longer.
        max_phase: the largest phase at the start; small ones favour slow oscillations.
        backend: of the scan; see `kernels.scan.scan`.

    Source: Orvieto et al., "Resurrecting recurrent neural networks for long sequences", arXiv 2303.06349.
    """

    family = "element-wise linear RNN"
    source = "arXiv 2303.06349"
    ops = ("scan",)

    def __init__(
        self,
        dim: int,
        *,
        states: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 2 * math.pi,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        positive("lru", states=states, max_phase=max_phase)
        if not 0 <= r_min < r_max <= 1:
            raise ValueError(f"lru: r_min is {r_min} and r_max is {r_max}, expected 0 <= r_min < r_max <= 1")
        self.dim, self.states, self.backend = dim, dim if states is None else states, backend
        self.in_proj = nn.Linear(dim, 2 * self.states, bias=False)
        self.out_proj = nn.Linear(2 * self.states, dim, bias=False)
        nn.init.normal_(self.in_proj.weight, std=(2 * dim) ** -0.5)
        nn.init.normal_(self.out_proj.weight, std=self.states**-0.5)
        self.D = nn.Parameter(torch.randn(dim))
        # away from 0, whose logarithm has no end
        share, phase = torch.rand(2, self.states).clamp_min(1e-6)
        squared = r_min**2 + share * (r_max**2 - r_min**2)
        self.nu = nn.Parameter((-0.5 * squared.log()).clamp_min(1e-6).log())
        self.theta = nn.Parameter((max_phase * phase).log())
        self.gamma = nn.Parameter(0.5 * torch.log(-torch.expm1(-2 * self.nu.detach().exp())))

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = device or self.nu.device, dtype or self.nu.dtype
        return {"h": torch.zeros(batch, self.states, 2, device=device, dtype=state_dtype(dtype))}

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        (inputs,) = project(x, self.in_proj)
        inputs = inputs.unflatten(-1, (2, self.states)).transpose(-1, -2)
        wide = state_dtype(inputs.dtype)
        inputs = (self.gamma.to(wide).exp()[:, None] * inputs).to(inputs.dtype)
        decay = self.eigenvalues(wide).expand(inputs.shape)
        h, final = scan(decay, inputs, state["h"], cu_seqlens=cu_seqlens, backend=self.backend)
        (y,) = project(h.transpose(-1, -2).flatten(-2), self.out_proj)
        return y + (self.D * x).to(y.dtype), {"h": final}

    def eigenvalues(self, dtype: torch.dtype) -> Tensor:
        """λ [states, 2]: real and imaginary part."""
        size, phase = torch.exp(-self.nu.to(dtype).exp()), self.theta.to(dtype).exp()
        return torch.stack((size * phase.cos(), size * phase.sin()), -1)
