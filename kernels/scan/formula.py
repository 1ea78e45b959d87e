"""The gradient of a scan is the scan reversed: in terms of the public scan, so that it can be differentiated again.

    g[t] = dh[t] + conj(a[t+1]) g[t+1],   dx = g,   da[t] = g[t] conj(h[t-1]),   d initial = conj(a[first]) g[first]

where the row after a sequence's last carries the gradient of the final state with decay 1, and the row before its
first is the initial state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.packing import Packing
from kernels.scan.pairs import conjugate, multiply, ones


def gradients(
    scan: Callable[..., tuple[Tensor, Tensor]],
    dh: Tensor | None,
    dfinal_state: Tensor | None,
    a: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    reverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(da, dx, dinitial_state), by one call of scan(a, x, initial_state, reverse=, cu_seqlens=, backend=)."""
    pairs, step = h.ndim == 4, -1 if reverse else 1
    packing = Packing.of(h, cu_seqlens, reverse)
    first, last = packing.spread(packing.first_rows(), h), packing.spread(packing.last_rows(), h)
    a_next = torch.where(last, ones(a, pairs), a.roll(-step, 1))
    dh = torch.zeros_like(h) if dh is None else dh
    g, _ = scan(conjugate(a_next, pairs), dh, dfinal_state, reverse=not reverse, cu_seqlens=cu_seqlens, backend=backend)
    initial = packing.of_each_row(packing.given(initial_state, h))
    before = torch.where(first, initial.to(h.dtype), h.roll(step, 1))
    da = multiply(g, conjugate(before, pairs), pairs).to(a.dtype)
    carried = packing.at_first_rows(multiply(conjugate(a, pairs), g, pairs))
    return da, g, packing.unless_empty(carried.to(packing.given(None, h).dtype), packing.given(dfinal_state, h))
