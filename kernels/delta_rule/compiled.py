"""The delta rule in chunks of plain PyTorch, for every device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kernels.delta_rule import naive
from kernels.delta_rule.chunk import Segment
from kernels.delta_rule.rows import one, run, run_backward
from kernels.problem import Problem

# rows that are no work for a loop
FEW = 4


def configs(problem: Problem) -> Sequence[Mapping[str, int]]:
    """chunk: rows of a chunk; numbers: of q in the chunks that are worked on at a time."""
    return [{"chunk": 32, "numbers": 1 << 18}]


def cannot(problem: Problem) -> list[str]:
    if problem.options["packed"] and problem.device.type != "cpu":
        return ["packed sequences are cut by the values of cu_seqlens, which are not read back from a GPU"]
    return []


def segment(sequences: int, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None) -> Segment:
    return Segment(sequences, q, k, k, v, g, beta)


def segment_backward(s: Segment, dy: Tensor, dstate: Tensor, rows: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """dstate and the gradients of q, k, v, beta, g."""
    dstate, d = s.backward(dy, dstate)
    return dstate, d["q"], d["a"].add_(d["b"]), d["w"], d["beta"], d["g"]


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
    config: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V], final_state [N, H, K, V])"""
    if q.shape[1] == 1 and cu_seqlens is None:
        return one(naive.step, (q, k, v, beta, log_decay), initial_state, scale)
    if q.shape[1] <= FEW:
        return naive.forward(q, k, v, beta, log_decay, initial_state, cu_seqlens, scale=scale)
    return run(segment, (q, k, v, beta[..., None], log_decay), initial_state, cu_seqlens, scale, config)


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
    config: Mapping[str, int],
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dbeta, dlog_decay, dinitial_state), each None where `needs` says so."""
    if q.shape[1] <= FEW:
        return naive.backward(
            dy, dfinal_state, q, k, v, beta, log_decay, initial_state, cu_seqlens, scale=scale, needs=needs
        )
    rows = (q, k, v, beta[..., None], log_decay)
    found = run_backward(segment, segment_backward, dy, dfinal_state, rows, initial_state, cu_seqlens, scale, config)
    dq, dk, dv, dbeta, dlog_decay, dinitial = found
    assert dbeta is not None
    gradients = (dq, dk, dv, dbeta[..., 0], dlog_decay, dinitial)
    given = (q, k, v, beta, log_decay, initial_state)
    return tuple(g if need and x is not None else None for g, x, need in zip(gradients, given, needs))
