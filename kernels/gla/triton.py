"""Gated linear attention on GPUs: in chunks where sequences are long, else as its loop over time.

Configs with a "chunk" are those of triton_chunks.py, the others of kernels/triton_matrix_launch.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import triton
from torch import Tensor

from kernels import triton_matrix_launch as matrix
from kernels.gla import triton_chunks as chunks
from kernels.gla.triton_kernels import gla_backward, gla_forward
from kernels.problem import Problem, state_dtype
from kernels.triton_aot import Compiled

INTERPRETED = not isinstance(gla_forward, triton.JITFunction)


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    return matrix.cannot(problem, INTERPRETED)


def configs(problem: Problem) -> Sequence[dict[str, int]]:
    """Candidates for the tuner, the default first: chunks where sequences are LONG (kernels/cards.py)."""
    in_chunks, loops = chunks.configs(problem), matrix.configs(problem)
    return [*in_chunks, *loops] if chunks.first(problem) else [*loops, *in_chunks]


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
    return _recurrence(q, k, v, log_decay, initial_state, bonus, cu_seqlens, scale, config).run_forward()


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
    """(dq, dk, dv, dlog_decay, dinitial_state, dbonus), each None where `needs` says so."""
    names = ("q", "k", "v", "log_decay", "initial", "bonus")
    given = _recurrence(q, k, v, log_decay, initial_state, bonus, cu_seqlens, scale, config)
    found = given.run_backward(dy, dfinal_state, dict(zip(names, needs)))
    return tuple(found[name] for name in names)


def compile_for(target: str, problem: Problem, config: Mapping[str, int]) -> list[Compiled]:
    """Compiles what the problem would launch for a GPU that need not be there, such as "sm_90" or "gfx942"."""
    shape = (problem.sizes["H"], problem.sizes["K"])
    bonus = torch.empty(shape, dtype=state_dtype(problem.dtypes["q"]), device="meta")
    given = _recurrence(
        **matrix.shapes(problem, ()),  # type: ignore[arg-type]
        bonus=bonus if problem.options["bonus"] else None,
        scale=0.125,
        config=config,
        nvidia=target.startswith("sm_"),
    )
    return given.compiled(target, problem.direction)


def _recurrence(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None, bonus: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, config: Mapping[str, int], nvidia: bool | None = None,
) -> matrix.Recurrence | chunks.Chunks:  # fmt: skip
    rows = {"q": q, "k": k, "v": v, "log_decay": log_decay}
    if "chunk" in config:
        return chunks.Chunks(rows, initial_state, bonus, cu_seqlens, scale, config, nvidia)
    kernels = gla_forward, gla_backward
    return matrix.Recurrence(kernels, rows, initial_state, cu_seqlens, scale, config, {"bonus": bonus})
