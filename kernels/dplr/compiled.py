"""The diagonal-plus-rank-one rule in chunks of plain PyTorch: those of kernels/delta_rule/chunk.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from kernels.delta_rule.chunk import Segment
from kernels.delta_rule.compiled import FEW, cannot, configs
from kernels.delta_rule.rows import one, run, run_backward
from kernels.dplr import naive

__all__ = ["backward", "cannot", "configs", "forward"]


def segment(sequences: int, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None) -> Segment:
    return Segment(sequences, q, a, b, None, g, None, k, v, before=True)


def segment_backward(s: Segment, dy: Tensor, dstate: Tensor, rows: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """dstate and the gradients of q, k, v, a, b, g."""
    dstate, d = s.backward(dy, dstate)
    return dstate, d["q"], d["k"], d["v"], d["a"], d["b"], d["g"]


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
    rows = (q, k, v, a, b, log_decay)
    if q.shape[1] == 1 and cu_seqlens is None:
        return one(naive.step, rows, initial_state, scale)
    if q.shape[1] <= FEW:
        return naive.forward(q, k, v, a, b, log_decay, initial_state, cu_seqlens, scale=scale)
    return run(segment, rows, initial_state, cu_seqlens, scale, config)


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
    if q.shape[1] <= FEW:
        return naive.backward(
            dy, dfinal_state, q, k, v, a, b, log_decay, initial_state, cu_seqlens, scale=scale, needs=needs
        )
    rows = (q, k, v, a, b, log_decay)
    gradients = run_backward(
        segment, segment_backward, dy, dfinal_state, rows, initial_state, cu_seqlens, scale, config
    )
    return tuple(g if need and x is not None else None for g, x, need in zip(gradients, (*rows, initial_state), needs))
