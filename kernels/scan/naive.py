"""The scan as its definition: a loop over time, and the loop of its gradient. Everything else is held to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.packing import Packing
from kernels.problem import state_dtype
from kernels.scan.pairs import conjugate, multiply


def forward(
    a: Tensor, x: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, *, reverse: bool, config: Any = None
) -> tuple[Tensor, Tensor]:
    """h[t] = a[t] h[t-1] + x[t]; the state is kept in the state dtype and rounded only where it is written to h."""
    pairs, state, packing = x.ndim == 4, state_dtype(x.dtype), Packing.of(x, cu_seqlens, reverse)
    initial = packing.given(initial_state, x)
    first, initial_of = packing.first_rows(), packing.of_each_row(initial).expand(-1, x.shape[1], *x.shape[2:])
    rows = []
    current = initial_of[:, 0]
    for t in packing.times:
        current = torch.where(first[t], initial_of[:, t], current)
        current = multiply(a[:, t].to(state), current, pairs) + x[:, t].to(state)
        rows.append(current)
    h = torch.stack(rows[:: -1 if reverse else 1], 1)
    return h.to(x.dtype), packing.unless_empty(packing.at_last_rows(h), initial).clone()


def backward(
    dh: Tensor | None,
    dfinal_state: Tensor | None,
    a: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    reverse: bool,
    needs: tuple[bool, ...] = (True, True, True),
    config: Any = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """c[t] = conj(a[t]) (dh[t] + c[t+1]);  dx[t] = g = dh[t] + c[t+1];  da[t] = g conj(h[t-1]);  d initial = c[first].

    c past a sequence's last row is the gradient of its final state; h before its first row is the initial state.
    """
    pairs, state, packing = h.ndim == 4, state_dtype(h.dtype), Packing.of(h, cu_seqlens, reverse)
    initial, dfinal = packing.given(initial_state, h), packing.given(dfinal_state, h)
    first, last = packing.first_rows(), packing.last_rows()
    initial_of = packing.of_each_row(initial).expand(-1, *h.shape[1:])
    dfinal_of = packing.of_each_row(dfinal).expand(-1, *h.shape[1:])
    das, dxs, carries = [], [], []
    carried = dfinal_of[:, 0]
    h_before = h.roll(-1 if reverse else 1, 1)
    for t in packing.times[::-1]:
        g = torch.where(last[t], dfinal_of[:, t], carried)
        if dh is not None:
            g = g + dh[:, t].to(state)
        before = torch.where(first[t], initial_of[:, t], h_before[:, t].to(state))
        carried = multiply(conjugate(a[:, t].to(state), pairs), g, pairs)
        das.append(multiply(g, conjugate(before, pairs), pairs).to(a.dtype))
        dxs.append(g.to(h.dtype))
        carries.append(carried)
    order = 1 if reverse else -1
    dinitial = None
    if needs[2]:
        dinitial = packing.unless_empty(packing.at_first_rows(torch.stack(carries[::order], 1)), dfinal).clone()
    return (
        torch.stack(das[::order], 1) if needs[0] else None,
        torch.stack(dxs[::order], 1) if needs[1] else None,
        dinitial,
    )
