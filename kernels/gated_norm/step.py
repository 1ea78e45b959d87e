"""The gated norm of a token alone, past the op with its views, signature and plan. See kernels/lone.py."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.gated_norm.native import ACTIVATIONS, FIELDS, RUN_SIZE, SERIAL_SIZE, SOURCE, _function
from kernels.lone import alone, readable
from kernels.memory import DTYPES
from kernels.problem import state_dtype


def step(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    center: bool,
    activation: str,
    gate_first: bool,
    eps: float,
) -> Tensor | None:
    """`gated_norm` of x [B, 1, H, V] or [B, 1, V], as [B, 1, H · V]; None where the op is to be asked, or to refuse."""
    if not alone(x, None, "auto", SOURCE) or (gate is not None and activation not in ACTIVATIONS):
        return None
    batch, one, *heads, width = x.shape
    wide, H = state_dtype(x.dtype), heads[0] if heads else 1
    if weight is not None and weight.dtype != wide:
        weight = weight.to(wide)
    if bias is not None and bias.dtype != wide:
        bias = bias.to(wide)
    parameters = [t for t in (weight, bias) if t is not None]
    if not readable(x, (gate,), parameters) or not x.is_contiguous():
        return None
    columns = H * width
    if gate is not None and not (gate.is_contiguous() and gate.shape in ((batch, one, columns), x.shape)):
        return None
    for t in parameters:
        if not t.is_contiguous() or t.shape not in ((width,), (H, width)):
            return None
    y = x.new_empty(batch, one, columns)
    _function("gated_norm_forward", f"{FIELDS}q")(
        batch,
        one,
        H,
        width,
        center,
        0 if gate is None else ACTIVATIONS[activation],
        gate_first and gate is not None,
        DTYPES[x.dtype],
        torch.get_num_threads() if batch * columns >= SERIAL_SIZE else 1,
        max(1, RUN_SIZE // columns),
        False,
        eps,
        x.data_ptr(),
        columns,
        columns,
        *((0, 0, 0) if gate is None else (gate.data_ptr(), columns, columns)),
        *(field for t in (weight, bias) for field in _parameter(t)),
        y.data_ptr(),
    )
    return y


def _parameter(t: Tensor | None) -> tuple[int, int]:
    """native.h's Parameter."""
    return (0, 0) if t is None else (t.data_ptr(), t.shape[-1] if t.ndim == 2 else 0)
