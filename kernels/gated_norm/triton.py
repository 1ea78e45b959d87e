"""The gated norm on GPUs: one launch forward; backward one and a small one that adds what programs have summed.

triton_kernels.py has the kernels. Under TRITON_INTERPRET=1 they run on the CPU, slowly, for tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import triton_aot, triton_sums
from kernels.gated_norm.triton_kernels import norm_backward, norm_forward
from kernels.memory import contiguous, heads_side_by_side
from kernels.problem import Problem, state_dtype
from kernels.triton_launch import CONSTANTS, Launch, compile_all, distances, in_units, lanes, missing, stages

INTERPRETED = not isinstance(norm_forward, triton.JITFunction)
ACTIVATIONS = ("identity", "silu", "sigmoid")
# Numbers of a head, whose 4 bytes each (or more) stay in the registers of one program
MOST_WIDTH = 4096
# Rows of a program backward where programs are many anyway, so that its sums are few beside them
MANY_ROWS, LONG, SHORT = 32768, 128, 32


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    reasons = missing(problem.device, INTERPRETED)
    if reasons:
        return reasons
    sizes, wide = problem.sizes, problem.dtypes["x"].itemsize == 8
    most = MOST_WIDTH // 2 if wide else MOST_WIDTH
    if sizes["V"] > most:
        reasons.append(f"heads of {sizes['V']} numbers; at most {most} in {problem.dtypes['x']}")
    if sizes["B"] * sizes["T"] * sizes["H"] >= 2**30:
        reasons.append(f"{sizes['B'] * sizes['T'] * sizes['H']} heads in all; at most {2**30 - 1}")
    activation = problem.options["activation"]
    if activation not in ACTIVATIONS and problem.options["gate"]:
        reasons.append(f"no kernel for activation {activation!r}")
    return reasons


def configs(problem: Problem) -> Sequence[dict[str, int]]:
    """Candidates for the tuner, the default first.

    numbers: of a tile and a thread, for numbers of up to 4 bytes. warps: at least as many warps share a tile, if heads
    are wide. CT: rows of a program backward, num_stages: tiles of those in work or on their way. Forward a program has
    one tile, and other programs work while it waits.
    """
    if problem.direction == "forward":
        return [{"numbers": 16, "warps": 4}, {"numbers": 8, "warps": 4}, {"numbers": 16, "warps": 1}]
    many = problem.sizes["B"] * problem.sizes["T"] * problem.sizes["H"] >= MANY_ROWS
    rows = [LONG, SHORT] if many else [SHORT, LONG]
    return [{"numbers": 8, "warps": warps, "CT": count, "num_stages": 2} for warps in (4, 1) for count in rows]


def forward(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    center: bool,
    activation: str,
    gate_first: bool,
    eps: float,
    config: Mapping[str, int],
) -> tuple[Tensor]:
    """(y,) like x."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    given = _Given(x, gate, weight, bias, center, activation, gate_first, eps, config, lanes(x.device))
    given.forward(y)(x.device)
    return (y,)


def backward(
    dy: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    center: bool,
    activation: str,
    gate_first: bool,
    eps: float,
    needs: tuple[bool, ...],
    config: Mapping[str, int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dgate, dweight, dbias), each like its input, or None where `needs` says so or there is no such input."""
    inputs = x, gate, weight, bias
    found = tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed and tensor is not None else None
        for tensor, needed in zip(inputs, needs)
    )
    given = _Given(*inputs, center, activation, gate_first, eps, config, lanes(x.device))
    for launch in given.backward(torch.zeros_like(x) if dy is None else dy, *found):
        launch(x.device)
    return found  # type: ignore[return-value]


def compile_for(target: str, problem: Problem, config: Mapping[str, int]) -> list[triton_aot.Compiled]:
    """Compiles what the problem would launch for a GPU that need not be there, such as "sm_90" or "gfx942".

    Backward with every gradient.
    """
    sizes, options = problem.sizes, problem.options

    def tensor(name: str, letters: str) -> Tensor | None:
        if not options.get(name, True):
            return None
        return torch.empty([sizes[letter] for letter in letters], dtype=problem.dtypes[name], device="meta")

    x, gate = tensor("x", "BTHV"), tensor("gate", "BTHV")
    weight, bias = tensor("weight", "HV"), tensor("bias", "HV")
    assert x is not None, "x is not optional"
    named = (options["center"], options["activation"], options["gate_first"], options["eps"])
    given = _Given(x, gate, weight, bias, *named, config, triton_aot.lanes(target))
    if problem.direction == "forward":
        return compile_all([given.forward(x)], target)
    return compile_all(given.backward(x, x, gate, weight, bias), target)


@dataclass(frozen=True)
class _Given:
    """The inputs, and how they are launched."""

    x: Tensor
    gate: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    center: bool
    activation: str
    gate_first: bool
    eps: float
    config: Mapping[str, int]
    lanes: int

    def forward(self, y: Tensor) -> Launch:
        return self._launch(norm_forward, {"x": self.x, "gate": self.gate}, {"y": y}, None)

    def backward(
        self, dy: Tensor, dx: Tensor | None, dgate: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
    ) -> list[Launch]:
        state, (batch, length, heads, width) = state_dtype(self.x.dtype), self.x.shape
        chunks, partial = -(-batch * length // self.config["CT"]), None
        if dweight is not None or dbias is not None:
            partial = self.x.new_empty((chunks, 2, heads * width), dtype=state)
        read = {"x": self.x, "gate": self.gate, "dy": dy}
        kinds = {"DWEIGHT": dweight is not None, "DBIAS": dbias is not None, "CT": self.config["CT"]}
        kinds["STAGES"] = stages(self.config, self.lanes)
        written = {"dx": dx, "dgate": dgate, "partial": partial, **kinds}
        launches = [self._launch(norm_backward, read, written, self.config["CT"])]
        if partial is not None:
            launches.append(triton_sums.add(partial, dweight, dbias))
        return launches

    def _launch(
        self, kernel: Any, read: Mapping[str, Tensor | None], rest: Mapping[str, Any], rows: int | None
    ) -> Launch:
        """rows: of a program; None: as many as a tile has."""
        batch, length, heads, width = self.x.shape
        state = state_dtype(self.x.dtype)
        tensors = {name: None if tensor is None else heads_side_by_side(tensor) for name, tensor in read.items()}
        block = triton.next_power_of_2(width)
        numbers = max(1, self.config["numbers"] * 4 // state.itemsize)
        tile = max(block, self.config["warps"] * self.lanes * numbers)
        tile_rows = tile // block if rows is None else min(tile // block, rows)
        warps = min(max(1, tile_rows * block // (self.lanes * numbers)), 1024 // self.lanes)
        arguments: dict[str, Any] = {
            **tensors,
            **rest,
            **in_units(width, distances(tensors)),
            "weight": contiguous(self.weight),
            "bias": contiguous(self.bias),
            "rows": batch * length,
            "T": length,
            "H": heads,
            "V": width,
            "EPS": self.eps,
            "CENTER": self.center,
            "ACTIVATION": self.activation,
            "GATE_FIRST": self.gate_first and self.gate is not None,
            "STATE": CONSTANTS[state],
            "R": tile_rows,
            "BV": block,
        }
        return Launch(kernel, heads * -(-batch * length // (rows or tile_rows)), arguments, warps)
