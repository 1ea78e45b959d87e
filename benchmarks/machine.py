"""What the device can do at most, measured: bytes a second of an addition, operations a second of a matrix product."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from autotune.device import synchronizer
from autotune.measure import measure

# Of each of the three tensors: the caches of a server's processor hold a few hundred.
ADDED_MIB = 512
MULTIPLIED = {"cpu": 1536, "cuda": 8192}
ROUNDS = 9


@cache
def bytes_per_second(device: torch.device) -> float:
    """Of the device's memory, by torch.add(a, b, out=c) in float32: two tensors are read, one is written."""
    numbers = ADDED_MIB << 18
    a, b, c = (torch.ones(numbers, device=device) for _ in range(3))
    return 3 * a.nbytes / _seconds(device, lambda: torch.add(a, b, out=c))


@cache
def flops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """Of a square matrix product; a multiplication and an addition count as two."""
    n = MULTIPLIED.get(device.type, 2048)
    a, b, c = (torch.ones(n, n, device=device, dtype=dtype) for _ in range(3))
    return 2 * n**3 / _seconds(device, lambda: torch.mm(a, b, out=c))


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    (timing,) = measure([run], rounds=ROUNDS, synchronize=synchronizer(device))
    if timing.error is not None:
        raise timing.error
    return timing.median
