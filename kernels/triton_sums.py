"""The small launch after a backward pass that adds what its programs have summed, in one order and without atomics."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_launch import CONSTANTS, Launch

# Programs that each add as many pieces at a time, for as many columns
ADD = {"BP": 32, "BD": 64}


@triton.jit(do_not_specialize=["pieces"])
def add_pieces(
    partial, most, last, pieces, D, P: tl.constexpr, STATE: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr
):
    blocks = tl.cdiv(D, BD)
    # A program has BD columns of row k of every piece
    k = tl.program_id(0) // blocks + (P - 1 if most is None else 0)
    column = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    inside = column < D
    place = partial + k.to(tl.int64) * D + column[None, :]
    sums = tl.zeros([BP, BD], STATE)
    for piece in tl.range(0, pieces, BP):
        row = (piece + tl.arange(0, BP))[:, None]
        sums += tl.load(place + row.to(tl.int64) * P * D, (row < pieces) & inside[None, :], other=0.0)
    total = tl.sum(sums, 0)
    if most is not None:
        tl.store(most + column.to(tl.int64) * (P - 1) + k, total.to(most.dtype.element_ty), inside & (k < P - 1))
    if last is not None:
        tl.store(last + column, total.to(last.dtype.element_ty), inside & (k == P - 1))


def add(partial: Tensor, most: Tensor | None, last: Tensor | None) -> Launch:
    """The sums over all pieces [n, P, D]: of their last rows into `last` [D], of the others into `most` [D, P - 1].

    What is None is not read either.
    """
    pieces, P, D = partial.shape
    rows = (0 if most is None else P - 1) + (0 if last is None else 1)
    numbers = {"pieces": pieces, "D": D, "P": P, "STATE": CONSTANTS[partial.dtype], **ADD}
    arguments = {"partial": partial, "most": most, "last": last, **numbers}
    return Launch(add_pieces, rows * -(-D // ADD["BD"]), arguments, 4)
