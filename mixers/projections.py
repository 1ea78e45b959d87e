"""Several projections of the same rows."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from kernels import jit_cpp
from kernels.memory import DTYPES
from kernels.projections import ROWS, SOURCE, linear_maps
from kernels.registration import watched

_FORWARD = nn.Linear.forward


def project(x: Tensor, *maps: nn.Module) -> list[Tensor]:
    """[m(x) for m in maps]; where these are plain linear maps, and x is a token or few without a gradient, in one call.

    Whatever somebody has put in a linear map's place, or hung on it, is called as the module that it is.
    """
    if not torch.is_grad_enabled() and not watched() and type(x) is Tensor and x.is_cpu and x.is_contiguous():
        width = x.shape[-1]
        if 0 < x.numel() <= ROWS * width and x.dtype in DTYPES and _unobserved():
            found = [_parameters(m, width, x.dtype) for m in maps]
            if None not in found:
                return linear_maps(x, found)  # type: ignore[arg-type]
    return [m(x) for m in maps]


def _unobserved() -> bool:
    """Does nothing look at every module's calls, or at every linear map's, and is there a compiler?"""
    hooks = modules._global_forward_hooks or modules._global_forward_pre_hooks
    return not hooks and nn.Linear.forward is _FORWARD and not torch._C._is_any_autocast_enabled() and _compiles()


@functools.cache
def _compiles() -> bool:
    return jit_cpp.reason(SOURCE) is None


def _parameters(m: Any, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear map; None if calling it may mean anything else."""
    if type(m) is not nn.Linear:
        return None
    own = m.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own or "_compiled_call_impl" in own:
        return None
    weight, bias = own["_parameters"].get("weight"), own["_parameters"].get("bias")
    if not _plain(weight, dtype) or weight.shape[1] != width or not (bias is None or _plain(bias, dtype)):
        return None
    return weight, bias


def _plain(t: Any, dtype: torch.dtype) -> bool:
    kind = type(t)
    return (kind is nn.Parameter or kind is Tensor) and t.dtype is dtype and t.is_cpu and t.is_contiguous()
