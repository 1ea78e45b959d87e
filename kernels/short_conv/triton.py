"""The convolution on GPUs: one launch forward; backward one and a small one that adds what programs have summed.

Time is cut into chunks, so that there are programs enough whatever the batch; triton_kernels.py has the kernels. Under
TRITON_INTERPRET=1 they run on the CPU, slowly, for tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import triton_aot, triton_sums
from kernels.memory import contiguous, side_by_side
from kernels.problem import Problem, state_dtype
from kernels.short_conv.triton_kernels import conv_backward, conv_forward
from kernels.triton_launch import CONSTANTS, Launch, compile_all, distances, in_units, lanes, missing, stages

INTERPRETED = not isinstance(conv_forward, triton.JITFunction)
# A thread keeps some rows for each tap in registers
MOST_TAPS = 16
# From this many numbers in x on, long chunks leave programs enough for any GPU
MANY_NUMBERS = 2**26


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    sizes, reasons = problem.sizes, missing(problem.device, INTERPRETED)
    if sizes["W"] > MOST_TAPS:
        reasons.append(f"{sizes['W']} taps; at most {MOST_TAPS}")
    if max(sizes["D"], sizes["T"]) >= 2**30:
        reasons.append(f"an axis of {max(sizes['D'], sizes['T'])}; at most {2**30 - 1}")
    return reasons


def configs(problem: Problem) -> Sequence[dict[str, int]]:
    """Candidates for the tuner, the default first.

    CT: rows of a program. BT: of a tile; num_stages: of those in work or on their way. num_warps: warps side by side.
    At least a quarter of the warps that a GPU can hold are resident, but backward with more than 5 taps in float64:
    sums, taps and two windows of rows, each W numbers of two registers, are more than a thread may then have.
    Beside its rows a program moves its taps, those at its borders, and backward its sums, W + 1 numbers for each of its
    columns: in bfloat16 4 % of all bytes forward with 128 rows, backward 10 % with 128 and 2 % with 512.
    """
    sizes, forward, size = problem.sizes, problem.direction == "forward", problem.dtypes["x"].itemsize
    tile, other = (4, 2) if size == 8 else (8, 4) if forward else (4, 8)
    if sizes["W"] * max(size, 4) > 32:
        # Many taps leave registers for no more rows than make 16 bytes of a thread's column
        tile = other = 16 // size
    short = {"CT": 32, "BT": tile, "num_warps": 1, "num_stages": 3}
    longer = [128] if forward else [128, 512]
    first = sum(sizes["B"] * sizes["T"] * sizes["D"] >= MANY_NUMBERS * rows // 128 for rows in longer)
    found = [{**short, "CT": rows} for rows in (32, *longer)]
    order = [found.pop(first), *found]
    return [*order, {**short, "BT": other, "num_stages": 2}, {**short, "num_stages": 1}]


def _two(dtype: torch.dtype, taps: int, lanes: int) -> bool:
    """Whether a thread has two columns. Many taps leave too few registers for that on NVIDIA's GPUs, and on AMD's too
    few for rows on their way beside it."""
    return dtype.itemsize == 2 and (taps <= 8 or lanes == 64)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    activation: str,
    reverse: bool,
    config: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    """y like x, and final_state [N, W - 1, D] in x's dtype."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = x.new_empty((sequences, weight.shape[1] - 1, x.shape[2]))
    given = _Given(x, weight, bias, initial_state, cu_seqlens, activation, reverse, config, lanes(x.device))
    given.forward(y, final_state)(x.device)
    return y, final_state


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    activation: str,
    reverse: bool,
    needs: tuple[bool, ...],
    config: Mapping[str, int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias and dinitial_state, each like its input, or None where `needs` says so."""
    inputs = x, weight, bias, initial_state
    found = tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed and tensor is not None else None
        for tensor, needed in zip(inputs, needs)
    )
    given = _Given(*inputs, cu_seqlens, activation, reverse, config, lanes(x.device))
    for launch in given.backward(dy, dfinal_state, *found):
        launch(x.device)
    return found  # type: ignore[return-value]


def compile_for(target: str, problem: Problem, config: Mapping[str, int]) -> list[triton_aot.Compiled]:
    """Compiles what the problem would launch for a GPU that need not be there, such as "sm_90" or "gfx942".

    Backward with every gradient, and with one of the final state where there is an initial state.
    """
    sizes, options, dtype = problem.sizes, problem.options, problem.dtypes["x"]

    def tensor(*letters: int, like: torch.dtype = dtype) -> Tensor:
        return torch.empty(letters, dtype=like, device="meta")

    B, T, D, W, N = (sizes[letter] for letter in "BTDWN")
    x, weight = tensor(B, T, D), tensor(D, W, like=problem.dtypes["weight"])
    bias = tensor(D, like=problem.dtypes["bias"]) if options["bias"] else None
    state = tensor(N, W - 1, D) if options["initial_state"] else None
    packed = tensor(N + 1, like=torch.int32) if options["packed"] else None
    facts = options["activation"], options["reverse"], config, triton_aot.lanes(target)
    given = _Given(x, weight, bias, state, packed, *facts)
    if problem.direction == "forward":
        launches = [given.forward(x, tensor(N, W - 1, D))]
    else:
        launches = given.backward(x, state, x, weight, bias, state)
    return compile_all(launches, target)


@dataclass(frozen=True)
class _Given:
    """The inputs, and how they are launched."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial_state: Tensor | None
    cu_seqlens: Tensor | None
    activation: str
    reverse: bool
    config: Mapping[str, int]
    lanes: int

    def forward(self, y: Tensor, final: Tensor) -> Launch:
        return self._launch(conv_forward, {"x": side_by_side(self.x)}, {"y": y, "final": final}, "y_b")

    def backward(
        self,
        dy: Tensor | None,
        dfinal: Tensor | None,
        dx: Tensor | None,
        dweight: Tensor | None,
        dbias: Tensor | None,
        dinitial: Tensor | None,
    ) -> list[Launch]:
        D, W = self.weight.shape
        summed = dweight is not None or dbias is not None
        partial = self.x.new_empty((self._pieces, W + 1, D), dtype=state_dtype(self.x.dtype)) if summed else None
        read = {"dy": side_by_side(dy), "x": side_by_side(self.x)}
        rest = {"dfinal": contiguous(dfinal), "dx": dx, "dinitial": dinitial, "partial": partial}
        launches = [self._launch(conv_backward, read, rest, "dx_b")]
        if partial is not None:
            launches.append(triton_sums.add(partial, dweight, dbias))
        return launches

    @property
    def _pieces(self) -> int:
        """A piece for every chunk of every sequence; where their lengths are unknown, no fewer than that."""
        batch, length = self.x.shape[:2]
        if self.cu_seqlens is None:
            return batch * -(-length // self.config["CT"])
        return length // self.config["CT"] + self.cu_seqlens.shape[0] - 1

    def _launch(
        self, kernel: Any, read: Mapping[str, Tensor | None], rest: Mapping[str, Tensor | None], out_batch: str
    ) -> Launch:
        batch, length, D = self.x.shape
        W, config = self.weight.shape[1], self.config
        units = in_units(D, distances(read) | {out_batch: 0 if batch == 1 else length * D})
        state, two = state_dtype(self.x.dtype), _two(self.x.dtype, W, self.lanes)
        block = config["num_warps"] * self.lanes * (2 if two else 1)
        arguments: dict[str, Any] = {
            **read,
            **rest,
            **units,
            "weight": self.weight.contiguous(),
            "bias": contiguous(self.bias),
            "initial": contiguous(self.initial_state),
            "cu_seqlens": contiguous(self.cu_seqlens),
            "T": length,
            "N": batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1,
            "D": D // units["UNIT"],
            "REVERSE": self.reverse,
            "SILU": self.activation == "silu",
            "W": W,
            "P": triton.next_power_of_2(max(W - 1, 4)),
            "STATE": CONSTANTS[state],
            "TWO": two,
            "CT": config["CT"],
            "BT": config["BT"],
            "BD": block,
            "STAGES": 1 if two and W > 8 else stages(config, self.lanes),
        }
        # NVIDIA's assembler else takes some more for the window and the sums, and fewer warps are resident; but many
        # wide taps need more
        most = 5 if state == torch.float64 else MOST_TAPS
        registers = 128 if kernel is conv_backward and most >= W else None
        return Launch(kernel, self._pieces * -(-D // block), arguments, config["num_warps"], registers=registers)
