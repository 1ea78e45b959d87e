"""DeltaNet: linear attention whose matrix state replaces what it holds for a key."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.delta_rule import delta_rule
from kernels.problem import state_dtype
from kernels.short_conv import short_conv
from mixers.heads import GatedNorm, heads_for, split
from mixers.mixer import SequenceMixer
from mixers.parts import cast
from mixers.registry import register


@register
class DeltaNet(SequenceMixer):
    """Delta rule: before a value is written for a key, what the state holds for that key is taken away.

        q_t = unit(φ_q(W_q x)_t),   k_t = unit(φ_k(W_k x)_t),   v_t = φ_v(W_v x)_t,   β_t = σ(W_β x_t)
        S_t = S_{t−1} + β_t k_t (v_t − S_{t−1}ᵀ k_t)ᵀ,   o_t = S_tᵀ q_t / √K,   head by head
        y_t = W_o rms(o_t)    (with a gate: W_o (rms(o_t) ⊙ SiLU(W_g x_t)))

    φ is a short causal convolution, then SiLU; unit(u) = u / √(|u|² + 10^-6) in each head, in float32, as is β.

    Shapes: x, y [B, T, dim]; state {"S": [B, H, K, V] in float32 (float64 for float64 x), "conv": [B, short_conv − 1,
    H (2 K + V)], the last projections, in the dtype they are computed in}, H K = expand_k · dim, H V = expand_v · dim.
    Cost: (2 expand_k + 2 expand_v) dim² multiplications a token (3 expand_v with a gate) and 3 H K V for the state,
    which does not grow with T.

    Args:
        dim: width of x and y.
        heads: H; None: one for every 128 key channels, or the next smaller number that divides both widths.
        expand_k, expand_v: key and value channels per dim.
        short_conv: width of the convolutions; 0 for none, φ is SiLU then.
        conv_bias: biases in the convolutions.
        gate: a gate on the output.
        negative_eigenvalues: β in (0, 2) instead of (0, 1): the state may flip along a key, which tracks parities.
        backend: of the delta rule; see `kernels.delta_rule.delta_rule`.

    Source: Yang et al., "Parallelizing linear transformers with the delta rule over sequence length", arXiv 2406.06484;
    negative eigenvalues: Grazzi et al., arXiv 2411.12537.
    """

    family = "matrix-state linear RNN"
    source = "arXiv 2406.06484"
    ops = ("delta_rule",)

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        short_conv: int = 4,
        conv_bias: bool = False,
        gate: bool = False,
        negative_eigenvalues: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        keys, values = max(int(dim * expand_k), 1), max(int(dim * expand_v), 1)
        self.dim, self.heads, self.backend = dim, heads_for("deltanet", heads, 128, keys, values), backend
        self.key_width, self.value_width = keys // self.heads, values // self.heads
        self.largest_beta = 2.0 if negative_eigenvalues else 1.0
        self.qkv = ConvolvedQKV("deltanet", dim, self.heads, keys, values, short_conv=short_conv, conv_bias=conv_bias)
        self.beta_proj = nn.Linear(dim, self.heads, bias=False)
        self.g_proj = nn.Linear(dim, values, bias=False) if gate else None
        self.norm = GatedNorm(self.value_width)
        self.o_proj = nn.Linear(values, dim, bias=False)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        weight = self.o_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        shape = batch, self.heads, self.key_width, self.value_width
        S = torch.zeros(shape, device=device, dtype=state_dtype(dtype))
        return {"S": S, **self.qkv.init_state(batch, device, dtype)}

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        q, k, v, after = self.qkv(x, state, cu_seqlens)
        beta = rates(self.beta_proj(x), self.largest_beta)
        y, S = delta_rule(q, k, v, beta, None, state["S"], cu_seqlens=cu_seqlens, backend=self.backend)
        y = self.norm(y, None if self.g_proj is None else self.g_proj(x))
        return self.o_proj(y), {"S": S, **after}


class ConvolvedQKV(nn.Module):
    """Queries, keys and values of the delta rules: projected, convolved over a few tokens, SiLU, q and k of length 1.

    One projection and one convolution for the three: channels of all queries, then of all keys, then of all values.
    With value_heads a multiple of heads, each query and key head serves value_heads / heads value heads in a row.
    """

    def __init__(
        self,
        who: str,
        dim: int,
        heads: int,
        keys: int,
        values: int,
        *,
        short_conv: int,
        conv_bias: bool,
        value_heads: int | None = None,
    ) -> None:
        super().__init__()
        if short_conv < 0:
            raise ValueError(f"{who}: short_conv is {short_conv}, expected a width, or 0 for none")
        if conv_bias and not short_conv:
            raise ValueError(f"{who}: conv_bias is True, but short_conv = 0 leaves no convolution to have it")
        self.widths = [keys, keys, values]
        self.heads, self.value_heads, self.short_conv = heads, value_heads or heads, short_conv
        channels = sum(self.widths)
        self.proj = nn.Linear(dim, channels, bias=False)
        bound = max(short_conv, 1) ** -0.5
        weight = torch.empty(channels, short_conv).uniform_(-bound, bound) if short_conv else None
        self.conv_weight = None if weight is None else nn.Parameter(weight)
        self.conv_bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if conv_bias else None

    def init_state(self, batch: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        if self.conv_weight is None:
            return {}
        shape = batch, self.short_conv - 1, self.conv_weight.shape[0]
        return {"conv": torch.zeros(shape, device=device, dtype=dtype)}

    def forward(
        self, x: Tensor, state: dict[str, Tensor], cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """q, k [B, T, value_heads, K], v [B, T, value_heads, V], and the state of the convolution."""
        qkv, after = self.proj(x), {}
        if self.conv_weight is None:
            qkv = F.silu(qkv)
        else:
            before = cast(state["conv"], qkv.dtype)
            qkv, after["conv"] = short_conv(
                qkv, self.conv_weight, self.conv_bias, before, activation="silu", cu_seqlens=cu_seqlens
            )
        keys, _, values = self.widths
        qk, v = qkv.split_with_sizes([2 * keys, values], -1)
        q, k = unit(split(qk, 2 * self.heads)).chunk(2, 2)
        return self._serve(q), self._serve(k), split(v, self.value_heads), after

    def _serve(self, x: Tensor) -> Tensor:
        times = self.value_heads // self.heads
        return x if times == 1 else x.repeat_interleave(times, dim=2)


def rates(logits: Tensor, largest: float) -> Tensor:
    """largest σ(logits), in the state dtype."""
    share = torch.sigmoid(cast(logits, state_dtype(logits.dtype)))
    return share if largest == 1 else largest * share


def unit(x: Tensor) -> Tensor:
    """x / √(|x|² + 10^-6) over the last axis, computed in the state dtype, in x's dtype."""
    wide = cast(x, state_dtype(x.dtype))
    return cast(wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6), x.dtype)
