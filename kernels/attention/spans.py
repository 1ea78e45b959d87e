"""Where the keys of each sequence begin and end, and at which of them its queries stand.

`Sight` does so on the device, for every query; `segments` on the host, for every sequence.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.transforms import has_values


@dataclass(frozen=True)
class Sight:
    """What each query sees. Nothing here is read back to the host.

    start, end: the keys of its sequence; position: the row of the key it stands at. [B or 1, T] int64.
    """

    start: Tensor
    end: Tensor
    position: Tensor
    causal: bool
    window: int

    @staticmethod
    def of(
        q: Tensor, k: Tensor, starts: Tensor | None, ends: Tensor | None, cu_seqlens: Tensor | None, *,
        causal: bool, window: int,
    ) -> Sight:  # fmt: skip
        T, S = q.shape[1], k.shape[1]
        rows = torch.arange(T, device=q.device)[None]
        if cu_seqlens is not None and starts is None and ends is None:
            starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
        sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        start = rows.new_zeros(sequences) if starts is None else starts
        end = rows.new_full((sequences,), S) if ends is None else ends
        if cu_seqlens is None:
            start, end = (x[:, None].expand(-1, T) for x in (start, end))
            return Sight(start, end, end - T + rows, causal, window)
        owner = torch.searchsorted(cu_seqlens[1:].contiguous(), rows[0].to(cu_seqlens.dtype), right=True)
        position = rows + (end - cu_seqlens[1:])[owner]
        return Sight(start[owner][None], end[owner][None], position, causal, window)

    def visible(self, queries: slice, first: int, last: int) -> Tensor:
        """[B or 1, queries, keys] for the keys of rows first to last: does the query see the key?"""
        keys = torch.arange(first, last, device=self.position.device)
        start, end, position = (x[:, queries, None] for x in (self.start, self.end, self.position))
        seen = (keys >= start) & (keys < end)
        if self.causal:
            seen = seen & (keys <= position)
        if self.window:
            seen = seen & ((position - keys).abs() < self.window)
        return seen


class Segment(NamedTuple):
    """Queries and the keys of the sequence (or batch of sequences) that they belong to."""

    batch: slice
    queries: slice
    keys: slice


def segments(
    q: Tensor, k: Tensor, starts: Tensor | None, ends: Tensor | None, cu_seqlens: Tensor | None
) -> list[Segment]:
    """One for a batch whose sequences have the same rows as keys, else one for each. Reads the indices back."""
    (B, T), S = q.shape[:2], k.shape[1]
    if cu_seqlens is None:
        if starts is None and ends is None:
            return [Segment(slice(0, B), slice(0, T), slice(0, S))]
        bounds = bounds_of(starts, ends, B, S)
        if len(set(bounds)) == 1:
            return [Segment(slice(0, B), slice(0, T), slice(*bounds[0]))]
        return [Segment(slice(n, n + 1), slice(0, T), slice(*bound)) for n, bound in enumerate(bounds)]
    rows = cu_seqlens.tolist()
    queries = list(itertools.pairwise(rows))
    keys = queries if starts is None and ends is None else bounds_of(starts, ends, len(queries), S)
    return [Segment(slice(0, 1), slice(*of), slice(*to)) for of, to in zip(queries, keys)]


def bounds_of(starts: Tensor | None, ends: Tensor | None, sequences: int, rows: int) -> list[tuple[int, int]]:
    """(start, end) of each sequence's keys. Reads them back.

    Raises:
        ValueError: a sequence's keys do not lie within the rows of k.
    """
    first = [0] * sequences if starts is None else starts.tolist()
    last = [rows] * sequences if ends is None else ends.tolist()
    for n, (start, end) in enumerate(zip(first, last)):
        if not 0 <= start <= end <= rows:
            raise ValueError(
                f"attention: sequence {n} has its keys in rows {start} to {end}, but axis S of k goes from 0 to {rows}"
            )
    return list(zip(first, last))


def check(starts: Tensor | None, ends: Tensor | None, rows: int) -> None:
    """Raises ValueError where `bounds_of` would. Looks at values on the CPU only."""
    index = ends if starts is None else starts
    if index is not None and index.device.type == "cpu" and has_values(index):
        bounds_of(starts, ends, index.shape[0], rows)
