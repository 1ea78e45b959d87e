"""The delta rule by flash-linear-attention's Triton kernels, where that is installed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels import foreign
from kernels.foreign import Kernel
from kernels.problem import Problem

KERNELS = (
    Kernel("fla.ops.delta_rule:fused_recurrent_delta_rule", ("none",)),
    Kernel("fla.ops.delta_rule:chunk_delta_rule", ("none",), narrow=True, keys=256),
    Kernel("fla.ops.gated_delta_rule:chunk_gated_delta_rule", ("head",), keys=256),
    Kernel("fla.ops.gated_delta_rule:fused_recurrent_gated_delta_rule", ("head",), gradients=False),
    Kernel("fla.ops.kda:chunk_kda", ("key",), keys=256),
    Kernel("fla.ops.kda:fused_recurrent_kda", ("key",), gradients=False),
)

startup = foreign.startup


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    if problem.options["scale"] <= 0:
        return [f"scale is {problem.options['scale']}; must be positive"]
    return foreign.cannot(problem, KERNELS)


def configs(problem: Problem) -> list[dict[str, str]]:
    """One candidate a kernel."""
    return foreign.configs(problem, KERNELS)


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
    config: Mapping[str, str],
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V], final_state [N, H, K, V])"""
    run = foreign.matrix_state(config, KERNELS, cu_seqlens, scale)
    with torch.no_grad():
        return run(q=q, k=k, v=v, beta=beta, log_decay=log_decay, initial_state=initial_state)


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
    config: Mapping[str, str],
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dbeta, dlog_decay, dinitial_state), each None where `needs` says so."""
    inputs = {"q": q, "k": k, "v": v, "beta": beta, "log_decay": log_decay, "initial_state": initial_state}
    run = foreign.matrix_state(config, KERNELS, cu_seqlens, scale)
    return foreign.gradients(config["kernel"], run, inputs, needs, (dy, dfinal_state))
