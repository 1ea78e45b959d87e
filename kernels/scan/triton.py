"""The scan on GPUs: one launch forward, one launch backward, every byte read once and written once.

A warp walks down the rows of one sequence, 32 neighbouring numbers of a row wide (64 where a thread has two), and
every thread keeps whole columns in registers; triton_kernels.py has the kernels. Under TRITON_INTERPRET=1 they run on
the CPU, slowly, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import triton_aot
from kernels.memory import contiguous, side_by_side
from kernels.problem import Problem, state_dtype
from kernels.scan.triton_kernels import scan_backward, scan_forward

INTERPRETED = not isinstance(scan_forward, triton.JITFunction)
# From this many numbers to the rows of all sequences together, programs of four warps are still enough for any GPU
MANY_COLUMNS = 2**17
CONSTANTS = {torch.float32: triton.language.float32, torch.float64: triton.language.float64}


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    device = problem.device
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return [f"needs a CUDA or HIP device, the tensors are on {device.type}"]
    width = problem.sizes["D"] * (2 if problem.options["pairs"] else 1)
    if width >= 2**30:
        return [f"rows of {width} numbers; at most {2**30 - 1}"]
    if device.type == "cuda" and torch.cuda.is_available() and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return [f"needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"]
    return []


def configs(problem: Problem) -> Sequence[dict[str, int]]:
    """Candidates for the tuner, the default first.

    BT: rows of a tile. num_warps: warps side by side. num_stages: tiles in work or on their way. The rows named here
    are for 4 bytes to a thread; where a thread's numbers are wider there are fewer. A warp then takes at most 9 KiB of
    shared memory, so that at least a quarter of the warps that a GPU can hold are resident.
    The default is one warp to a program, or four where that leaves programs enough (see MANY_COLUMNS).
    """
    numbers = 2 if _two(problem.options["pairs"], _sequence(problem)) else 1
    sizes = [dtype.itemsize * numbers for dtype in problem.dtypes.values()]
    # A warp moves 512 bytes at a time, 16 to a thread: no tile may be smaller
    least, shrink = 16 // min(sizes), max(sizes) // 4
    if problem.direction == "forward":
        narrow, wide, other = (8, 1, 5), (8, 4, 4), (16, 1, 2)
    else:
        narrow, wide, other = (8, 1, 3), (8, 4, 3), (4, 1, 5)
    columns = problem.sizes["N"] * problem.sizes["D"] * (2 if problem.options["pairs"] else 1)
    order = (wide, narrow, other) if columns >= MANY_COLUMNS else (narrow, wide, other)
    return [
        {"BT": max(rows // shrink, least), "num_warps": num_warps, "num_stages": num_stages}
        for rows, num_warps, num_stages in order
    ]


def forward(
    a: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    reverse: bool,
    config: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    """h like x, and final_state [N, D] or [N, D, 2] in the dtype of states."""
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = x.new_empty((sequences, *x.shape[2:]), dtype=state_dtype(x.dtype))
    launch = _forward(a, x, initial_state, h, final_state, cu_seqlens, reverse, config, _lanes(x.device))
    launch(x.device)
    return h, final_state


def backward(
    dh: Tensor | None,
    dfinal_state: Tensor | None,
    a: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    reverse: bool,
    needs: tuple[bool, ...],
    config: Mapping[str, int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """da like a, dx like h and dinitial_state, each None where `needs` says so; what is not needed is not written."""
    da = torch.empty_like(a, memory_format=torch.contiguous_format) if needs[0] else None
    dx = torch.empty_like(h, memory_format=torch.contiguous_format) if needs[1] else None
    dinitial = None
    if needs[2] and initial_state is not None:
        dinitial = torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    lanes = _lanes(h.device)
    launch = _backward(dh, dfinal_state, a, h, initial_state, da, dx, dinitial, cu_seqlens, reverse, config, lanes)
    launch(h.device)
    return da, dx, dinitial


def compile_for(target: str, problem: Problem, config: Mapping[str, int]) -> list[triton_aot.Compiled]:
    """Compiles what the problem would launch for a GPU that need not be there, such as "sm_90" or "gfx942".

    Backward with every gradient, and with one of the final state where there is an initial state.
    """
    sizes, dtype = problem.sizes, _sequence(problem)
    pair = [2] if problem.options["pairs"] else []

    def sequence(like: torch.dtype) -> Tensor:
        return torch.empty([sizes["B"], sizes["T"], sizes["D"], *pair], dtype=like, device="meta")

    def state() -> Tensor:
        return torch.empty([sizes["N"], sizes["D"], *pair], dtype=state_dtype(dtype), device="meta")

    initial = state() if problem.options["initial_state"] else None
    packed = torch.empty(sizes["N"] + 1, dtype=torch.int32, device="meta") if problem.options["packed"] else None
    rest = packed, problem.options["reverse"], config, triton_aot.lanes(target)
    a, like_x = sequence(problem.dtypes["a"]), sequence(dtype)
    if problem.direction == "forward":
        launch = _forward(a, like_x, initial, like_x, state(), *rest)
    else:
        launch = _backward(like_x, initial, a, like_x, initial, a, like_x, initial, *rest)
    return [
        triton_aot.compile_kernel(
            launch.kernel, launch.arguments, target, programs=launch.programs, num_warps=launch.num_warps
        )
    ]


@dataclass(frozen=True)
class Launch:
    """A kernel and everything that it is launched with."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    num_warps: int

    def __call__(self, device: torch.device) -> None:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[(self.programs,)](**self.arguments, num_warps=self.num_warps)


def _forward(
    a: Tensor,
    x: Tensor,
    initial: Tensor | None,
    h: Tensor,
    final: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
    config: Mapping[str, int],
    lanes: int,
) -> Launch:
    tensors: dict[str, Tensor | None] = {"a": side_by_side(a), "x": side_by_side(x), "h": h}
    states: dict[str, Tensor | None] = {"initial": contiguous(initial), "final": final}
    distances = _distances(tensors)
    del distances["h_t"]
    return _launch(scan_forward, tensors | states, distances, x, cu_seqlens, reverse, config, lanes)


def _backward(
    dh: Tensor | None,
    dfinal: Tensor | None,
    a: Tensor,
    h: Tensor,
    initial: Tensor | None,
    da: Tensor | None,
    dx: Tensor | None,
    dinitial: Tensor | None,
    cu_seqlens: Tensor | None,
    reverse: bool,
    config: Mapping[str, int],
    lanes: int,
) -> Launch:
    read: dict[str, Tensor | None] = {
        "dh": None if dh is None else side_by_side(dh),
        "a": side_by_side(a),
        "h": side_by_side(h),
    }
    states = {"dfinal": contiguous(dfinal), "initial": contiguous(initial), "dinitial": dinitial}
    distances = _distances(read) | {"out_b": 0 if h.shape[0] == 1 else h.shape[1] * h[0, 0].numel()}
    tensors = read | states | {"da": da, "dx": dx}
    return _launch(scan_backward, tensors, distances, h, cu_seqlens, reverse, config, lanes)


def _launch(
    kernel: Any,
    tensors: dict[str, Tensor | None],
    distances: dict[str, int],
    like: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
    config: Mapping[str, int],
    lanes: int,
) -> Launch:
    """A launch for sequences like `like`: [B, T, D] or [B, T, D, 2]."""
    pairs = like.ndim == 4
    width = like.shape[2] * (2 if pairs else 1)
    two = _two(pairs, like.dtype)
    columns = config["num_warps"] * lanes * (2 if two else 1)
    # What divides every distance is told to the compiler, which may then move 16 bytes at a time
    unit = math.gcd(8, width, *distances.values())
    sequences = like.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    arguments = tensors | {name: distance // unit for name, distance in distances.items()}
    arguments |= {
        "cu_seqlens": contiguous(cu_seqlens),
        "T": like.shape[1],
        "W": width // unit,
        "UNIT": unit,
        "REVERSE": reverse,
        "PAIRS": pairs,
        "TWO": two,
        "STATE": CONSTANTS[state_dtype(like.dtype)],
        "BT": config["BT"],
        "BD": columns,
        # Where warps have 64 threads, on AMD GPUs, tiles on their way take up registers
        "STAGES": min(config["num_stages"], 2) if lanes == 64 else config["num_stages"],
    }
    return Launch(kernel, sequences * -(-width // columns), arguments, config["num_warps"])


def _two(pairs: bool, dtype: torch.dtype) -> bool:
    """Whether a thread has two numbers of a row: the parts of a pair, or two numbers of 16 bits."""
    return pairs or dtype.itemsize == 2


def _sequence(problem: Problem) -> torch.dtype:
    # The backward pass is posed by the residuals a, h
    return problem.dtypes["x" if "x" in problem.dtypes else "h"]


def _distances(tensors: Mapping[str, Tensor | None]) -> dict[str, int]:
    """From one sequence to the next and from one row to the next, in numbers; 0 where there is only one or nothing."""
    found = {}
    for name, tensor in tensors.items():
        found[f"{name}_b"] = 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)
        found[f"{name}_t"] = 0 if tensor is None or tensor.shape[1] == 1 else tensor.stride(1)
    return found


@functools.cache
def _lanes(device: torch.device) -> int:
    """The threads of a warp."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
