"""The gated norm of a token alone, past the op with its signature and plan. See kernels/lone.py."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels.gated_norm import native
from kernels.lone import alone, readable
from kernels.problem import state_dtype


def step(x: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None, **options: Any) -> Tensor | None:
    """`gated_norm` of x [B, 1, H, V] or [B, 1, V], as [B, 1, H · V]; None where the op is to be asked, or to refuse.

    options: center, activation, gate_first and eps, as the op has them.
    """
    known = gate is None or options["activation"] in native.ACTIVATIONS
    if not (known and alone(x, None, "auto", native.SOURCE) and x.is_contiguous()):
        return None
    rows = x if x.ndim == 4 else x.unsqueeze(2)
    wide, (batch, one, H, width) = state_dtype(x.dtype), rows.shape
    parameters: list[Any] = []
    for t in (weight, bias):
        if t is not None:
            if t.shape not in ((width,), (H, width)):
                return None
            t = (t if t.dtype == wide else t.to(wide)).expand(H, width)
        parameters.append(t)
    if not readable(x, (gate,), parameters):
        return None
    if gate is not None:
        if not (gate.is_contiguous() and gate.shape in ((batch, one, H * width), x.shape)):
            return None
        gate = gate.view(rows.shape)
    weight, bias = parameters
    (y,) = native.forward(rows, gate, weight, bias, None, **options, config=native.DEFAULT)
    return y.view(batch, one, -1)
