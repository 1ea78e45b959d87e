"""Gated linear attention in C++ for CPUs: the state in tiles that stay in registers. See native.cpp.

The backward pass keeps the state and its gradient at the borders of chunks, 2 K V / chunk numbers for each row and
head, and makes the others again. The bits of the results do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    given = _readable(q, k, v, log_decay, initial_state, bonus, cu_seqlens)
    y = pool.empty_like(v)
    if initial_state is None:
        final_state = q.new_empty((sequences(q, cu_seqlens), *q.shape[2:], v.shape[3]), dtype=state_dtype(q.dtype))
    else:
        final_state = torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    _function("gla_forward", "9qd20q")(*_fields(given, scale), y.data_ptr(), final_state.data_ptr())
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
    given = _readable(q, k, v, log_decay, initial_state, bonus, cu_seqlens)
    dy, dfinal_state = columns_together(dy), contiguous(dfinal_state)
    inputs = (q, k, v, log_decay, initial_state, bonus)
    found = [pool.empty_like(t) if needed and t is not None else None for t, needed in zip(inputs, needs)]
    dbonus = found[5]
    (B, T, H, K), V = q.shape, v.shape[3]
    chunk = config["chunk"]
    # as many as there could be in packed sequences
    chunks = B * -(-T // chunk) if cu_seqlens is None else T // chunk + sequences(q, cu_seqlens)
    wide = state_dtype(q.dtype)
    lanes = max(jit_cpp.load(SOURCE).vector_bytes() // wide.itemsize, 4)
    parts = None if dbonus is None else q.new_empty(chunks, H, K, dtype=wide)
    states = pool.empty(2, chunks, H, -(-V // lanes) * lanes, -(-K // lanes) * lanes, dtype=wide)
    _function("gla_backward", "9qd32q")(
        *_fields(given, scale),
        *heads(dy),
        address(dfinal_state),
        *map(address, found),
        address(parts),
        states.data_ptr(),
        chunk,
    )
    return tuple(found)


def _readable(*given: Tensor | None) -> tuple[Tensor | None, ...]:
    """q, k, v, log_decay, initial_state, bonus and cu_seqlens as native.cpp reads them, some of them copies."""
    *rows, initial_state, bonus, cu_seqlens = given
    return (*map(columns_together, rows), contiguous(initial_state), contiguous(bonus), bounds(cu_seqlens))


def _fields(given: Sequence[Any], scale: float) -> tuple[float, ...]:
    """The fields of native.h's Problem; given: what is readable."""
    q, k, v, log_decay, initial_state, bonus, cu_seqlens = given
    (B, T, H, K), V = q.shape, v.shape[3]
    return (
        address(cu_seqlens),
        sequences(q, cu_seqlens),
        T,
        H,
        K,
        V,
        1 if log_decay is None else log_decay.shape[3],
        DTYPES[q.dtype],
        torch.get_num_threads() if B * T * H * K * V >= SERIAL_SIZE else 1,
        scale,
        *heads(q),
        *heads(k),
        *heads(v),
        *heads(log_decay),
        address(initial_state),
        address(bonus),
    )
