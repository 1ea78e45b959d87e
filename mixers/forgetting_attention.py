"""Forgetting attention (FoX): softmax attention whose scores fall with what a forget gate has let go of since."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import attention
from kernels.problem import state_dtype
from mixers.attention import Attention
from mixers.heads import GatedNorm, split
from mixers.parts import cast
from mixers.projections import project
from mixers.registry import register


@register
class ForgettingAttention(Attention):
    """Causal softmax attention with a forget gate for every head in place of positions.

        q_t = W_q x_t,   k_t = W_k x_t,   v_t = W_v x_t,   log f_t = log σ(w_f · x_t + b_f)
        o_t = sum_s softmax_s(q_t · k_s / √K + log f_{s+1} + ... + log f_t) v_s  over s <= t (and s > t − window)
        y_t = W_o o_t,   head by head

    With f = 1 it is attention without positions, and one f for all tokens is ALiBi. log f is computed in float32, and
    its sums so that they lose no digits over any length.

    Shapes: x, y [B, T, dim]; state as of `mixers.attention.Attention`, and "log_decays": [B, S, heads] in float32
    (float64 for float64 x).
    Cost: that of attention and dim · heads multiplications a token. Keys that every head of a block of queries has
    forgotten are left out on CPU.

    Args:
        dim: width of x and y.
        heads, kv_heads, head_dim, window, bias: as of `mixers.attention.Attention`.
        rotary: rotary position embedding as well; the gates are all that the paper needs.
        rotary_base: the slowest rotary frequency is nearly 1 / rotary_base.
        qk_norm: q and k of each head are divided by their root mean square, with weights of their own.
        output_norm: o is, too.
        output_gate: y_t = W_o (o_t ⊙ σ(W_g x_t)). These three are on in the paper's "Pro" blocks, which also shift keys
            and values by a token; a short convolution in front of the layer does that.
        backend: see `kernels.attention.attention`.

    Source: Lin et al., "Forgetting transformer: softmax attention with a forget gate", arXiv 2503.02130. b_f starts
    at 0.
    """

    family = "softmax attention"
    source = "arXiv 2503.02130"
    ops = ("attention",)
    cached = ("keys", "values", "log_decays")

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary: bool = False,
        rotary_base: float = 10000.0,
        window: int | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        output_norm: bool = False,
        output_gate: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__(
            dim, heads=heads, kv_heads=kv_heads, head_dim=head_dim, rotary=rotary, rotary_base=rotary_base,
            window=window, bias=bias, backend=backend,
        )  # fmt: skip
        self.f_proj = nn.Linear(dim, self.heads)
        nn.init.zeros_(self.f_proj.bias)
        self.q_norm = GatedNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.k_norm = GatedNorm(self.head_dim, eps=1e-6) if qk_norm else None
        self.o_norm = GatedNorm(self.head_dim, activation="sigmoid") if output_norm else None
        self.g_proj = nn.Linear(dim, self.heads * self.head_dim, bias=bias) if output_gate else None

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        state = super().init_state(batch, device=device, dtype=dtype)
        keys, values, length = state["keys"], state["values"], state["length"]
        log_decays = keys.new_zeros(batch, 0, self.heads, dtype=state_dtype(keys.dtype))
        return {"keys": keys, "values": values, "log_decays": log_decays, "length": length}

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        *projected, f = project(x, *self.projections(), self.f_proj)
        q, k, v = self.split(projected)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = split(self.q_norm(q), self.heads), split(self.k_norm(k), self.kv_heads)
        return q, k, v, F.logsigmoid(cast(f, state_dtype(v.dtype)))

    def attend(self, q: Tensor, rows: Sequence[Tensor], starts: Tensor | None = None, **options: Any) -> Tensor:
        k, v, log_decay = rows
        given = {"log_decay": log_decay, "window": self.window, "backend": self.backend, **options}
        return attention(q, k, v, starts, **given)

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        (gate,) = project(x, self.g_proj)
        if self.o_norm is not None:
            y = split(self.o_norm(y, gate), self.heads)
        elif gate is not None:
            y = y * split(torch.sigmoid(gate), self.heads)
        return super().finish(y, x)

    def state_size(self, length: int = 1) -> int:
        rows = length if self.window is None else min(length, self.window - 1)
        return super().state_size(length) + rows * self.heads
