"""S4D: a diagonal state-space model, the same at every token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from kernels.problem import state_dtype
from kernels.scan import scan
from mixers.mixer import SequenceMixer
from mixers.parts import ACTIVATIONS, choice
from mixers.registry import register

# Rows of a chunk: a matrix of so many by so many for each channel
CHUNK = 32


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
    float64 x). Sequences of 32 rows and more go by chunks of 32: each is convolved with the filter's kernel, and a scan
    over dim · states / 2 complex channels carries the states from one to the next. The rows that are left, shorter
    sequences and packed ones go by the recurrence, a scan over as many channels at every token.
    Cost: dim (32 + 2 states) + 2 dim² multiplications a token (dim² without the GLU); by the recurrence 4 dim · states
    in the place of the first.

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
        # by convolution as many chunks as there are, what is left by recurrence; an exported program has one path for
        # all lengths
        stepwise = cu_seqlens is not None or torch.compiler.is_exporting()
        whole, h, parts = 0 if stepwise else x.shape[1] // CHUNK * CHUNK, state["h"], []
        if whole:
            part, h = self.convolve(x[:, :whole], h)
            parts.append(part)
        if whole < x.shape[1] or not parts:
            part, h = self.recur(x[:, whole:], h, cu_seqlens)
            parts.append(part)
        s = torch.cat(parts, 1) if parts[1:] else parts[0]
        y = ACTIVATIONS[self.activation](s + self.D.to(s.dtype) * x).to(x.dtype)
        y = self.out_proj(y)
        return nn.functional.glu(y, -1) if self.glu else y, {"h": h}

    def recur(self, x: Tensor, h: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """2 Re(Σ_n C_n h_{t,n}) [B, T, dim], and the state after the last token: step by step."""
        decay, B = self.discretised(h.dtype)
        # [B, T, dim, states / 2, 2]
        inputs = (B * x[..., None, None]).to(x.dtype)
        decays = decay.expand(inputs.shape).flatten(2, 3)
        rows, final = scan(decays, inputs.flatten(2, 3), h.flatten(1, 2), cu_seqlens=cu_seqlens, backend=self.backend)
        # Re(C h) = Re C Re h − Im C Im h
        C = 2 * self.C.to(h.dtype) * torch.tensor([1.0, -1.0], device=x.device, dtype=h.dtype)
        s = torch.einsum("btdnp,dnp->btd", rows.unflatten(2, (self.dim, self.modes)).to(h.dtype), C)
        return s, final.unflatten(1, (self.dim, self.modes))

    def convolve(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """The same for whole chunks of time: a convolution within each, a recurrence over their states.

        With t and r the rows of a chunk, K_t = 2 Re(Σ_n C_n B̄_n Ā_n^t) and g the state that enters it,
        s_t = Σ_{r≤t} K_{t−r} u_r + 2 Re(Σ_n C_n Ā_n^{t+1} g_n), and Ā^CHUNK g + Σ_r Ā^{CHUNK−1−r} B̄ u_r leaves it.
        """
        B, C = self.discretised(h.dtype)[1].unbind(-1), (2 * self.C.to(h.dtype)).unbind(-1)
        powers = self.powers(h.dtype)
        # [dim, states / 2, CHUNK], real and imaginary part: B̄ Ā^t, C Ā^{t+1}
        response = product(B, [part[..., :-1] for part in powers])
        reading = product(C, [part[..., 1:] for part in powers])
        K = (C[0][..., None] * response[0] - C[1][..., None] * response[1]).sum(1)
        # [dim, t, r]: K_{t−r}
        kernel = nn.functional.pad(K, (CHUNK - 1, 0)).unfold(-1, CHUNK, 1).flip(-1)
        summary = torch.stack(response, 2).flatten(1, 2).flip(-1)
        # a channel's filter is a matrix
        u = rearrange(x.to(h.dtype), "b (n c) d -> d c (b n)", c=CHUNK).contiguous()
        within, added = torch.bmm(torch.cat((kernel, summary), 1), u).split((CHUNK, 2 * self.modes), 1)
        added = rearrange(added, "d (m p) (b n) -> b n (d m) p", b=x.shape[0], p=2)
        decay = torch.stack([part[..., -1] for part in powers], -1).flatten(0, 1)
        rows, final = scan(decay.expand(added.shape), added, h.flatten(1, 2), backend=self.backend)
        entering = torch.cat((h.flatten(1, 2)[:, None], rows[:, :-1]), 1)
        entering = rearrange(entering, "b n (d m) p -> d (m p) (b n)", d=self.dim)
        read = torch.stack((reading[0], -reading[1]), 2).flatten(1, 2)
        s = torch.baddbmm(within, read.transpose(1, 2), entering)
        return rearrange(s, "d c (b n) -> b (n c) d", b=x.shape[0]), final.unflatten(1, (self.dim, self.modes))

    def powers(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Ā^t [dim, states / 2, CHUNK + 1], t = 0 … CHUNK: real and imaginary part."""
        times = torch.arange(CHUNK + 1, device=self.log_dt.device, dtype=dtype)
        dt = self.log_dt.to(dtype).exp()[:, None]
        size = ((-dt * self.A_log.to(dtype).exp())[..., None] * times).exp()
        angle = (dt * self.A_imag.to(dtype))[..., None] * times
        return size * angle.cos(), size * angle.sin()

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


def product(a: Sequence[Tensor], b: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of a b, with a [...] the same for the last axis of b [..., t]."""
    ar, ai = (part[..., None] for part in a)
    return ar * b[0] - ai * b[1], ar * b[1] + ai * b[0]
