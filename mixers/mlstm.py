"""mLSTM: a matrix memory with exponential input gates, kept in range by a running maximum."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gla import gla
from kernels.gla.step import can_step, step
from kernels.packing import Packing
from kernels.problem import state_dtype
from kernels.scan import scan
from mixers.heads import GatedNorm, heads_for, of_each_row, previous, split
from mixers.mixer import SequenceMixer, autocasts, placed
from mixers.options import positive
from mixers.parts import cast
from mixers.projections import plain_maps, project
from mixers.registry import register


@register
class MLSTM(SequenceMixer):
    """xLSTM's matrix memory, as in xLSTM 7B.

        i_t = cap(w_i x_t + b_i),   log f_t = log σ(cap(w_f x_t + b_f)),   cap(z) = 15 tanh(z / 15),   head by head
        m_t = max(log f_t + m_{t−1}, i_t)
        C_t = exp(log f_t + m_{t−1} − m_t) C_{t−1} + exp(i_t − m_t) k_t v_tᵀ,   n_t likewise with k_t for k_t v_tᵀ
        h_t = C_tᵀ q_t / (max(|n_tᵀ q_t|, e^{−m_t}) + 1e-6),   q_t = W_q x_t / √K,   k_t = W_k x_t,   v_t = W_v x_t
        y_t = W_o (norm(h_t) ⊙ σ(W_g x_t))

    m starts at 0 and C, n at zero. norm is a layer norm of each head. The gates and m are computed in float32; m is
    part of the graph, and every exponent is at most 0 but that of e^{−m}.

    Shapes: x, y [B, T, dim]; state {"S": [B, H, K, V + 1], C with n as its last column, "m": [B, H]} in float32
    (float64 for float64 x); H K = expand_k · dim, H V = expand_v · dim.
    Cost: (2 expand_k + 3 expand_v) dim² multiplications a token and 2 H K V for the state, which does not grow with T.

    Args:
        dim: width of x and y.
        heads: H; None: one for every 256 key channels, or the next smaller number that divides both widths.
        expand_k, expand_v: key and value channels per dim.
        gate_cap: the bound of the gates' logits; None for none.
        bias: biases in all projections; those of the gates have one always.
        backend: of the recurrence; see `kernels.gla.gla`.

    Source: Beck et al., "xLSTM: Extended Long Short-Term Memory", arXiv 2405.04517, and "xLSTM 7B", arXiv 2503.13427;
    initialised as in the latter: b_i = −10, b_f from 3 to 6 over the heads.
    """

    family = "matrix-state linear RNN"
    source = "arXiv 2405.04517"
    ops = ("gla",)
    EPS = 1e-6

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_cap: float | None = 15.0,
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        positive("mlstm", expand_k=expand_k, expand_v=expand_v, gate_cap=gate_cap)
        keys, values = max(int(dim * expand_k), 1), max(int(dim * expand_v), 1)
        self.dim, self.heads, self.backend = dim, heads_for("mlstm", heads, 256, keys, values), backend
        self.key_width, self.value_width, self.gate_cap = keys // self.heads, values // self.heads, gate_cap
        self.q_proj = nn.Linear(dim, keys, bias=bias)
        self.k_proj = nn.Linear(dim, keys, bias=bias)
        self.v_proj = nn.Linear(dim, values, bias=bias)
        self.g_proj = nn.Linear(dim, values, bias=bias)
        self.i_proj = nn.Linear(dim, self.heads)
        self.f_proj = nn.Linear(dim, self.heads)
        self.norm = GatedNorm(
            self.value_width, activation="sigmoid", heads=self.heads, center=True, bias=bias, eps=1e-6
        )
        self.o_proj = nn.Linear(values, dim, bias=bias)
        nn.init.constant_(self.i_proj.bias, -10.0)
        with torch.no_grad():
            self.f_proj.bias.copy_(torch.linspace(3, 6, self.heads))

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = placed(self.q_proj, device, dtype)
        wide = state_dtype(dtype)
        S = torch.zeros(batch, self.heads, self.key_width, self.value_width + 1, device=device, dtype=wide)
        return {"S": S, "m": torch.zeros(batch, self.heads, device=device, dtype=wide)}

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        *qkv, g = project(x, self.q_proj, self.k_proj, self.v_proj, self.g_proj)
        q, k, v = (split(row, self.heads) for row in qkv)
        i, f = self._logits(x)
        if can_step(q, state["S"], cu_seqlens, self.backend, k, v, states=(i, f, state["m"])):
            gates, scale = (i, f, state["m"]), self.key_width**-0.5
            h, S, m = step(q, k, v, state["S"], scale=scale, eps=self.EPS, gates=gates, cap=self.gate_cap)
        else:
            h, S, m = self._recur(q, k, v, i, f, state, cu_seqlens)
        return project(self.norm(h, g), self.o_proj)[0], {"S": S, "m": m}

    def _recur(
        self, q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, state: Any, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h [B, T, H, V], and the last S and m; i and f are the logits of the gates."""
        if self.gate_cap is not None:
            i, f = (self.gate_cap * torch.tanh(z / self.gate_cap) for z in (i, f))
        m, log_decay, last = maxima(i, F.logsigmoid(f), state["m"], cu_seqlens)
        k = cast((i - m).exp().unsqueeze(-1) * cast(k, m.dtype), k.dtype)
        # the sum of the keys, n, is what a value of 1 would come to
        y, S = gla(
            q, k, F.pad(v, (0, 1), value=1.0), log_decay, state["S"], cu_seqlens=cu_seqlens, backend=self.backend
        )
        h, n = cast(y, m.dtype).split_with_sizes([self.value_width, 1], -1)
        # e^{-m}, short of infinity, where h is 0 anyway
        floor = (-m.clamp_min(math.log(torch.finfo(m.dtype).tiny))).exp()
        h = h / (torch.maximum(n.abs(), floor.unsqueeze(-1)) + self.EPS)
        return cast(h, v.dtype), S, last

    def _logits(self, x: Tensor) -> Sequence[Tensor]:
        """Of i and f [B, T, H], in float32 or wider under autocast too: they stand in an exponent."""
        wide, projections, kind = state_dtype(x.dtype), (self.i_proj, self.f_proj), x.device.type
        casts = autocasts(kind)
        if x.shape[1] == 1 and x.dtype == wide and not casts:
            return project(x, *projections)
        # making the context takes as long as the product of one token
        exact = torch.autocast(kind, enabled=False) if casts else contextlib.nullcontext()
        maps = plain_maps(self, "i_proj", "f_proj")
        with exact:
            if maps is None or any(bias is None for _, bias in maps):
                # somebody else's modules, or hooks: as they are, in their dtype
                return [cast(p(cast(x, placed(p, None, None)[1])), wide) for p in projections]
            weight, bias = (torch.cat(parts) for parts in zip(*maps))
            return F.linear(cast(x, wide), cast(weight, wide), cast(bias, wide)).chunk(2, -1)


def maxima(i: Tensor, log_f: Tensor, m: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The running maxima m_t and the logarithms of C's decays [B, T, H], and the last m [N, H]; `m` [N, H] is m_0."""
    if cu_seqlens is None and i.shape[1] == 1:
        # a token alone: nothing to run over
        carried = log_f + m[:, None]
        now = torch.maximum(carried, i)
        return now, carried - now, now[:, 0]
    keep = kept(i, log_f, m, cu_seqlens)
    now, last = scan(keep.to(i.dtype), torch.where(keep, log_f, i), m, cu_seqlens=cu_seqlens)
    before, _ = previous(now, m[:, None], cu_seqlens)
    # where the maximum is kept, the decay is 1: the two forms agree but for rounding
    return now, torch.where(keep, 0.0, log_f + before - now).clamp_max(0.0), last


@torch.no_grad()
def kept(i: Tensor, log_f: Tensor, m: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[B, T, H]: whether log f_t + m_{t−1} exceeds i_t, `m` [N, H] being that before the first token.

    With F the running sum of log f, m_t − F_t is the running maximum of i_s − F_s. The sum is taken in float64 where
    the device has it, for F is large where i_s − F_s is compared; m itself is computed without F, from what is kept.
    """
    exact = torch.float64 if i.device.type != "mps" else torch.float32
    i, log_f, m = (t.to(exact) for t in (i, log_f, m))
    if cu_seqlens is not None:
        # one sequence's NaN, which m has from what is kept, is not to reach the others by way of their common sums
        i, log_f, m = (torch.where(t.isfinite(), t, 0.0) for t in (i, log_f, m))
    total = log_f.cumsum(1)
    own, carried = i - total, m[:, None]
    if cu_seqlens is not None:
        packing = Packing.of(i, cu_seqlens, False)
        assert packing.owner is not None
        carried = of_each_row("mlstm", m - packing.at_first_rows(total - log_f), i, cu_seqlens)
        # raises every sequence above those before it, so that their maximum ends there
        both = torch.stack([own, carried])
        lift = Packing.spread(packing.owner, own) * (both.amax() - both.amin() + 1)
        own, carried = own + lift, carried + lift
    return torch.maximum(own.cummax(1).values, carried) > own
