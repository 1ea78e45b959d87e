"""Rows of keys or values that grow with time, [N, S, ...], without ever changing what an older cache shows.

`append` works as torch.cat does. Where no gradient is recorded it leaves room behind the rows and writes there next
time, which a list does too: only the longest cache of a room may grow into it, any other is copied, so two
continuations of one snapshot do not meet.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.transforms import has_values


@dataclass
class _Room:
    """Of a storage that holds rows [N, capacity, ...]: its shape and strides, and how many rows are taken."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    taken: int


_taking = threading.Lock()


def append(cache: Tensor, rows: Tensor) -> Tensor:
    """cache [N, S, ...] with rows [N, T, ...] behind it, in the dtype of rows: [N, S + T, ...]."""
    if cache.shape[1] == 0:
        return rows
    cache = cache.to(rows.dtype)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not has_values(cache):
        return torch.cat([cache, rows], 1)
    before, length = cache.shape[1], cache.shape[1] + rows.shape[1]
    whole, copied = place(cache, rows.shape[1], length)
    if copied:
        whole[:, :before] = cache
    whole[:, before:] = rows
    return whole


def place(cache: Tensor, count: int, kept: int) -> tuple[Tensor, bool]:
    """Where the last `kept` of the rows of a cache [N, S, ...] and `count` more lie: [N, kept, ...]; kept >= count.

    The new rows are the caller's to write, and the older too where the second that is returned says so.
    """
    batch, before, *rest = cache.shape
    if _take(cache, count):
        strides = cache.stride()
        first = cache.storage_offset() + (before + count - kept) * strides[1]
        return cache.as_strided((batch, kept, *rest), strides, first), False
    # half as many rows again
    shape = (batch, kept + kept // 2 + 16, *rest)
    rows = cache.new_empty(shape)
    strides = rows.stride()
    setattr(rows.untyped_storage(), "room", _Room(shape, strides, kept))  # noqa: B010
    return rows.as_strided((batch, kept, *rest), strides), True


def recent(cache: Tensor, count: int) -> Tensor:
    """The last `count` rows of [N, S, ...], or all where there are fewer."""
    rows = cache.shape[1]
    if not torch.compiler.is_compiling():
        return cache[:, max(rows - count, 0) :]
    # a slice would bind torch.export to lengths on one side of `count`
    kept = torch.sym_min(rows, count)
    return cache.index_select(1, torch.arange(kept, device=cache.device) + (rows - kept))


def _take(cache: Tensor, count: int) -> bool:
    """Takes `count` rows behind the cache, if it has room and is the first to."""
    room: _Room | None = getattr(cache.untyped_storage(), "room", None)
    if room is None or (cache.shape[0], *cache.shape[2:]) != (room.shape[0], *room.shape[2:]):
        return False
    if cache.stride() != room.strides or cache.storage_offset() % cache.stride(1):
        return False
    end = cache.storage_offset() // cache.stride(1) + cache.shape[1]
    with _taking:
        if end != room.taken or end + count > room.shape[1]:
            return False
        room.taken += count
    return True


def align(
    caches: tuple[Tensor, ...],
    start: Tensor,
    end: Tensor,
    rows: tuple[Tensor, ...] | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Rows start[n] to end[n] of each cache [N, S, ...], and behind them sequence n's of packed rows [1, T, ...].

    Returns the caches [N, size, ...], every sequence at the end, behind zeros; and its first row [N]. The size is the
    longest sequence's, which is read back to the host; under torch.compile and torch.export, where it cannot be, S + T.
    """
    new = torch.zeros_like(end) if cu_seqlens is None else cu_seqlens.diff().long()
    count = end - start + new
    size = caches[0].shape[1] + (0 if rows is None else rows[0].shape[1])
    if not (torch.compiler.is_compiling() or count.is_meta):
        size = max(int(count.max()), 1)
    # 1 for the last row
    back = torch.arange(size, 0, -1, device=end.device)
    old = ((end + new)[:, None] - back).clamp(0, caches[0].shape[1] - 1)
    sequence = torch.arange(end.shape[0], device=end.device)[:, None]
    missing, fresh_rows = back > count[:, None], back <= new[:, None]
    found = []
    for i, cache in enumerate(caches):
        moved, beside = cache[sequence, old], [1] * (cache.ndim - 2)
        if rows is not None and cu_seqlens is not None:
            fresh = rows[i][0, (cu_seqlens.long()[1:, None] - back).clamp(0, rows[i].shape[1] - 1)]
            moved = torch.where(fresh_rows.view(*fresh_rows.shape, *beside), fresh, moved.to(fresh.dtype))
        found.append(moved.masked_fill(missing.view(*missing.shape, *beside), 0))
    return tuple(found), size - count
