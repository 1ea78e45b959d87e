"""The sizes that the benchmarks take: those of a laptop on a CPU, on an accelerator those that fill it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kernels.agreement import Inputs, draw
from kernels.op import Op
from kernels.problem import Arg, Problem

# Widths of a small language model; an op's other axes are 4.
SIZES = {"B": 2, "D": 512, "H": 8, "G": 2, "K": 64, "V": 64, "W": 4}
# Of one with a billion parameters; smaller ones would time launches.
ACCELERATED = {**SIZES, "B": 8, "D": 2048, "H": 16, "G": 4}
# Numbers that a channel of Mamba's state has
KEYS = {"selective_scan": 16}
# Of layers: batch and width
LAYERS, ACCELERATED_LAYERS = (1, 512), (8, 1024)
# Rows that are drawn, where a tensor is made of copies of them
ROWS = 64


def accelerated(device: torch.device) -> bool:
    return device.type not in ("cpu", "meta")


def sizes_of(op: Op, length: int, device: torch.device | None = None) -> dict[str, int]:
    axes = {axis.partition("-")[0] for arg in (*op.inputs, *op.outputs) for axis in arg.letters}
    known = SIZES
    if device is not None and accelerated(device):
        known = {**ACCELERATED, "K": KEYS.get(op.name, ACCELERATED["K"])}
    sizes = {axis: known.get(axis, 4) for axis in axes}
    return {**sizes, "B": known["B"], "N": known["B"], "T": length, **({"S": length} if "S" in axes else {})}


def drawn(op: Op, problem: Problem) -> Inputs:
    """Tensors that pose a forward problem. On an accelerator a few rows are drawn, on the CPU as for everybody, and
    repeated through time: every byte is there, and drawing takes no longer than what is timed."""
    return draw(op, problem) if not accelerated(problem.device) else repeated(op, problem)


def repeated(op: Op, problem: Problem) -> Inputs:
    rows = min(problem.sizes["T"], ROWS)
    short = {**problem.sizes, **{axis: rows for axis in "TS" if axis in problem.sizes}}
    few = draw(op, replace(problem, sizes=short))
    tensors = tuple(_longer(arg, t, problem) for arg, t in zip(op.inputs, few.tensors))
    return Inputs(op, problem, tensors, few.cu_seqlens)


def _longer(arg: Arg, tensor: Tensor | None, problem: Problem) -> Tensor | None:
    if tensor is None:
        return None
    for axis, letter in enumerate(arg.letters):
        if letter in ("T", "S"):
            copies = [1] * tensor.ndim
            copies[axis] = -(-problem.sizes[letter] // tensor.shape[axis])
            tensor = tensor.repeat(copies).narrow(axis, 0, problem.sizes[letter]).contiguous()
    return tensor
