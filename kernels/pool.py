"""Memory for results on CPU, kept for the next result when one is freed.

Fresh memory costs more than a streaming kernel: the system fills every page with zeros when it is first touched
(64 MiB: 7 ms in huge pages, 24 ms in small ones, where a scan of that size takes 5 ms). The C library gives large
blocks back to the system when they are freed, so that every training step would pay again. Here a freed block waits
for the next result of about its size. Large blocks are marked as free (MADV_FREE) meanwhile: the system takes their
pages whenever it needs memory.
"""

from __future__ import annotations

import math
import mmap
import weakref
from typing import Any

import torch
from torch import Tensor

# Below this, the C library keeps memory too.
SMALLEST_BYTES = 256 << 10
HUGE_PAGE = 2 << 20
# Marking costs some microseconds: too much for results that take little longer to compute.
MARKED_BYTES = 16 << 20
# Waiting blocks beyond this go back to the system, the oldest first.
IDLE_BYTES = 1 << 30

AVAILABLE = hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MADV_FREE")

# Waiting blocks with their sizes, oldest first. Only operations that are atomic: a tensor may die in any thread, in
# the middle of anything.
_idle: list[tuple[int, mmap.mmap]] = []
_leases: dict[int, _Lease] = {}


class _Lease(weakref.ref[memoryview]):
    """Waits for the end of a block's use."""

    size: int
    block: mmap.mmap


def empty_like(x: Tensor) -> Tensor:
    """An uninitialised tensor of x's shape and dtype on the CPU; contiguous whatever x's strides."""
    needed = x.nbytes
    # In deterministic mode torch fills uninitialised memory.
    if needed < SMALLEST_BYTES or not AVAILABLE or torch.are_deterministic_algorithms_enabled():
        return torch.empty_like(x) if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
    size = _block_size(needed)
    block = _take(size) or _new(size)
    if block is None:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    # The tensor's storage keeps this view, and nothing else does: its end is the storage's.
    view = memoryview(block)
    lease = _Lease(view, _give)
    lease.size, lease.block = size, block
    _leases[id(lease)] = lease
    return torch.frombuffer(view, dtype=x.dtype, count=x.numel()).resize_(x.shape)


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Likewise of this shape."""
    if math.prod(shape) * dtype.itemsize < SMALLEST_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return empty_like(torch.empty((), dtype=dtype, device="cpu").expand(shape))


def idle_bytes() -> int:
    """Bytes in blocks that wait for their next use."""
    return sum(size for size, _ in list(_idle))


def release() -> None:
    """Gives all waiting blocks back to the system."""
    _idle.clear()


def _block_size(needed: int) -> int:
    """Rounded up by an eighth at most, so that results of about one size can use the same blocks."""
    step = 1 << (needed.bit_length() - 4)
    return -(-needed // step) * step


def _take(size: int) -> mmap.mmap | None:
    for entry in reversed(_idle):
        if entry[0] == size:
            try:
                _idle.remove(entry)
            except ValueError:
                # another thread was faster
                continue
            return entry[1]
    return None


def _new(size: int) -> mmap.mmap | None:
    """A fresh block; None if the system refuses."""
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if size >= HUGE_PAGE:
            block.madvise(mmap.MADV_HUGEPAGE)
    except OSError:
        return None
    return block


def _give(lease: Any) -> None:
    del _leases[id(lease)]
    if lease.size >= MARKED_BYTES:
        lease.block.madvise(mmap.MADV_FREE)
    _idle.append((lease.size, lease.block))
    while idle_bytes() > IDLE_BYTES:
        _idle.pop(0)
