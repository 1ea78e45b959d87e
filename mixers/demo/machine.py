"""What this machine is good at: bfloat16 matrix products, and memory that is not handed back between steps."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

# bfloat16 must be this much faster to be worth its rounding.
WORTH = 1.3


def bfloat16_speedup(device: torch.device, *, rows: int, dim: int) -> float:
    """How many times faster a linear layer [rows, dim] -> [rows, 2 dim] is in bfloat16 than in float32, both ways."""

    def seconds(dtype: torch.dtype) -> float:
        x = torch.randn(rows, dim, device=device, dtype=dtype, requires_grad=True)
        weight = torch.randn(2 * dim, dim, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn(rows, 2 * dim, device=device, dtype=dtype)
        return _fastest(lambda: torch.autograd.grad(F.linear(x, weight), (x, weight), dy), device)

    return seconds(torch.float32) / seconds(torch.bfloat16)


def keep_freed_memory() -> None:
    """Tells glibc to keep large blocks for the next step: handing them back costs a page fault for every 4 KiB again.

    Elsewhere it does nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
        mallopt(-3, 1 << 30)
        mallopt(-1, (1 << 31) - 1)


def _fastest(run: Callable[[], object], device: torch.device, rounds: int = 5) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
