"""S4D: a diagonal state-space model, the same at every token."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kernels.problem import state_dtype
from kernels.scan import scan
from mixers.mixer import SequenceMixer
from mixers.parts import ACTIVATIONS, choice
from mixers.registry import register


@register
class S4D(SequenceMixer):
    """Diagonal state-space model: each channel filters its input through N/2 complex modes and their conjugates.

        Ā = exp(Δ A),   B̄ = (Ā − 1) / A      (zero-order hold; B is 1, learned within C)
        h_t = Ā h_{t−1} + B̄ u_t,   s_t = 2 Re(Σ_n C_n h_{t,n}) + D u_t,   y_t = GLU(W act(s_t))

    for each channel of u = x, with A = −e^a + i ω of N/2 modes, C of as many complex numbers, a step size Δ > 0 and D.
    At the start Re A = −½, Im A_n = π n ("lin": S4D-Lin) or (N/π)(N/(2n + 1) − 1) ("inv": S4D-Inv); log Δ is uniform
    between log dt_min and log dt_max; C and D are standard normal. Δ, A and B̄ are computed in float32, Ā − 1 without
    cancellation.

    Shapes: x, y [B, T, dim]; state {"h": [B, dim, states / 2, 2]} (real and imaginary part) in float32 (float64 for
    float64 x). The scan runs over dim · states / 2 complex channels at every token.
    Cost: 4 dim · states + 2 dim² multiplications a token (dim² without the GLU).

    Args:
        dim: width of x and y.
        states: N, counting conjugates; even.
        init: "lin" or "inv", of Im A.
        dt_min, dt_max: the range of step sizes at the start.
        activation: after the filter; see `mixers.parts.ACTIVATIONS`.
        glu: the output is W₁ z ⊙ σ(W₂ z); False: W z.
        backend: of the scan; see `kernels.scan.scan`.

    Source: Gu et al., "On the parameterization and initialization of diagonal state space models", arXiv 2206.11893.
    """

    family = "state-space model"
    source = "arXiv 2206.11893"
    ops = ("scan",)

    def __init__(
        self,
        dim: int,
        *,
        states: int = 64,
        init: str = "lin",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        activation: str = "gelu",
        glu: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if states < 2 or states % 2:
            raise ValueError(f"s4d: states is {states}, expected an even number, for conjugate pairs")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"s4d: dt_min is {dt_min} and dt_max is {dt_max}, expected 0 < dt_min <= dt_max")
        choice("s4d", "init", init, ("lin", "inv"))
        self.activation = choice("s4d", "activation", activation, ACTIVATIONS)
        self.dim, self.modes, self.glu, self.backend = dim, states // 2, glu, backend
        n = torch.arange(self.modes, dtype=torch.float32)
        frequency = math.pi * n if init == "lin" else states / math.pi * (states / (2 * n + 1) - 1)
        self.A_imag = nn.Parameter(frequency.repeat(dim, 1))
        self.A_log = nn.Parameter(torch.full((dim, self.modes), math.log(0.5)))
        # real and imaginary part, of variance ½ each
        self.C = nn.Parameter(math.sqrt(0.5) * torch.randn(dim, self.modes, 2))
        self.D = nn.Parameter(torch.randn(dim))
        self.log_dt = nn.Parameter(torch.empty(dim).uniform_(math.log(dt_min), math.log(dt_max)))
        self.out_proj = nn.Linear(dim, 2 * dim if glu else dim)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = device or self.D.device, dtype or self.D.dtype
        return {"h": torch.zeros(batch, self.dim, self.modes, 2, device=device, dtype=state_dtype(dtype))}

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        wide = state_dtype(x.dtype)
        decay, B = self.discretised(wide)
        # [B, T, dim, states / 2, 2]
        inputs = (B * x[..., None, None]).to(x.dtype)
        h, final = scan(
            decay.expand(inputs.shape).flatten(2, 3),
            inputs.flatten(2, 3),
            state["h"].flatten(1, 2),
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        # Re(C h) = Re C Re h − Im C Im h
        C = 2 * self.C.to(wide) * torch.tensor([1.0, -1.0], device=x.device, dtype=wide)
        y = torch.einsum("btdnp,dnp->btd", h.unflatten(2, (self.dim, self.modes)).to(wide), C)
        y = ACTIVATIONS[self.activation](y + self.D.to(wide) * x).to(x.dtype)
        y = self.out_proj(y)
        return nn.functional.glu(y, -1) if self.glu else y, {"h": final.unflatten(1, (self.dim, self.modes))}

    def discretised(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Ā, B̄ [dim, states / 2, 2]: real and imaginary part."""
        real, imaginary = -self.A_log.to(dtype).exp(), self.A_imag.to(dtype)
        dt = self.log_dt.to(dtype).exp()[:, None]
        size, angle = (dt * real).exp(), dt * imaginary
        # exp(r + iφ) − 1 = expm1(r) cos φ − 2 sin²(φ/2) + i e^r sin φ
        above = torch.expm1(dt * real) * angle.cos() - 2 * (angle / 2).sin().square()
        across = size * angle.sin()
        square = real.square() + imaginary.square()
        B = torch.stack((above * real + across * imaginary, across * real - above * imaginary), -1) / square[..., None]
        return torch.stack((size * angle.cos(), across), -1), B
