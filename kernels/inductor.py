"""torch.compile for the small functions that `compiled` backends are made of."""

from __future__ import annotations

import importlib.util
import types
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from kernels.jit_cpp import BuildError, compiler

_compiled: dict[Any, Callable[..., Any]] = {}


@cache
def reason(device_type: str) -> str | None:
    """Why Inductor cannot generate code for the device; None if it can."""
    if device_type == "cpu":
        try:
            compiler()
        except BuildError as error:
            return str(error)
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def compiled(function: Callable[..., Any], *tensors: Tensor, **flags: bool | str) -> Any:
    """function(*tensors, **flags) as generated code, one graph for all sizes; as it is where no code can be generated.

    Every combination of dtypes, ranks and flags has a code object of its own, so that none counts against another's
    recompilation limit.
    """
    tensors = tuple(t.detach() for t in tensors)
    device = tensors[0].device.type
    # sizes of one are constants to torch.compile and would each need a graph; such problems are small
    tiny = tensors[0].shape[1] == 1 or tensors[0].shape[-1] == 1
    if tiny or reason(device) is not None:
        return function(*tensors, **flags)
    key = (function, device, tuple(flags.items()), tensors[0].shape[0] == 1, *[(t.dtype, t.ndim) for t in tensors])
    call = _compiled.get(key)
    if call is None:
        call = _compiled[key] = _compile(function)
    with torch.no_grad():
        return call(*tensors, **flags)


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    assert isinstance(function, types.FunctionType)
    copy = types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, function.__defaults__
    )
    fast = torch.compile(copy, dynamic=True, fullgraph=True)
    failed = False

    def call(*args: Any, **flags: Any) -> Any:
        nonlocal failed
        if not failed:
            try:
                return fast(*args, **flags)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                failed = True
                cause = str(error).strip().splitlines()[0]
                message = f"torch.compile failed, {function.__name__} runs uncompiled: {cause}"
                warnings.warn(message, RuntimeWarning, stacklevel=3)
        return function(*args, **flags)

    return call
