"""Gated linear attention by flash-linear-attention's Triton kernels, where that is installed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels import foreign
from kernels.foreign import Kernel
from kernels.loop import wanted
from kernels.problem import Problem

KERNELS = (
    Kernel("fla.ops.gla:chunk_gla", ("key",)),
    Kernel("fla.ops.gla:fused_recurrent_gla", ("key",), "gk"),
    Kernel("fla.ops.simple_gla:chunk_simple_gla", ("none", "head")),
    Kernel("fla.ops.simple_gla:fused_recurrent_simple_gla", ("none", "head")),
)

startup = foreign.startup


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
    if config["kernel"].startswith("fused_recurrent"):
        found = _recurrent_backward(dy, dfinal_state, q, k, v, log_decay, initial_state, cu_seqlens, scale)
        return wanted((*found, None), (q, k, v, log_decay, initial_state, bonus), needs)
    inputs = {"q": q, "k": k, "v": v, "log_decay": log_decay, "initial_state": initial_state}
    run = foreign.matrix_state(config, KERNELS, cu_seqlens, scale)
    return (*foreign.gradients(config["kernel"], run, inputs, needs, (dy, dfinal_state)), None)


def _recurrent_backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dlog_decay, dinitial_state) by the recurrent kernel alone, which makes the states again itself."""
    theirs = foreign.function("fla.ops.common.fused_recurrent:fused_recurrent_bwd")
    given: dict[str, Tensor | None] = {"q": q, "k": k, "v": v, "do": torch.zeros_like(v) if dy is None else dy}
    given |= {"dht": dfinal_state, "initial_state": initial_state}
    if log_decay is not None:
        given |= {"g": log_decay.squeeze(3)} if log_decay.shape[3] == 1 else {"gk": log_decay}
    tensors = {name: None if t is None else t.contiguous() for name, t in given.items()}
    with torch.cuda.device_of(q):
        dq, dk, dv, dg, dgk, _, dinitial = theirs(**tensors, scale=scale, cu_seqlens=foreign.bounds(cu_seqlens))
    return dq, dk, dv, dgk if dg is None else dg[..., None], dinitial
