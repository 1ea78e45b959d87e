"""The selective scan in C++ for CPUs: rows streamed in time, threads over sequences and blocks of channels.

See native.cpp. The state of a block of channels stays in the cache, and is never written for every row: the backward
pass keeps it before every 32nd row and makes the others again. The bits of the results do not depend on the number of
threads: what is summed over channels or sequences is summed over blocks first, whoever computes these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import jit_cpp, pool
from kernels.memory import FORMATS, address, bounds, contiguous, longest, no_kernel, sequences, side_by_side
from kernels.problem import Problem, state_dtype

SOURCE = Path(__file__).with_suffix(".cpp")
# vectors in a block of channels, and rows of a chunk
VECTORS, CHUNK = 4, 32
# fewer numbers than this are done before a second thread has woken up
SERIAL_SIZE = 32768
_function = jit_cpp.functions(SOURCE)


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    return no_kernel(problem, "delta", "x") or jit_cpp.reasons(SOURCE)


def forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """y like x, and final_state [N, D, K] in the state dtype."""
    given = _Given(x, delta, A, B, C, D, initial_state, cu_seqlens)
    y = pool.empty_like(x)
    final_state = x.new_empty((given.sequences, *A.shape), dtype=state_dtype(x.dtype))
    _function("selective_scan_forward", 20)(*given.fields(), y.data_ptr(), final_state.data_ptr())
    return y, final_state


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    needs: tuple[bool, ...],
    config: Any = None,
) -> tuple[Tensor | None, ...]:
    """(dx, ddelta, dA, dB, dC, dD, dinitial_state), each like its input, or None where `needs` says so."""
    given = _Given(x, delta, A, B, C, D, initial_state, cu_seqlens)
    dy, dfinal_state = side_by_side(dy), contiguous(dfinal_state)
    inputs = (x, delta, A, B, C, D, initial_state)
    found = [pool.empty_like(t) if needed and t is not None else None for t, needed in zip(inputs, needs)]
    dx, ddelta, dA, dB, dC, dD, dinitial_state = found
    (channels, states), wide = A.shape, state_dtype(x.dtype)
    block = VECTORS * jit_cpp.load(SOURCE).vector_bytes() // wide.itemsize
    blocks = -(-channels // block)
    # what each sequence adds to dA and dD, and each block of channels to dB and dC
    of_sequences = x.new_empty(given.sequences, channels, states + 1, dtype=wide)
    of_blocks = pool.empty(2, blocks, *B.shape, dtype=wide)
    # a thread's states before every chunk
    chunks = max(1, -(-longest(x, given.cu_seqlens) // CHUNK))
    kept = pool.empty(min(given.threads, given.sequences * blocks), chunks, states, block, dtype=wide)
    _function("selective_scan_backward", 35)(
        *given.fields(),
        address(dy),
        *((0, 0) if dy is None else dy.stride()[:2]),
        address(dfinal_state),
        *map(address, (dx, ddelta, dinitial_state, dA, dB, dC, dD)),
        of_sequences.data_ptr(),
        of_sequences.data_ptr() + given.sequences * A.numel() * wide.itemsize,
        *map(address, of_blocks),
        kept.data_ptr(),
        kept[0].numel(),
    )
    return dx, ddelta, dA, dB, dC, dD, dinitial_state


class _Given:
    """The inputs as native.h reads them; keeps the copies that it made alive."""

    def __init__(
        self,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> None:
        wide = state_dtype(x.dtype)
        self.x, self.delta = side_by_side(x), side_by_side(delta)
        # numbers that every channel reads are widened here, once for all blocks of channels
        self.A, self.B, self.C = A.contiguous(), B.to(wide).contiguous(), C.to(wide).contiguous()
        self.D, self.initial_state = contiguous(D), contiguous(initial_state)
        self.cu_seqlens, self.sequences = bounds(cu_seqlens), sequences(x, cu_seqlens)
        self.threads = torch.get_num_threads() if x.numel() * A.shape[1] >= SERIAL_SIZE else 1

    def fields(self) -> tuple[int, ...]:
        """The fields of native.h's Problem."""
        x, delta = self.x, self.delta
        return (
            address(self.cu_seqlens),
            self.sequences,
            *x.shape[1:],
            self.A.shape[1],
            FORMATS[delta.dtype, x.dtype],
            self.threads,
            x.data_ptr(),
            delta.data_ptr(),
            *x.stride()[:2],
            *delta.stride()[:2],
            *map(address, (self.A, self.B, self.C, self.D, self.initial_state)),
        )
