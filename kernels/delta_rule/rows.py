"""Rows [B, T, H, W], packed or not, as segments of chunks: what every rule whose chunks are `Segment`s shares.

rows are q, k, v and further tensors, None where an optional one is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.delta_rule.chunk import Segment
from kernels.problem import state_dtype

Rows = Sequence[Tensor | None]
# (sequences and heads, *rows of a segment) -> Segment
Make = Callable[..., Segment]
# (segment, dy, dstate, rows of the segment) -> (dstate, *gradients of the rows)
Backward = Callable[..., tuple[Any, ...]]

# numbers of q up to which a backward pass keeps all segments, in place of making them twice
KEPT = 1 << 24


@dataclass(frozen=True)
class Cut:
    """How rows [B, T, H, ...] are cut: segments of n chunks of C rows, the last padded with zeros, which do nothing."""

    batch: int
    length: int
    heads: int
    C: int
    n: int

    @staticmethod
    def of(q: Tensor, chunk: int, numbers: int) -> Cut:
        """Chunks of at most so many rows; segments of about so many numbers, so that all they need stays in cache.

        Many more rows than keys replace what their own chunk wrote, again and again: what cancels loses digits.
        """
        B, T, H, K = q.shape
        C = min(chunk, 1 << (T - 1).bit_length(), 1 << (2 * K).bit_length() - 1)
        return Cut(B, T, H, C, max(1, min(numbers // (B * H * C * K), -(-T // C))))

    @property
    def starts(self) -> range:
        return range(0, self.length, self.C * self.n)

    def take(self, x: Tensor, start: int, dtype: torch.dtype, factor: float = 1.0) -> Tensor:
        """Of [B, T, H, W] the segment at that row times the factor, [G, C, W]."""
        rows = x[:, start : start + self.C * self.n]
        missing = -rows.shape[1] % self.C
        if missing:
            rows = torch.cat([rows, rows.new_zeros(self.batch, missing, *rows.shape[2:])], 1)
        cut = rows.unflatten(1, (-1, self.C)).permute(1, 0, 3, 2, 4)
        taken = torch.empty(cut.shape, dtype=dtype, device=x.device)
        if factor == 1:
            taken.copy_(cut)
        else:
            torch.mul(cut.to(dtype), factor, out=taken)
        return taken.view(-1, self.C, x.shape[-1])

    def put(self, rows: Tensor, x: Tensor, start: int) -> None:
        """Writes the segment [G, C, W] into x [B, T, H, W]."""
        cut = rows.view(-1, self.batch, self.heads, self.C, rows.shape[-1]).permute(1, 0, 3, 2, 4)
        into = x[:, start : start + self.C * self.n]
        whole = into.shape[1] // self.C
        if whole:
            into[:, : whole * self.C].unflatten(1, (whole, self.C)).copy_(cut[:, :whole])
        if into.shape[1] % self.C:
            into[:, whole * self.C :].copy_(cut[:, whole, : into.shape[1] - whole * self.C])


def alike(cu_seqlens: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Packed sequences in batches of about one length: their numbers [N'], their rows [N', L], and which are theirs.

    Reads cu_seqlens. At most half of the rows of a batch are padding; empty sequences are in none.
    """
    bounds = cu_seqlens.long()
    starts, lengths = bounds[:-1], bounds.diff()
    sizes = [length.bit_length() for length in lengths.tolist()]
    for size in sorted(set(sizes) - {0}):
        which = torch.tensor([n for n, other in enumerate(sizes) if other == size], device=bounds.device)
        offsets = torch.arange(int(lengths[which].max()), device=bounds.device)
        there = offsets < lengths[which, None]
        yield which, torch.where(there, starts[which, None] + offsets, 0), there


def gathered(x: Tensor | None, index: Tensor, there: Tensor) -> Tensor | None:
    """Rows [1, T, H, W] as padded sequences [N', L, H, W]."""
    return None if x is None else torch.where(there[..., None, None], x[0][index], 0)


def states(rows: Rows, initial: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, v and the initial states [N, H, K, V]."""
    q, _, v, *_ = rows
    assert q is not None
    assert v is not None
    if initial is None:
        sequences = len(q) if cu_seqlens is None else len(cu_seqlens) - 1
        initial = q.new_zeros(sequences, *q.shape[2:], v.shape[-1], dtype=state_dtype(q.dtype))
    return q, v, initial


def one(step: Callable[..., Any], rows: Rows, initial: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """y and the final state of a single row, by the step of the loop."""
    _, v, initial = states(rows, initial, None)
    state, y = step(initial, *(None if x is None else x[:, 0].to(initial.dtype) for x in rows))
    return (scale * y).to(v.dtype)[:, None].contiguous(), state.contiguous()


def run(
    make: Make, rows: Rows, initial: Tensor | None, cu_seqlens: Tensor | None, scale: float, config: Mapping[str, int]
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V] and the final states [N, H, K, V]."""
    _, v, initial = states(rows, initial, cu_seqlens)
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    if cu_seqlens is None:
        return y, _run(make, rows, initial, y, scale, config)
    final = initial.clone(memory_format=torch.contiguous_format)
    for which, index, there in alike(cu_seqlens):
        part = y.new_empty(*index.shape, *y.shape[2:])
        final[which] = _run(make, [gathered(x, index, there) for x in rows], initial[which], part, scale, config)
        y[0, index[there]] = part[there]
    return y, final


def _run(make: Make, rows: Rows, initial: Tensor, y: Tensor, scale: float, config: Mapping[str, int]) -> Tensor:
    assert rows[0] is not None
    cut, state = Cut.of(rows[0], config["chunk"], config["numbers"]), initial.flatten(0, 1)
    for start in cut.starts:
        # y is linear in q
        s = make(len(state), *_taken(cut, rows, start, initial.dtype, scale))
        state = s.run(state)
        cut.put(s.outputs(), y, start)
    return state.clone().view(initial.shape)


def run_backward(
    make: Make, backward: Backward, dy: Tensor | None, dfinal: Tensor | None, rows: Rows, initial: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, config: Mapping[str, int],
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of rows in their dtypes, and of the initial states."""
    _, v, initial = states(rows, initial, cu_seqlens)
    dfinal = torch.zeros_like(initial) if dfinal is None else dfinal
    dy = torch.zeros_like(v) if dy is None else dy
    found = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in rows]
    if cu_seqlens is None:
        return [*found, _run_backward(make, backward, dy, dfinal, rows, initial, found, scale, config)]
    dinitial = dfinal.clone(memory_format=torch.contiguous_format)
    for which, index, there in alike(cu_seqlens):
        dy_rows, *batch = (gathered(x, index, there) for x in (dy, *rows))
        assert dy_rows is not None
        part = [None if x is None else torch.empty_like(x) for x in batch]
        given = (dfinal[which], batch, initial[which], part)
        dinitial[which] = _run_backward(make, backward, dy_rows, *given, scale, config)
        for whole, some in zip(found, part):
            if whole is not None and some is not None:
                whole[0, index[there]] = some[there]
    return [*found, dinitial]


def _run_backward(
    make: Make, backward: Backward, dy: Tensor, dfinal: Tensor, rows: Rows, initial: Tensor, found: Rows, scale: float,
    config: Mapping[str, int],
) -> Tensor:  # fmt: skip
    """The gradient of the initial states; those of rows go to `found`."""
    assert rows[0] is not None
    cut, dtype = Cut.of(rows[0], config["chunk"], config["numbers"]), initial.dtype
    state, dstate = initial.flatten(0, 1), dfinal.flatten(0, 1)
    kept: list[tuple[Tensor, Segment | None, list[Tensor | None]]] = []
    for start in cut.starts:
        entering, some = state, _taken(cut, rows, start, dtype)
        s = make(len(state), *some)
        state = s.run(entering)
        kept.append((entering, s, some) if rows[0].numel() <= KEPT else (entering, None, []))
    for start in reversed(cut.starts):
        entering, segment, some = kept.pop()
        if segment is None:
            some = _taken(cut, rows, start, dtype)
            segment = make(len(entering), *some)
            segment.run(entering)
        dstate, *gradients = backward(segment, cut.take(dy, start, dtype, scale), dstate, some)
        for whole, gradient in zip(found, gradients):
            if whole is not None:
                cut.put(gradient, whole, start)
    return dstate.view(initial.shape)


def _taken(cut: Cut, rows: Rows, start: int, dtype: torch.dtype, of_q: float = 1.0) -> list[Tensor | None]:
    """A segment of all rows; q times that factor."""
    factors = (of_q, *[1.0] * (len(rows) - 1))
    return [None if x is None else cut.take(x, start, dtype, factor) for x, factor in zip(rows, factors)]
