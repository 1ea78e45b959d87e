"""The gates in plain torch, and the scan by flash-linear-attention's HGRN kernels, where that is installed.

Their kernels take the logarithms of decays. λ is positive, and its logarithm is made from that of σ(f), not from λ; so
the adapter sits here, and not at `kernels.scan`, whose decays may be negative.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import foreign
from kernels.foreign import Kernel
from kernels.hgru.gates import gates, gates_backward
from kernels.loop import wanted
from kernels.packing import Packing
from kernels.problem import Problem

RECURRENT = Kernel("fla.ops.hgrn:fused_recurrent_hgrn")
KERNELS = (RECURRENT, Kernel("fla.ops.hgrn:chunk_hgrn", packed=False))

startup = foreign.startup


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    if problem.options["pairs"]:
        return ["states are real"]
    if problem.options["reverse"]:
        return ["time runs forwards"]
    return foreign.cannot(problem, KERNELS)


def configs(problem: Problem) -> list[dict[str, str]]:
    """One candidate a kernel."""
    return foreign.configs(problem, KERNELS)


def forward(
    i: Tensor,
    f: Tensor,
    lower_bound: Tensor | None,
    theta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    activation: str,
    reverse: bool,
    config: Mapping[str, str],
) -> tuple[Tensor, Tensor]:
    """h [B, T, D] and final_state [N, D]."""
    kernel = foreign.chosen(config, KERNELS)
    with torch.no_grad():
        x, g = _inputs(i, f, lower_bound, activation)
        h, final = _run(kernel, cu_seqlens)(x=x, g=g, initial_state=initial_state)
    return h.to(i.dtype), final


def backward(
    dh: Tensor | None,
    dfinal_state: Tensor | None,
    i: Tensor,
    f: Tensor,
    h: Tensor,
    lower_bound: Tensor | None,
    theta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    activation: str,
    reverse: bool,
    needs: tuple[bool, ...],
    config: Mapping[str, str],
) -> tuple[Tensor | None, ...]:
    """(di, df, dlower_bound, None, dinitial_state), each None where `needs` says so.

    The gradient of λ is made from that of x, dx[t] h[t-1]: theirs of log λ would have to be divided by λ.
    """
    x, g = _inputs(i, f, lower_bound, activation)
    h = h.to(x.dtype)
    kernel = foreign.chosen(config, KERNELS)
    dx: Tensor | None
    if kernel is RECURRENT:
        dx, dinitial = _backward(g, h, dh, dfinal_state, initial_state, cu_seqlens)
    else:
        inputs = {"x": x, "g": g, "initial_state": initial_state}
        given = None if dh is None else dh.to(x.dtype), dfinal_state
        run = _run(kernel, cu_seqlens)
        dx, _, dinitial = foreign.gradients(kernel.name, run, inputs, (True, True, needs[4]), given)
    assert dx is not None
    packing = Packing.of(h, cu_seqlens, False)
    initial, first = packing.of_each_row(packing.given(initial_state, h)), packing.spread(packing.first_rows(), h)
    da = dx * torch.where(first, initial, h.roll(1, 1))
    di, df, dbound, _ = gates_backward(i, f, da, dx, lower_bound, None, activation)
    return wanted((di, df, dbound, None, dinitial), (i, f, lower_bound, None, initial_state), needs)


def _inputs(i: Tensor, f: Tensor, lower_bound: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """The scan's inputs (1 − λ) act(i), and log λ, [B, T, D] in the state dtype."""
    decay, x = gates(i, f, lower_bound, None, activation)
    g = F.logsigmoid(f.to(decay.dtype))
    if lower_bound is not None:
        # finite also where the bound is zero and the gate saturates: their kernels subtract logarithms
        g = torch.logaddexp(lower_bound.log(), torch.log1p(-lower_bound) + g)
    return x.contiguous(), g.contiguous()


def _run(kernel: Kernel, cu_seqlens: Tensor | None) -> foreign.Run:
    theirs = foreign.function(kernel.path)
    packed = {} if cu_seqlens is None else {"cu_seqlens": foreign.bounds(cu_seqlens)}
    return lambda **tensors: theirs(**tensors, output_final_state=True, **packed)


def _backward(
    g: Tensor,
    h: Tensor,
    dh: Tensor | None,
    dfinal_state: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """dx and the initial state's gradient by the recurrent kernel, which needs h and not another forward pass."""
    theirs = foreign.function("fla.ops.hgrn.fused_recurrent:fused_recurrent_hgrn_bwd")
    dh = torch.zeros_like(h) if dh is None else dh.to(h.dtype).contiguous()
    dfinal, initial = (None if t is None else t.contiguous() for t in (dfinal_state, initial_state))
    with torch.cuda.device_of(h):
        dx, _, dinitial = theirs(
            g=g, o=h.contiguous(), do=dh, dht=dfinal, initial_state=initial, cu_seqlens=foreign.bounds(cu_seqlens)
        )
    return dx, dinitial
