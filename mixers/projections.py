"""Several projections at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from kernels.lone import unobserved
from kernels.memory import DTYPES
from kernels.projections import ROWS, SOURCE, linear_maps

_FORWARD = nn.Linear.forward


def project(x: Tensor, *maps: nn.Module | None) -> list[Any]:
    """[m(x) for m in maps], None for None; those that are plain linear maps in one call, where x is a token or few
    without a gradient.

    Whatever somebody has put in a linear map's place, or hung on it, is called as the module that it is.
    """
    return project_each([(x, m) for m in maps])


def project_each(pairs: Sequence[tuple[Tensor, nn.Module | None]]) -> list[Any]:
    """[m(x) for x, m in pairs] likewise, every x having the same shape."""
    found: list[Any] = [None] * len(pairs)
    first = pairs[0][0]
    if nn.Linear.forward is _FORWARD and _few(first) and unobserved(SOURCE):
        found = [_parameters(m, x, first) for x, m in pairs]
    plain = [map for map in found if map is not None]
    made = iter(linear_maps(plain) if plain else ())
    return [next(made) if p is not None else None if m is None else m(x) for p, (x, m) in zip(found, pairs)]


def untouched(module: Any, kind: type[nn.Module]) -> bool:
    """Is it of just this kind, and would nobody miss its call?"""
    own = module.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or "_compiled_call_impl" in own:
        return False
    return type(module) is kind and not (modules._global_forward_hooks or modules._global_forward_pre_hooks)


def _few(x: Tensor) -> bool:
    """Is it a token or few, as native code reads them?"""
    few = type(x) is Tensor and x.is_cpu and x.is_contiguous() and x.dtype in DTYPES
    return few and 0 < x.numel() <= ROWS * x.shape[-1]


def _parameters(m: Any, x: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Input, weight and bias of a linear map; None if calling it may mean anything else, or is an error."""
    if type(m) is not nn.Linear or not untouched(m, nn.Linear) or x.shape != first.shape:
        return None
    if x is not first and not (_few(x) and x.dtype is first.dtype):
        return None
    own, dtype = m.__dict__["_parameters"], first.dtype
    # False: what is no parameter is nothing that can be read
    weight, bias = own.get("weight"), own.get("bias", False)
    if not _plain(weight, dtype) or weight.ndim != 2 or weight.shape[1] != first.shape[-1]:
        return None
    if bias is not None and not (_plain(bias, dtype) and bias.shape == weight.shape[:1]):
        return None
    return x, weight, bias


def _plain(t: Any, dtype: torch.dtype) -> bool:
    kind = type(t)
    return (kind is nn.Parameter or kind is Tensor) and t.dtype is dtype and t.is_cpu and t.is_contiguous()
