"""Ops in torch's own operators, for exported programs that run where this package is not: in C++, on a phone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from kernels.catalogue import OPS
from kernels.gla import transposed
from kernels.op import Op
from kernels.transforms import by_loop


def decompositions() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.export` may put in the place of every op: its loop, row by row.

        program = torch.export.export(mixer, (x, state)).run_decompositions(decompositions())

    has none of this package's operators left, whatever backend was named. A program of one token of each sequence is
    what decoding needs; one of T tokens has T times as many operations from its recurrence, and T is fixed.

    Raises (the functions that are returned):
        ValueError: the length is dynamic.
    """
    found: dict[Callable[..., Any], Callable[..., Any]] = {
        op.forward_overload: partial(_loop, op) for op in OPS.values()
    }
    return found | {transposed.OVERLOAD: _transposed}


def _loop(op: Op, *args: Any) -> tuple[Tensor, ...] | list[Tensor]:
    _check_length(op.name, args[0])
    outputs = by_loop(op, (*args[:-1], "auto"))
    # as the operator has them
    return outputs if len(outputs) > 1 else list(outputs)


def _transposed(*args: Any) -> tuple[Tensor, Tensor]:
    _check_length(transposed.NAME, args[0])
    return transposed.by_loop(*args[:-1], "auto")


def _check_length(op: str, x: Tensor) -> None:
    if not isinstance(x.shape[1], int):
        raise ValueError(
            f"{op}: the length is dynamic ({x.shape[1]}), and a loop over it is not; export a fixed length"
        )
