"""Several linear maps of a few rows in one call, for decoding on CPUs. See projections.cpp.

One token's projections take as long as their weights take to arrive, and behind these the caches have forgotten the
code of whatever is called next: few calls are fast ones. Sums are float32 (float64 for float64) and rounded once; their
bits depend neither on the number of threads nor on the other maps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels import jit_cpp
from kernels.memory import DTYPES, address

SOURCE = Path(__file__).with_suffix(".cpp")
# with more rows, a product of matrices is faster
ROWS = 2
# fewer numbers in the weights than this are read before a second thread has woken up
SERIAL_SIZE = 65536


def linear_maps(maps: Sequence[tuple[Tensor, Tensor, Tensor | None]]) -> list[Tensor]:
    """x Wᵀ + b for each x [..., width], weight W [outputs, width] and bias b [outputs] or None.

    All are contiguous tensors on the CPU in one dtype, and every x has the same shape but for its width.
    """
    x = maps[0][0]
    outer = x.shape[:-1]
    fields: list[int] = []
    made, numbers = [], 0
    for row, weight, bias in maps:
        outputs, width = weight.shape
        y = torch.empty_like(row) if outputs == width else x.new_empty((*outer, outputs))
        made.append(y)
        fields += (row.data_ptr(), weight.data_ptr(), address(bias), y.data_ptr(), width, outputs)
        numbers += outputs * width
    threads = torch.get_num_threads() if numbers >= SERIAL_SIZE else 1
    _function(4 + len(fields))(len(made), outer.numel(), DTYPES[x.dtype], threads, *fields)
    return made


@functools.cache
def _function(fields: int) -> Callable[..., None]:
    return jit_cpp.load(SOURCE).function("projections", fields)
