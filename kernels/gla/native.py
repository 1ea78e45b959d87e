"""Gated linear attention in C++ for CPUs: the state in tiles that stay in registers. See native.cpp.

The backward pass keeps the state and its gradient at the borders of chunks, 2 K V / chunk numbers for each row and
head, and makes the others again. The bits of the results do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels import jit_cpp, pool
from kernels.memory import DTYPES, address, bounds, columns_together, contiguous, heads, no_kernel, sequences
from kernels.problem import Problem, state_dtype

SOURCE = Path(__file__).with_suffix(".cpp")
# fewer numbers of states than this, in all rows, are done before a second thread has woken up
SERIAL_SIZE = 1 << 18
_function = jit_cpp.functions(SOURCE)


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    return no_kernel(problem, "q") or jit_cpp.reasons(SOURCE)


def configs(problem: Problem) -> Sequence[Mapping[str, int]]:
    """chunk: rows of a chunk of the backward pass."""
    return [{}] if problem.direction == "forward" else [{"chunk": 64}, {"chunk": 32}]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    config: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V], final_state [N, H, K, V])"""
    given = _Given(q, k, v, log_decay, initial_state, bonus, cu_seqlens, scale)
    y = pool.empty_like(v)
    final_state = q.new_empty((given.sequences, *q.shape[2:], v.shape[3]), dtype=state_dtype(q.dtype))
    _function("gla_forward", "9qd20q")(*given.fields(), y.data_ptr(), final_state.data_ptr())
    return y, final_state


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    needs: tuple[bool, ...],
    config: Mapping[str, int],
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dlog_decay, dinitial_state, dbonus), each like its input, or None where `needs` says so."""
    given = _Given(q, k, v, log_decay, initial_state, bonus, cu_seqlens, scale)
    dy, dfinal_state = columns_together(dy), contiguous(dfinal_state)
    inputs = (q, k, v, log_decay, initial_state, bonus)
    found = [pool.empty_like(t) if needed and t is not None else None for t, needed in zip(inputs, needs)]
    dbonus = found[5]
    (B, T, H, K), V = q.shape, v.shape[3]
    chunk = config["chunk"]
    # as many as there could be in packed sequences
    chunks = B * -(-T // chunk) if cu_seqlens is None else T // chunk + given.sequences
    wide = state_dtype(q.dtype)
    lanes = max(jit_cpp.load(SOURCE).vector_bytes() // wide.itemsize, 4)
    parts = None if dbonus is None else q.new_empty(chunks, H, K, dtype=wide)
    states = pool.empty(2, chunks, H, -(-V // lanes) * lanes, -(-K // lanes) * lanes, dtype=wide)
    _function("gla_backward", "9qd32q")(
        *given.fields(),
        *heads(dy),
        address(dfinal_state),
        *map(address, found),
        address(parts),
        states.data_ptr(),
        chunk,
    )
    return tuple(found)


class _Given:
    """The inputs as native.cpp reads them; keeps the copies that it made alive."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        bonus: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
    ) -> None:
        self.q, self.k, self.v = columns_together(q), columns_together(k), columns_together(v)
        self.log_decay = columns_together(log_decay)
        self.initial_state, self.bonus = contiguous(initial_state), contiguous(bonus)
        self.cu_seqlens, self.sequences = bounds(cu_seqlens), sequences(q, cu_seqlens)
        self.scale = scale

    def fields(self) -> tuple[float, ...]:
        """The fields of native.h's Problem."""
        (B, T, H, K), V = self.q.shape, self.v.shape[3]
        return (
            address(self.cu_seqlens),
            self.sequences,
            T,
            H,
            K,
            V,
            1 if self.log_decay is None else self.log_decay.shape[3],
            DTYPES[self.q.dtype],
            torch.get_num_threads() if B * T * H * K * V >= SERIAL_SIZE else 1,
            self.scale,
            *heads(self.q),
            *heads(self.k),
            *heads(self.v),
            *heads(self.log_decay),
            address(self.initial_state),
            address(self.bonus),
        )
