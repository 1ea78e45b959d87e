"""What launches of Triton kernels share, whatever the op. Under TRITON_INTERPRET=1 they run on the CPU, for tests."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import triton_aot
from kernels.cards import CARDS

CONSTANTS = {torch.float32: triton.language.float32, torch.float64: triton.language.float64}


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
    # Of a program that walks: how many there are that each wait for a load, one after the other
    steps: int = 0

    def options(self, nvidia: bool) -> dict[str, int]:
        chosen = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        chosen |= {"maxnreg": self.registers} if nvidia else {}
        return {name: value for name, value in chosen.items() if value is not None}

    def __call__(self, device: torch.device) -> None:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[(self.programs,)](**self.arguments, **self.options(torch.version.hip is None))

    def compile_for(self, target: str) -> triton_aot.Compiled:
        options = self.options(target.startswith("sm_"))
        compiled = triton_aot.compile_kernel(self.kernel, self.arguments, target, programs=self.programs, **options)
        return replace(compiled, steps=self.steps)


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


def stages(config: Mapping[str, int], lanes: int) -> int:
    """A config's. Where warps have 64 threads, on AMD GPUs, rows on their way take up registers."""
    return min(config["num_stages"], 2) if lanes == 64 else config["num_stages"]


def distances(tensors: Mapping[str, Tensor | None]) -> dict[str, int]:
    """From one sequence to the next and from one row to the next, in numbers; 0 where there is only one or nothing."""
    found = {}
    for name, tensor in tensors.items():
        found[f"{name}_b"] = 0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0)
        found[f"{name}_t"] = 0 if tensor is None or tensor.shape[1] == 1 else tensor.stride(1)
    return found


def in_units(width: int, distances: Mapping[str, int]) -> dict[str, int]:
    """Distances in UNITs, a number that divides all of them and the width: the compiler, which knows it, may then move
    16 bytes at a time."""
    unit = math.gcd(8, width, *distances.values())
    return {name: distance // unit for name, distance in distances.items()} | {"UNIT": unit}


def compile_all(launches: Iterable[Launch], target: str) -> list[triton_aot.Compiled]:
    return [launch.compile_for(target) for launch in launches]
