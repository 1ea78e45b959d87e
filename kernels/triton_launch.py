"""What launches of Triton kernels share; for recurrences with a vector state also layouts, widths, split time."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import triton_aot
from kernels.cards import CARDS, LONG
from kernels.problem import Problem, state_dtype

CONSTANTS = {torch.float32: triton.language.float32, torch.float64: triton.language.float64}
# From so many steps on, chunks of 256 steps: the launch over chunks is then no longer a walk than the other two
VERY_LONG = 2**15


@dataclass(frozen=True)
class Launch:
    """A kernel and everything that it is launched with."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    num_warps: int
    # Of loads on their way; None: Triton's own choice
    num_stages: int | None = None
    # A thread's at most, where the compiler can be told (NVIDIA); None: as many as it likes
    registers: int | None = None

    def options(self, nvidia: bool) -> dict[str, int]:
        chosen = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        chosen |= {"maxnreg": self.registers} if nvidia else {}
        return {name: value for name, value in chosen.items() if value is not None}

    def __call__(self, device: torch.device) -> None:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[(self.programs,)](**self.arguments, **self.options(torch.version.hip is None))

    def compile_for(self, target: str) -> triton_aot.Compiled:
        options = self.options(target.startswith("sm_"))
        return triton_aot.compile_kernel(self.kernel, self.arguments, target, programs=self.programs, **options)


def missing(device: torch.device, interpreted: bool) -> list[str]:
    """What keeps Triton from running on this device."""
    if device.type != "cuda" and not (interpreted and device.type == "cpu"):
        return [f"needs a CUDA or HIP device, the tensors are on {device.type}"]
    if device.type == "cuda" and torch.cuda.is_available() and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return [f"needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"]
    return []


@functools.cache
def lanes(device: torch.device) -> int:
    """The threads of a warp."""
    return torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """An H100's, where there is no GPU to ask."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return CARDS["sm_90"].multiprocessors
    return torch.cuda.get_device_properties(device).multi_processor_count


def with_splits(
    carried: list[dict[str, int]], split: Mapping[str, int], problem: Problem, columns: int
) -> list[dict[str, int]]:
    """Candidates that carry the state through time, and beside them `split` with chunks of 64 and of 256 steps.

    The rule: split time first where sequences are LONG and programs of one warp, which have so many columns, are fewer
    than the GPU's multiprocessors; then chunks of 256 steps first where sequences are VERY_LONG. A chunk is never
    longer than the rows.
    """
    sizes = problem.sizes
    chunks = [256, 64] if mean_length(problem) >= VERY_LONG else [64, 256]
    others = [{**split, "split": rows} for rows in chunks if rows < sizes["T"]]
    width = sizes["D"] * (2 if problem.options["pairs"] else 1)
    programs = sizes["N"] * -(-width // columns)
    few = programs < multiprocessors(problem.device) and mean_length(problem) >= LONG
    return others + carried if few else carried + others


def mean_length(problem: Problem) -> int:
    return problem.sizes["B"] * problem.sizes["T"] // problem.sizes["N"]


def two(pairs: bool, dtype: torch.dtype) -> bool:
    """Whether a thread has two numbers of a row: the parts of a pair, or two numbers of 16 bits."""
    return pairs or dtype.itemsize == 2


def stages(config: Mapping[str, int], lanes: int) -> int:
    """Where warps have 64 threads, on AMD GPUs, tiles on their way take up registers."""
    return min(config["num_stages"], 2) if lanes == 64 else config["num_stages"]


def distances(tensors: Mapping[str, Tensor | None]) -> dict[str, int]:
    """From one sequence to the next and from one row to the next, in numbers; 0 where there is only one or nothing."""
    found = {}
    for name, tensor in tensors.items():
        found[f"{name}_b"] = 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)
        found[f"{name}_t"] = 0 if tensor is None or tensor.shape[1] == 1 else tensor.stride(1)
    return found


def in_units(width: int, distances: Mapping[str, int]) -> dict[str, int]:
    """W, distances and the UNIT that they are given in. It divides all of them: the compiler may then move 16 bytes at
    a time."""
    unit = math.gcd(8, width, *distances.values())
    return {name: distance // unit for name, distance in distances.items()} | {"W": width // unit, "UNIT": unit}


@dataclass(frozen=True)
class Sequences:
    """How many sequences there are, how many rows together, and into how many chunks of C steps they are cut."""

    batch: int
    length: int
    cu_seqlens: Tensor | None
    chunk: int | None

    @classmethod
    def of(cls, x: Tensor, cu_seqlens: Tensor | None, config: Mapping[str, int]) -> Sequences:
        """Of rows x [B, T, ...]; time is carried where the config says so, and where one chunk would have all rows."""
        chunk = config.get("split", 0)
        if chunk >= x.shape[1]:
            chunk = 0
        assert chunk % config["BT"] == 0, f"chunks of {chunk} steps in tiles of {config['BT']}"
        return cls(x.shape[0], x.shape[1], None if cu_seqlens is None else cu_seqlens.contiguous(), chunk or None)

    @property
    def count(self) -> int:
        return self.batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def pieces(self) -> int:
        """Chunks of all sequences; where their lengths are unknown, no fewer than that. Sequences, if carried."""
        if self.chunk is None:
            return self.count
        if self.cu_seqlens is None:
            return self.batch * -(-self.length // self.chunk)
        return self.length // self.chunk + self.count

    @property
    def arguments(self) -> dict[str, Any]:
        return {"cu_seqlens": self.cu_seqlens, "T": self.length, "N": self.count, "C": self.chunk}


@dataclass(frozen=True)
class Rows:
    """How kernels are launched on rows of `width` numbers of this dtype: one program for each piece and each block of
    columns, which a warp has 32 threads for (AMD: 64)."""

    width: int
    pairs: bool
    dtype: torch.dtype
    sequences: Sequences
    config: Mapping[str, int]
    lanes: int

    def launch(
        self,
        kernel: Any,
        tensors: Mapping[str, Tensor | None],
        distances: Mapping[str, int],
        *,
        per_sequence: bool = False,
        **constants: Any,
    ) -> Launch:
        both, num_warps = two(self.pairs, self.dtype), self.config["num_warps"]
        columns = num_warps * self.lanes * (2 if both else 1)
        arguments: dict[str, Any] = {
            **tensors,
            **in_units(self.width, distances),
            **self.sequences.arguments,
            **constants,
            "PAIRS": self.pairs,
            "TWO": both,
            "STATE": CONSTANTS[state_dtype(self.dtype)],
            "BT": self.config["BT"],
            "BD": columns,
            "STAGES": stages(self.config, self.lanes),
        }
        pieces = self.sequences.count if per_sequence else self.sequences.pieces
        return Launch(kernel, pieces * -(-self.width // columns), arguments, num_warps)

    def batch_stride(self) -> int:
        """Of contiguous rows."""
        return 0 if self.sequences.batch == 1 else self.sequences.length * self.width


def tiles(rows: int, num_warps: int, num_stages: int, sizes: Iterable[int]) -> dict[str, int]:
    """A config for tiles of so many rows, if a thread's numbers of a row are 4 bytes, and fewer if they are wider.

    sizes: those bytes, for each stream.
    """
    # A warp moves 512 bytes at a time, 16 to a thread: no tile may be smaller
    sizes = list(sizes)
    return {"BT": max(rows * 4 // max(sizes), 16 // min(sizes)), "num_warps": num_warps, "num_stages": num_stages}


def compile_all(launches: Iterable[Launch], target: str) -> list[triton_aot.Compiled]:
    return [launch.compile_for(target) for launch in launches]
