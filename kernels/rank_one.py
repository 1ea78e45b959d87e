"""The delta rule and dplr in C++ for CPUs: what their native backends share. See rank_one.h.

Rows are streamed in time past a state [K, V] that stays in the cache; threads over sequences, heads and, where these
are few, tiles of columns. The backward pass keeps the state before every 16th row and makes the others again. The bits
of the results do not depend on the number of threads: what is summed over tiles is summed in their order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels import jit_cpp, memory, pool
from kernels.memory import address
from kernels.problem import Problem, state_dtype

# of a tile's state, in the L1 cache beside the rows that pass by
STATE_BYTES = 32768
# rows of a chunk
CHUNK = 16
# so many parts are wanted, for threads to share
PARTS = 8
# fewer products than this are done before a second thread has woken up
SERIAL_SIZE = 1 << 18


def cannot(source: Path, problem: Problem) -> list[str]:
    """Why the backend cannot run the problem; empty if it can."""
    return memory.no_kernel(problem, "q") or jit_cpp.reasons(source)


class Native:
    """A rule's two functions, called with its rows: q, k, v, log_decay, and a and b, which may be None.

    Rows are [B, T, H, columns], or [B, T, H] with one column.
    """

    def __init__(self, source: Path) -> None:
        self.source, self.name = source, source.parent.name

    @functools.cached_property
    def run_forward(self) -> Callable[..., None]:
        return jit_cpp.load(self.source).checked_function(f"{self.name}_forward", "12qd27q")

    @functools.cached_property
    def run_backward(self) -> Callable[..., None]:
        return jit_cpp.load(self.source).checked_function(f"{self.name}_backward", "12qd44q")

    @functools.cached_property
    def vector_bytes(self) -> int:
        return jit_cpp.load(self.source).vector_bytes()

    def forward(
        self, rows: Sequence[Tensor | None], initial: Tensor | None, cu_seqlens: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """y [B, T, H, V] in v's dtype, and the final states [N, H, K, V]."""
        given = _Given(rows, initial, cu_seqlens, scale, self.vector_bytes)
        y, final = pool.empty_like(given.v), given.v.new_empty(given.states, dtype=given.wide)
        self.run_forward(*given.fields, y.data_ptr(), final.data_ptr())
        return y, final

    def backward(
        self,
        dy: Tensor | None,
        dfinal: Tensor | None,
        rows: Sequence[Tensor | None],
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        needs: Sequence[bool],
    ) -> tuple[Tensor | None, ...]:
        """The gradients of rows and the initial states; None where `needs`, in the same order, says so."""
        given = _Given(rows, initial, cu_seqlens, scale, self.vector_bytes)
        inputs = (*rows, initial)
        found = [pool.empty_like(x) if need and x is not None else None for x, need in zip(inputs, needs)]
        dq, dk, dv, dlog_decay, da, db, dinitial = found
        summed = (dq, dk, da, db, dlog_decay)
        parts: list[Tensor | None] = [None] * len(summed)
        if given.groups > 1:
            parts = [None if x is None else x.new_empty((given.groups, *x.shape), dtype=given.wide) for x in summed]
        dy, dfinal = memory.columns_together(dy), memory.contiguous(dfinal)
        kept = given.room()
        self.run_backward(
            *given.fields,
            *memory.heads(dy),
            address(dfinal),
            *(number for pair in zip(summed, parts) for number in map(address, pair)),
            address(dv),
            address(dinitial),
            kept.data_ptr(),
            kept.numel() // kept.shape[0],
        )
        return tuple(found)


class _Given:
    """The inputs as rank_one.h reads them; keeps the copies that it made alive."""

    def __init__(
        self,
        rows: Sequence[Tensor | None],
        initial: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        vector_bytes: int,
    ) -> None:
        q, _, v, log_decay, a, _ = rows
        assert q is not None
        assert v is not None
        self.v, self.wide = v, state_dtype(q.dtype)
        self.initial, self.cu_seqlens = memory.contiguous(initial), memory.bounds(cu_seqlens)
        batch, length, heads, keys = q.shape
        values, itemsize = v.shape[3], self.wide.itemsize
        sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.states = sequences, heads, keys, values
        vectors, self.groups = _tiles(sequences * heads, keys, values, itemsize, vector_bytes)
        parallel = batch * length * heads * keys * values >= SERIAL_SIZE
        self.threads = torch.get_num_threads() if parallel else 1
        self.lanes, self.vectors = vector_bytes // itemsize, vectors
        self.kept: list[Tensor] = []
        fields = [
            address(self.cu_seqlens),
            sequences,
            length,
            heads,
            keys,
            values,
            0 if log_decay is None else log_decay.shape[3],
            memory.DTYPES[q.dtype],
            0 if a is None else memory.DTYPES[a.dtype],
            self.threads,
            vectors,
            self.groups,
            scale,
        ]
        # a loop: for one token, calls cost more than numbers
        for x in rows:
            if x is None:
                fields += (0, 0, 0, 0)
                continue
            batches, times, apart, *between = x.stride()
            if between and between[0] != 1 and x.shape[3] > 1:
                self.kept.append(x := x.contiguous())
                batches, times, apart, _ = x.stride()
            fields += (x.data_ptr(), batches, times, apart)
        self.fields = *fields, address(self.initial)

    def room(self) -> Tensor:
        """For every thread's states before each chunk of the part that it is at; keys and columns are whole vectors."""
        sequences, heads, keys, values = self.states
        threads = min(self.threads, sequences * heads * self.groups)
        chunks = max(1, -(-memory.longest(self.v, self.cu_seqlens) // CHUNK))
        rows, width = max(self.lanes, 4), self.lanes * self.vectors
        tiles = -(-values // width)
        columns = -(-tiles // self.groups) * width
        return pool.empty(threads, chunks, -(-keys // rows) * rows, columns, dtype=self.wide)


@functools.cache
def _tiles(parts: int, keys: int, values: int, itemsize: int, vector_bytes: int) -> tuple[int, int]:
    """Vectors in a tile of columns, 4, 2 or 1, and groups of tiles. Bits depend on them, so they do not on threads."""
    lanes, vectors = vector_bytes // itemsize, 4

    def tiles() -> int:
        return -(-values // (lanes * vectors))

    while vectors > 1 and (
        lanes * vectors // 2 >= values or keys * lanes * vectors * itemsize > STATE_BYTES or parts * tiles() < PARTS
    ):
        vectors //= 2
    return vectors, min(tiles(), -(-PARTS // parts))
