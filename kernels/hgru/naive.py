"""The recurrence as its definition: the gates, a loop over time, and the loop of its gradient.

The loops are those of `kernels.scan.naive`, in the state dtype; what is written is rounded once.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels.hgru.gates import gates, gates_backward
from kernels.loop import wanted
from kernels.problem import state_dtype
from kernels.scan import naive as scan


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
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """h like i, and final_state [N, D] or [N, D, 2] in the state dtype."""
    decay, x = gates(i, f, lower_bound, theta, activation)
    h, final_state = scan.forward(decay, x, initial_state, cu_seqlens, reverse=reverse)
    return h.to(i.dtype), final_state


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
    needs: tuple[bool, ...] = (True, True, True, True, True),
    config: Any = None,
) -> tuple[Tensor | None, ...]:
    """(di, df, dlower_bound, dtheta, dinitial_state), each None where `needs` says so."""
    wide = state_dtype(i.dtype)
    decay, _ = gates(i, f, lower_bound, theta, activation)
    dh = None if dh is None else dh.to(wide)
    da, dx, dinitial = scan.backward(
        dh, dfinal_state, decay, h.to(wide), initial_state, cu_seqlens, reverse=reverse, needs=(True, True, needs[4])
    )
    assert da is not None
    assert dx is not None
    found = (*gates_backward(i, f, da, dx, lower_bound, theta, activation), dinitial)
    return wanted(found, (i, f, lower_bound, theta, initial_state), needs)
