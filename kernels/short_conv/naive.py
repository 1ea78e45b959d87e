"""The convolution as its definition: a loop over the taps, and the loops of its gradient. The others are held to it.

See formula.py for the equations and the arguments.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kernels.short_conv import formula


def forward(*tensors: Tensor | None, config: Any = None, **options: Any) -> tuple[Tensor, Tensor]:
    """(y, final_state)"""
    return formula.forward(*tensors, **options)  # type: ignore[arg-type]


def backward(*tensors: Tensor | None, config: Any = None, **options: Any) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias, dinitial_state)"""
    return formula.gradients(*tensors, **options)  # type: ignore[arg-type]
