"""How tensors are handed to native and Triton code: addresses, layouts, and numbers for pairs of dtypes."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from kernels.problem import Problem

# dtypes of sequences in the order in which native code counts them
DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
# (dtype of decays, dtype of sequences) in the order in which native code counts them
FORMATS = {
    (torch.float64, torch.float64): 0,
    (torch.float32, torch.float32): 1,
    (torch.float16, torch.float16): 2,
    (torch.float32, torch.float16): 3,
    (torch.bfloat16, torch.bfloat16): 4,
    (torch.float32, torch.bfloat16): 5,
}

Maybe = TypeVar("Maybe", Tensor, "Tensor | None")


def no_kernel(problem: Problem, *names: str) -> list[str]:
    """Why native code cannot read these inputs, a sequence or decays and a sequence; empty if it can."""
    dtypes = tuple(problem.dtypes[name] for name in names)
    if dtypes in FORMATS or (len(dtypes) == 1 and dtypes[0] in DTYPES):
        return []
    return ["no kernel for " + " with ".join(f"{name} in {dtype}" for name, dtype in zip(names, dtypes))]


def bounds(cu_seqlens: Tensor | None) -> Tensor | None:
    """As native code reads them: int64, side by side."""
    return None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()


def longest(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """Rows of the longest sequence in x [B, T, ...]."""
    return x.shape[1] if cu_seqlens is None else int(cu_seqlens.diff().max())


def sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many there are in x [B, T, ...]."""
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def side_by_side(x: Maybe) -> Maybe:
    """x [B, T, D] or [B, T, D, 2] if its columns (and pairs) lie side by side, else a copy; batch and time may have any
    strides."""
    if x is None:
        return x
    stride = x.stride()
    return x if stride[-1] == 1 and stride[2] == len(stride) - 2 else x.contiguous()


def columns_together(x: Maybe) -> Maybe:
    """x [B, T, H, D] if its last axis lies side by side, else a copy; the others may have any strides."""
    return x if x is None or x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def heads(x: Tensor | None) -> tuple[int, ...]:
    """x [B, T, H, D] with its columns together as matrix.h's Heads: address, and the strides of B, T and H."""
    return (0, 0, 0, 0) if x is None else (x.data_ptr(), *x.stride()[:3])


def heads_side_by_side(x: Tensor) -> Tensor:
    """x [B, T, H, V] if the numbers of each row lie side by side, else a copy; batch and time may have any strides."""
    if x.is_contiguous():
        return x
    heads, width = x.shape[2:]
    return x if x.stride(3) == 1 and (heads == 1 or x.stride(2) == width) else x.contiguous()


def contiguous(x: Maybe) -> Maybe:
    return x if x is None else x.contiguous()
