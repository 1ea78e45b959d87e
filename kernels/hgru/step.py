"""One token of a whole HGRN layer in one native call, from its input to its output. See step.cpp.

Behind the traffic of the weights every call from Python costs two or three times what it costs elsewhere; there is one.
Sums are float32 (float64 for float64); of 16-bit layers only y is rounded. The bits do not depend on the number of
threads. Why there is such a call is in kernels/lone.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels import jit_cpp
from kernels.lone import addresses
from kernels.memory import DTYPES
from kernels.problem import state_dtype
from kernels.projections import SERIAL_SIZE

SOURCE = Path(__file__).with_suffix(".cpp")
_function = jit_cpp.functions(SOURCE)


def step(
    x: Tensor,
    state: Tensor,
    maps: Sequence[tuple[Any, Any]],
    norm: tuple[Any, Any],
    theta: Any,
    lower_bound: Tensor | float,
    *,
    width: int,
    center: bool,
    gate_first: bool,
    eps: float,
) -> tuple[Tensor, Tensor] | None:
    """y [B, 1, dim] and the state after it; None where the modules and ops are to be asked, or to refuse: a tensor has
    another shape or dtype than stands here, is no plain one on the CPU, or does not lie side by side.

        i, f, g = W_i x, W_f x, W_g x,   λ = γ + (1 − γ) σ(f),   h' = λ e^{iθ} h + (1 − λ) silu(i)
        y = W_o (norm(h') ⊙ silu(g)), or W_o norm(h' ⊙ silu(g));  the norm is of all of a token's numbers

    Args:
        x: [B, 1, dim]; all but the state and γ is in its dtype.
        state: h [B, D], D = width; or, with theta, pairs [B, D, 2]. In the state dtype.
        maps: weight and bias, or None, of W_i [N, dim], W_f [D, dim], W_g [N, dim] and W_o [dim, N]; N = D, or 2 D
            with theta: [Re h' | Im h'] is what W_o sees, and g goes with; rows 2 j and 2 j + 1 of W_i make a pair.
        norm: its weight and bias [N], or None.
        theta: θ [1, D] or None.
        lower_bound: γ, or γ [D] in the state dtype.
        center: the norm subtracts the mean first.
        eps: added to the mean square.
    """
    dtype, (batch, _, dim) = x.dtype, x.shape
    if dtype not in DTYPES:
        return None
    x, state = x.contiguous(), state.contiguous()
    numbers, shape = (width, (batch, width)) if theta is None else (2 * width, (batch, width, 2))
    square, row, wide = (numbers, dim), (numbers,), state_dtype(dtype)
    (i, i_bias), (f, f_bias), (g, g_bias), (o, o_bias) = maps
    given = addresses(
        dtype, (x, (batch, 1, dim)), (i, square), (i_bias, row), (f, (width, dim)), (f_bias, (width,)), (g, square),
        (g_bias, row), (o, (dim, numbers)), (o_bias, (dim,)), (norm[0], row), (norm[1], row),
        (theta, () if theta is None else (1, width)),
    )  # fmt: skip
    gamma, bound = (lower_bound, 0.0) if isinstance(lower_bound, Tensor) else (None, lower_bound)
    carried = addresses(wide, (state, shape), (gamma, (width,)))
    if given is None or carried is None:
        return None
    y, after = torch.empty_like(x), torch.empty_like(state)
    _function("hgru_step", "8q2d16q")(
        batch,
        dim,
        width,
        theta is not None,
        center,
        gate_first,
        DTYPES[dtype],
        torch.get_num_threads() if dim * numbers >= SERIAL_SIZE else 1,
        eps,
        bound,
        *given,
        *carried,
        y.data_ptr(),
        after.data_ptr(),
    )
    return y, after
