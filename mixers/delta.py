"""What the mixers with a delta rule share: queries, keys and values of a convolution, rates, decays, and one step."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.delta_rule import delta_rule
from kernels.delta_rule.step import SOURCE, step
from kernels.gated_norm import gated_norm
from kernels.lone import alone, readable
from kernels.problem import state_dtype
from kernels.short_conv import short_conv
from mixers.heads import GatedNorm, split
from mixers.mixer import SequenceMixer, placed
from mixers.parts import cast
from mixers.projections import project, untouched


class DeltaMixer(SequenceMixer):
    """A mixer with a delta rule, from its projections to its gated norm.

    A subclass makes the modules and parameters named here.
    """

    backend: str
    key_width: int
    value_width: int
    largest_beta: float
    qkv: ConvolvedQKV
    beta_proj: nn.Module
    # these three are None where nothing decays
    decay_proj: nn.Module | None
    A_log: Tensor | None
    dt_bias: Tensor | None
    # None: no gate
    g_proj: nn.Module | None
    norm: GatedNorm
    o_proj: nn.Linear

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = placed(self.o_proj, device, dtype)
        shape = batch, self.qkv.value_heads, self.key_width, self.value_width
        S = torch.zeros(shape, device=device, dtype=state_dtype(dtype))
        return {"S": S, **self.qkv.init_state(batch, device, dtype)}

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        maps = self.beta_proj, self.decay_proj, self.g_proj
        if (kept := self._alone(x, state, cu_seqlens)) is not None:
            qkv, beta, decay, gate = project(x, self.qkv.proj, *maps)
            y, S, conv = step(
                qkv, beta, decay, gate, *kept, heads=self.qkv.heads, largest_beta=self.largest_beta,
                sigmoid=self.norm.activation == "sigmoid", eps=self.norm.eps,
            )  # fmt: skip
            after = {} if conv is None else {"conv": conv}
        else:
            beta, decay, gate = project(x, *maps)
            q, k, v, after = self.qkv(x, state, cu_seqlens)
            beta, log_decay = rates(beta, self.largest_beta), None
            if self.A_log is not None and self.dt_bias is not None:
                log_decay = log_decays(decay, self.A_log, self.dt_bias)
            y, S = delta_rule(q, k, v, beta, log_decay, state["S"], cu_seqlens=cu_seqlens, backend=self.backend)
            y = self.norm(y, gate)
        return project(y, self.o_proj)[0], {"S": S, **after}

    def _alone(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Any, ...] | None:
        """What `step` reads beside the projections, if it may take the place of the modules and ops."""
        qkv, norm = self.qkv, self.norm
        if not alone(x, cu_seqlens, self.backend, SOURCE) or not untouched(qkv, ConvolvedQKV):
            return None
        others = state.get("conv"), qkv.conv_weight, qkv.conv_bias, self.A_log, self.dt_bias, norm.weight
        if not untouched(norm, GatedNorm) or not readable(x, others, (state["S"],)):
            return None
        return state["S"], *others


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
        q, k = unit(split(qk, 2 * self.heads)).split_with_sizes([self.heads, self.heads], 2)
        if self.value_heads > self.heads:
            q, k = (rows.repeat_interleave(self.value_heads // self.heads, 2) for rows in (q, k))
        return q, k, split(v, self.value_heads), after


def rates(logits: Tensor, largest: float) -> Tensor:
    """largest σ(logits), in the state dtype."""
    share = torch.sigmoid(cast(logits, state_dtype(logits.dtype)))
    return share if largest == 1 else largest * share


def unit(x: Tensor) -> Tensor:
    """x / √(|x|² + 10^-6) over the last axis of [B, T, H, K], computed in the state dtype, in x's dtype."""
    heads, width = x.shape[2:]
    # x / rms(x), whose length is √K
    weight = x.new_full((heads, width), width**-0.5, dtype=state_dtype(x.dtype))
    return gated_norm(x, weight=weight, eps=1e-6 / width)


def decay_parameters(heads: int, channels: int, *, smallest: float) -> tuple[nn.Parameter, nn.Parameter]:
    """A_log [heads], A uniform in [smallest, 16], and b [channels], softplus(b) log-uniform in [0.001, 0.1]."""
    # A = 0 would have no logarithm
    A = torch.empty(heads).uniform_(smallest, 16).clamp_min(1e-4)
    dt = torch.empty(channels).uniform_(math.log(0.001), math.log(0.1)).exp()
    return nn.Parameter(A.log()), nn.Parameter(dt + torch.log(-torch.expm1(-dt)))


def log_decays(x: Tensor, A_log: Tensor, bias: Tensor) -> Tensor:
    """−exp(A_log) softplus(x + bias) in the state dtype: [B, T, heads], or with heads · K biases [B, T, heads, K]."""
    wide = state_dtype(x.dtype)
    A, times = cast(A_log, wide).exp(), F.softplus(cast(x, wide) + cast(bias, wide))
    return -A * times if A.shape == bias.shape else -A.unsqueeze(-1) * split(times, A.shape[0])
