"""Softmax attention with a key-value cache: the yardstick."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernels.attention import attention
from kernels.attention.cache import align, append, recent
from kernels.attention.step import can_step, step
from kernels.problem import state_dtype
from mixers.heads import of_each_row, split
from mixers.mixer import SequenceMixer, autocasts, placed
from mixers.options import positive
from mixers.parts import kept_frequencies, rotate
from mixers.projections import project
from mixers.registry import register


@register
class Attention(SequenceMixer):
    """Causal softmax attention with grouped key/value heads, rotary positions and a sliding window.

        q_t = R_t W_q x_t,   k_t = R_t W_k x_t,   v_t = W_v x_t
        y_t = W_o [ sum_s softmax_s(q_t · k_s / √K) v_s ]  over s <= t (and s > t − window), head by head

    R_t rotates by t times the rotary frequencies, t counted from the sequence's first token on, also through a state.

    Shapes: x, y [B, T, dim]; state {"keys", "values": [B, S, kv_heads, head_dim] in the dtype they are computed in,
    "length": int64 [B], the tokens seen}, S = T, or the last window − 1. It grows with every token; an older state
    stays what it was. After cu_seqlens there is also "start": int64 [N], the first row of each sequence's keys, and
    straight after the packed prompts "end": the rows of all sequences are then held once and seen N times, so cloning
    such a state takes N times its memory, which using it does not.
    Cost: (2 heads + 2 kv_heads) head_dim · dim multiplications a token, and 2 heads · head_dim for every token it sees.

    Args:
        dim: width of x and y.
        heads: query heads; None: dim / 64, or the next smaller number that divides dim.
        kv_heads: key and value heads, each for heads / kv_heads query heads; None: as many as heads.
        head_dim: width of a head; None: dim / heads.
        rotary: rotary position embedding, computed in float32; False: no positions.
        rotary_base: the slowest rotary frequency is nearly 1 / rotary_base.
        window: how many tokens a token sees, itself included; None: all before it.
        bias: biases in all projections.
        bidirectional: every token sees those after it too (with a window, the window − 1 nearest on either side).
        backend: see `kernels.attention.attention`.

    Source: Vaswani et al., arXiv 1706.03762; rotary: Su et al., arXiv 2104.09864; grouped heads: Ainslie et al.,
    arXiv 2305.13245.
    """

    family = "softmax attention"
    source = "arXiv 1706.03762"
    ops = ("attention",)
    state_may_have = frozenset({"start", "end"})
    # what is kept of every token
    cached: tuple[str, ...] = ("keys", "values")

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        rotary: bool = True,
        rotary_base: float = 10000.0,
        window: int | None = None,
        bias: bool = False,
        bidirectional: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        positive("attention", head_dim=head_dim, rotary_base=rotary_base)
        if heads is None:
            heads = next(n for n in range(max(dim // 64, 1), 0, -1) if dim % n == 0)
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or (head_dim is None and dim % heads):
            raise ValueError(f"attention: dim {dim} is no multiple of heads {heads}; give head_dim too, or other heads")
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"attention: heads {heads} is no multiple of kv_heads {kv_heads}")
        if window is not None and window < 1:
            raise ValueError(f"attention: window is {window}, expected at least 1, or None for no window")
        self.dim, self.heads, self.kv_heads = dim, heads, kv_heads
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.rotary, self.rotary_base, self.window = rotary, rotary_base, window
        self.causal, self.backend = not bidirectional, backend
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, dim, bias=bias)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = placed(self.k_proj, device, dtype)
        if autocasts(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        empty = torch.zeros(batch, 0, self.kv_heads, self.head_dim, device=device, dtype=dtype)
        return {"keys": empty, "values": empty.clone(), "length": torch.zeros(batch, dtype=torch.int64, device=device)}

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        q, *rows = self.project(x)
        y, state = self.mix_heads(q, rows, state, cu_seqlens)
        return self.finish(y, x), state

    def mix_heads(self, q: Tensor, rows: Sequence[Tensor], state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        """What the heads make of their projections, y [B, T, H, V], and the state after it."""
        if state is not None and (found := self._token(q, rows, state, cu_seqlens)) is not None:
            return found
        k, *others = rows
        if self.rotary:
            length = q.new_zeros(1, dtype=torch.int64) if state is None else state["length"]
            positions = _positions(q, length, cu_seqlens)
            q, k = rotate(q, k, positions, self.rotary_base)
        rows = [k, *others]
        if state is None:
            return self.attend(q, rows, causal=False, cu_seqlens=cu_seqlens), None
        if cu_seqlens is None:
            return self._continue(q, rows, state)
        return self._continue_packed(q, rows, state, cu_seqlens)

    def _token(
        self, q: Tensor, rows: Sequence[Tensor], state: dict[str, Tensor], cu_seqlens: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """A token of each sequence in one call; None where it has to go by way of the op."""
        cached, start, length = [state[name] for name in self.cached], state.get("start"), state["length"]
        # a window of one keeps nothing
        if "end" in state or self.window == 1:
            return None
        if not can_step(q, rows, cached, length, start, cu_seqlens, self.backend):
            return None
        frequency = None
        if self.rotary:
            wide = state_dtype(q.dtype)
            frequency = kept_frequencies(q.shape[-1] // 2, self.rotary_base, device=q.device, dtype=wide)
        y, after = step(q, rows, cached, length, start, window=self.window, frequency=frequency)
        return y, self._named(after, length + 1, start, cached[0].shape[1] + 1)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """q [B, T, H, K], and the rows [B, T, ...] that are cached, in the order of `cached`."""
        return self.split(project(x, *self.projections()))

    def projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.q_proj, self.k_proj, self.v_proj

    def split(self, projected: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What `projections` make of x, in heads."""
        q, k, v = projected
        return split(q, self.heads), split(k, self.kv_heads), split(v, self.kv_heads)

    def attend(self, q: Tensor, rows: Sequence[Tensor], starts: Tensor | None = None, **options: Any) -> Tensor:
        """y [B, T, H, V] of queries and all the rows that were cached for them."""
        k, v = rows
        return attention(q, k, v, starts, window=self.window, backend=self.backend, **options)

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output, from what its heads have made of x."""
        return project(y.flatten(-2), self.o_proj)[0]

    def _continue(
        self, q: Tensor, rows: Sequence[Tensor], state: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """A batch of sequences: their new rows go behind the old ones, which end in the same row."""
        old, start = tuple(state[name] for name in self.cached), state.get("start")
        if start is not None and "end" in state:
            old, start = align(old, start, state["end"])
        rows = [append(before, new) for before, new in zip(old, rows)]
        return self.attend(q, rows, start), self._state(rows, state["length"] + q.shape[1], start)

    def _continue_packed(
        self, q: Tensor, rows: Sequence[Tensor], state: dict[str, Tensor], cu_seqlens: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        length = state["length"] + cu_seqlens.diff()
        old = tuple(state[name] for name in self.cached)
        if old[0].shape[1] == 0:
            # held once and seen by every sequence
            every = {name: new.expand(length.shape[0], *new.shape[1:]) for name, new in zip(self.cached, rows)}
            after = {**every, "length": length, "start": cu_seqlens[:-1].long(), "end": cu_seqlens[1:].long()}
            return self.attend(q, rows, cu_seqlens=cu_seqlens), after
        start = state.get("start", torch.zeros_like(length))
        end = state.get("end", torch.full_like(length, old[0].shape[1]))
        rows, start = align(old, start, end, tuple(rows), cu_seqlens)
        return self.attend(q, rows, start, cu_seqlens=cu_seqlens), self._state(rows, length, start)

    def _state(self, rows: Sequence[Tensor], length: Tensor, start: Tensor | None) -> dict[str, Tensor]:
        """Without the rows that no later token will see."""
        before = rows[0].shape[1]
        if self.window is not None:
            rows = [recent(cache, self.window - 1) for cache in rows]
        return self._named(rows, length, start, before)

    def _named(self, rows: Sequence[Tensor], length: Tensor, start: Tensor | None, before: int) -> dict[str, Tensor]:
        """The state of the last of `before` rows, in which `start` counts."""
        state = {**dict(zip(self.cached, rows)), "length": length}
        if start is None:
            return state
        if self.window is not None:
            start = (start - (before - rows[0].shape[1])).clamp(min=0)
        return {**state, "start": start}

    def comparable(self, state: Any) -> list[Tensor]:
        """Of each sequence, the cached rows that a later token can see."""
        found = []
        for n, length in enumerate(state["length"].tolist()):
            end = int(state["end"][n]) if "end" in state else state["keys"].shape[1]
            count = length if self.window is None else min(length, self.window - 1)
            found += [state[name][n, end - count : end] for name in self.cached]
        return found

    def state_size(self, length: int = 1) -> int:
        rows = length if self.window is None else min(length, self.window - 1)
        return 2 * rows * self.kv_heads * self.head_dim if self.causal else 0


def _positions(x: Tensor, length: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[B or 1, T]: of each row, its place in its sequence; `length` [N or 1] tokens came before."""
    if cu_seqlens is None and x.shape[1] == 1:
        return length[:, None]
    rows = torch.arange(x.shape[1], device=x.device)[None]
    if cu_seqlens is None:
        return length[:, None] + rows
    before = length.expand(cu_seqlens.shape[0] - 1) - cu_seqlens[:-1]
    return rows + of_each_row("attention", before, x, cu_seqlens)
