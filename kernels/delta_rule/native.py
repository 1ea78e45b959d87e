"""The delta rule in C++ for CPUs; see kernels/rank_one.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from kernels import rank_one
from kernels.problem import Problem

SOURCE = Path(__file__).with_suffix(".cpp")
_native = rank_one.Native(SOURCE)


def cannot(problem: Problem) -> list[str]:
    return rank_one.cannot(SOURCE, problem)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V], final_state [N, H, K, V])"""
    return _native.forward((q, k, v, log_decay, beta, None), initial_state, cu_seqlens, scale)


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    needs: tuple[bool, ...],
    config: Any = None,
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dbeta, dlog_decay, dinitial_state), each None where `needs` says so."""
    rows = (q, k, v, log_decay, beta, None)
    wanted = (*needs[:3], needs[4], needs[3], False, needs[5])
    found = _native.backward(dy, dfinal_state, rows, initial_state, cu_seqlens, scale, wanted)
    dq, dk, dv, dlog_decay, dbeta, _, dinitial_state = found
    return dq, dk, dv, dbeta, dlog_decay, dinitial_state
