"""What a backend can do on a device, asked with small problems of every kind."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch

from kernels.agreement import pose
from kernels.op import Op
from kernels.problem import Problem

# Sizes that no block or chunk divides; an op's other axes are 4.
SIZES = {"B": 2, "T": 101, "D": 37, "H": 4, "G": 2, "K": 12, "V": 20}


def sizes_of(op: Op, length: int = SIZES["T"], packed: int = 0) -> dict[str, int]:
    """Sizes for every axis of the op's tensors."""
    axes = {axis.partition("-")[0] for arg in (*op.inputs, *op.outputs) for axis in arg.letters}
    # as many keys S as queries T
    sizes = {axis: SIZES.get(axis, 4) for axis in axes} | {"T": length, "B": 1 if packed else SIZES["B"]}
    if "S" in sizes:
        sizes["S"] = length
    return {**sizes, "N": packed or sizes["B"]}


def kinds(op: Op) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a problem can have that another has not: a name for each kind, and the facts for `pose`."""
    given = inspect.signature(op.sample).parameters
    yield "plain", {}
    for name, default in op.options.items():
        if isinstance(default, bool):
            yield name, {name: not default}
    yield "packed", {"packed": True}
    if any(arg.pairs for arg in op.inputs):
        yield "complex", {"pairs": True}
        yield "complex packed", {"pairs": True, "packed": True}
    optional = {arg.name: bool(given[arg.name].default) for arg in op.inputs if arg.optional and arg.name in given}
    for default, word in ((True, "without"), (False, "with")):
        others = {name: not there for name, there in optional.items() if there == default}
        if others:
            yield f"{word} {' and '.join(others)}", others


def problem(
    op: Op, direction: str, dtype: torch.dtype, device: torch.device, length: int, facts: dict[str, Any]
) -> Problem:
    return pose(
        op, direction, sizes_of(op, length, 4 if facts.get("packed") else 0), dtype=dtype, device=device, **facts
    )


def backends_here(op: Op, device: torch.device) -> list[str]:
    """The backends that can run the op's plain problem on the device."""
    plain = problem(op, "forward", torch.float32, device, SIZES["T"], {})
    return [backend.name for backend in op.backends if not backend.cannot(plain)]
