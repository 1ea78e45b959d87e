"""What the device can do at most, measured: bytes a second of an addition, operations a second of a matrix product."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from autotune.device import synchronizer
from autotune.measure import measure

# Of each of the three tensors: the caches of a server's processor hold a few hundred.
ADDED_MIB = 512
MULTIPLIED = {"cpu": 1536, "cuda": 8192}
ROUNDS = 9


@cache
def bytes_per_second(device: torch.device) -> float:
    """Of the device's memory, by torch.add(a, b, out=c) in float32: two tensors are read, one is written."""
    a, b, c = _three(device, torch.float32, ADDED_MIB << 18)
    return 3 * a.nbytes / _seconds(device, lambda: torch.add(a, b, out=c))


@cache
def flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Of a square matrix product; a multiplication and an addition count as two."""
    n = MULTIPLIED.get(device.type, 2048)
    a, b, c = _three(device, dtype, n, n)
    return 2 * n**3 / _seconds(device, lambda: torch.mm(a, b, out=c))


def _three(device: torch.device, dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random numbers, twice, and room for a result: with all ones a processor takes less power, and may run faster."""
    a, b = (torch.rand(shape, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
    return a, b, torch.empty_like(a)


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    (timing,) = measure([run], rounds=ROUNDS, synchronize=synchronizer(device))
    if timing.error is not None:
        raise timing.error
    return timing.median
