"""A token alone: where a layer may compute it in one native call of its own (`kernels/*/step.py`), past the ops.

For one token every call costs more than its numbers. Such a call has no gradient, and nobody can watch it; it stands
for the native backend, whatever was measured of the ops that it takes the place of. A lock has its way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import autotune
from kernels import jit_cpp
from kernels.memory import DTYPES
from kernels.problem import state_dtype
from kernels.registration import plain, watched

_autocast = torch._C._is_any_autocast_enabled


def unobserved(source: Path) -> bool:
    """Does nobody trace, want a gradient or cast here, and is the library of `source` to be had?"""
    return not (watched() or torch.is_grad_enabled() or _autocast()) and jit_cpp.reason(source) is None


def alone(x: Tensor, cu_seqlens: Tensor | None, backend: str, source: Path) -> bool:
    """Is x [B, T, ...] one token of each sequence, that the library of `source` may be called for here and now?"""
    if x.shape[1] > 1 or cu_seqlens is not None or backend not in ("auto", "native") or autotune.lock() is not None:
        return False
    return unobserved(source)


def readable(x: Tensor, others: Iterable[Tensor | None], states: Iterable[Tensor | None]) -> bool:
    """Are these plain tensors on a CPU, x and the others in its dtype, the states in the state dtype?"""
    others, states = (x, *others), (*states,)
    for tensors, dtype in ((others, x.dtype), (states, state_dtype(x.dtype))):
        for t in tensors:
            if t is not None and not (t.dtype is dtype and t.is_cpu):
                return False
    return x.dtype in DTYPES and plain((*others, *states))


def expect(op: str, **given: tuple[Tensor | None, Sequence[int]]) -> None:
    """Raises a ValueError that names the first tensor that has another shape than stands beside it."""
    for name, (x, shape) in given.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{op}: {name} is {list(x.shape)}, expected {list(shape)}")


def addresses(dtype: torch.dtype, *tensors: tuple[Any, tuple[int, ...]]) -> list[int] | None:
    """Of tensors that have this dtype and the shapes beside them, and that native code can read; 0 for None in place of
    a row. Otherwise None."""
    found = []
    for t, shape in tensors:
        if t is None and len(shape) < 2:
            found.append(0)
            continue
        kind = type(t)
        if not (kind is Parameter or kind is Tensor) or t.dtype is not dtype or t.shape != shape:
            return None
        if not (t.is_cpu and t.is_contiguous()):
            return None
        found.append(t.data_ptr())
    return found
