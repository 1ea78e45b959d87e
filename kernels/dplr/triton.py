"""Diagonal plus rank one on GPUs: in chunks (triton_chunks.py), or as its loop over time (kernels/triton_matrix.py).

A config with "chunk" is of chunks. Every problem that the loop over rows can run has configs of it as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import triton
from torch import Tensor

from kernels import triton_matrix_launch as matrix
from kernels.dplr import triton_chunks as chunks
from kernels.dplr.triton_kernels import dplr_backward, dplr_forward
from kernels.problem import Problem
from kernels.triton_aot import Compiled

INTERPRETED = not isinstance(dplr_forward, triton.JITFunction)


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    return matrix.cannot(problem, INTERPRETED)


def configs(problem: Problem) -> Sequence[dict[str, int]]:
    """Candidates for the tuner, the default first: chunks for long sequences, rows for short ones."""
    whole, rows = chunks.configs(problem), matrix.configs(problem)
    return [*whole, *rows] if chunks.comes_first(problem) else [*rows, *whole]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    config: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V], final_state [N, H, K, V])"""
    return _recurrence(q, k, v, a, b, log_decay, initial_state, cu_seqlens, scale, config).run_forward()


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    needs: tuple[bool, ...],
    config: Mapping[str, int],
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, da, db, dlog_decay, dinitial_state), each None where `needs` says so."""
    names = ("q", "k", "v", "a", "b", "log_decay", "initial")
    given = _recurrence(q, k, v, a, b, log_decay, initial_state, cu_seqlens, scale, config)
    found = given.run_backward(dy, dfinal_state, dict(zip(names, needs)))
    return tuple(found[name] for name in names)


def compile_for(target: str, problem: Problem, config: Mapping[str, int]) -> list[Compiled]:
    """Compiles what the problem would launch for a GPU that need not be there, such as "sm_90" or "gfx942"."""
    tensors = matrix.shapes(problem, ("a", "b"))
    given = _recurrence(**tensors, scale=0.125, config=config, target=target)  # type: ignore[arg-type]
    return given.compiled(target, problem.direction)


def _recurrence(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, scale: float, config: Mapping[str, int],
    target: str | None = None,
) -> matrix.Recurrence | chunks.Chunks:  # fmt: skip
    rows = {"q": q, "k": k, "v": v, "a": a, "b": b, "log_decay": log_decay}
    if "chunk" in config:
        return chunks.Chunks(rows, initial_state, cu_seqlens, scale, config, target or chunks.target_of(q.device))
    return matrix.Recurrence((dplr_forward, dplr_backward), rows, initial_state, cu_seqlens, scale, config)
