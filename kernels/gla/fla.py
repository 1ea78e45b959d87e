"""Gated linear attention by flash-linear-attention's Triton kernels, where that is installed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels import foreign
from kernels.foreign import Kernel
from kernels.problem import Problem

KERNELS = (
    Kernel("fla.ops.gla:chunk_gla", ("key",)),
    Kernel("fla.ops.gla:fused_recurrent_gla", ("key",), "gk"),
    Kernel("fla.ops.simple_gla:chunk_simple_gla", ("none", "head")),
    Kernel("fla.ops.simple_gla:fused_recurrent_simple_gla", ("none", "head")),
)


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    if problem.options["bonus"]:
        return ["takes no bonus"]
    return foreign.cannot(problem, KERNELS)


def configs(problem: Problem) -> list[dict[str, str]]:
    """One candidate a kernel."""
    return foreign.configs(problem, KERNELS)


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
    config: Mapping[str, str],
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V], final_state [N, H, K, V])"""
    run = foreign.matrix_state(config, KERNELS, cu_seqlens, scale)
    with torch.no_grad():
        return run(q=q, k=k, v=v, log_decay=log_decay, initial_state=initial_state)


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
    config: Mapping[str, str],
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dlog_decay, dinitial_state, None), each None where `needs` says so."""
    inputs = {"q": q, "k": k, "v": v, "log_decay": log_decay, "initial_state": initial_state}
    run = foreign.matrix_state(config, KERNELS, cu_seqlens, scale)
    return (*foreign.gradients(config["kernel"], run, inputs, needs, (dy, dfinal_state)), None)
