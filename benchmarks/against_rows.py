"""The rows of `against.py`: every op in both directions at every length, its calls with gradients, decoding."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

import torch
from against_trees import Row
from sizes import LAYERS, sizes_of

import mixers
from kernels.agreement import pose
from kernels.catalogue import OPS
from kernels.op import Op

LENGTHS = (1, 8, 32, 128, 512, 2048, 8192, 65536)
DTYPES = ("float32", "bfloat16")
# tokens before a step of decoding
PROMPT = 512
# What a call may move and compute at least; where it is more, these are halved, and those beside them are no larger
BYTES, FLOPS = 2**27, 2**33
LEAST = {("B", "N"): 1, ("H", "G"): 1, ("D",): 64, ("K", "V"): 16}


def rows(ops: Collection[str], layers: Collection[str], lengths: Sequence[int], dtypes: Sequence[str]) -> Iterator[Row]:
    """Short ones first. A step of decoding is a row of length 1."""
    for length in sorted(lengths):
        for dtype in dtypes:
            for name in ops:
                yield from of_op(OPS[name], length, dtype)
            if length == 1:
                sizes = {"dim": LAYERS[1], "B": LAYERS[0]}
                yield from (Row("mixer", name, "decode", PROMPT, dtype, sizes) for name in layers)


def of_op(op: Op, length: int, dtype: str) -> Iterator[Row]:
    for variant in ("real", "complex") if any(arg.pairs for arg in op.inputs) else ("",):
        facts = {"pairs": True} if variant == "complex" else {}
        sizes = small_enough(op, length, dtype)
        for direction in ("forward", "backward"):
            yield Row("op", op.name, direction, length, dtype, sizes, variant, facts)
        if length == 1:
            public = " ".join(filter(None, (variant, "through the op")))
            for direction in ("forward", "forward+backward"):
                yield Row("op", op.name, direction, length, dtype, sizes, public, facts)


def small_enough(op: Op, length: int, dtype: str) -> dict[str, int]:
    """All sizes but T."""
    # of one row: tensors would be drawn
    problem = pose(op, "forward", sizes_of(op, 1), dtype=getattr(torch, dtype), device=torch.device("cpu"))
    sizes = sizes_of(op, length)

    def too_much() -> bool:
        cost = op.cost(replace(problem, sizes=sizes))
        return cost.bytes > BYTES or cost.flops > FLOPS

    for (first, *others), least in LEAST.items():
        while sizes.get(first, 0) > least and too_much():
            sizes[first] //= 2
            sizes |= {axis: min(sizes[axis], sizes[first]) for axis in others if axis in sizes}
    return {axis: sizes[axis] for axis in sorted(sizes) if axis != "T"}


def everything() -> tuple[list[str], list[str]]:
    """Names of ops and of layers."""
    return list(OPS), mixers.names()
