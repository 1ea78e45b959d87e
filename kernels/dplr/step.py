"""One token of a whole RWKV-7 layer in one native call, from its input to its output. See step.cpp.

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
    before: Tensor,
    state: Tensor,
    mixes: Any,
    maps: Sequence[tuple[Any, Any]],
    key: tuple[Any, Any],
    bonus: Any,
    norm: tuple[Any, Any],
    *,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor] | None:
    """y [B, 1, dim] and the state after it; None where the modules and ops are to be asked, or to refuse: a tensor has
    another shape or dtype than stands here, is no plain one on the CPU, or a parameter does not lie side by side.

        x^c = x + μ_c ⊙ (before − x)   for each c of r, w, k, v, a, g
        r, u, v = W_r x^r, W_k x^k, W_v x^v,   g = W_g↑ σ(W_g↓ x^g)
        log d = −e^(−½) σ(W_w↑ tanh(W_w↓ x^w)),   η = σ(W_a↑ W_a↓ x^a)
        κ = ξ ⊙ u / max(|ξ ⊙ u|, 10^-12),   k = u ⊙ (1 + (η − 1) ⊙ α)
        S' = diag(d) S − (η ⊙ κ) (Sᵀ κ)ᵀ + k vᵀ,   o = S'ᵀ r,   head by head
        y = W_o ((norm(o) + (Σ ρ ⊙ r ⊙ k) v) ⊙ g)

    Args:
        x, before: the token and the one before it [B, 1, dim]; all but the state is in their dtype.
        state: S [B, H, K, K] in the state dtype, H K = dim.
        mixes: μ [6, dim].
        maps: weight and bias, or None, of W_r, W_w↓, W_k, W_v, W_a↓ and W_g↓, then of W_w↑, W_a↑, W_g↑ and W_o.
        key: ξ and α [dim].
        bonus: ρ [H, K].
        norm: weight and bias [H, K] of a layer norm of each head; eps is added to the variance.
    """
    dtype, (batch, _, dim), K = x.dtype, x.shape, x.shape[2] // heads
    ranks = [maps[n][0].shape[0] for n in (1, 4, 5)]
    widths = dim, ranks[0], dim, dim, ranks[1], ranks[2]
    # outputs and inputs of each map
    shapes = *((width, dim) for width in widths), *((dim, rank) for rank in ranks), (dim, dim)
    if dtype not in DTYPES or key[0] is None or key[1] is None:
        return None
    x, before, state, token, head = x.contiguous(), before.contiguous(), state.contiguous(), (batch, 1, dim), (heads, K)
    parameters = [pair for (weight, bias), shape in zip(maps, shapes) for pair in ((weight, shape), (bias, shape[:1]))]
    given = addresses(
        dtype, (x, token), (before, token), (mixes, (6, dim)), *parameters, (key[0], (dim,)), (key[1], (dim,)),
        (bonus, head), (norm[0], head), (norm[1], head),
    )  # fmt: skip
    carried = addresses(state_dtype(dtype), (state, (batch, heads, K, K)))
    if given is None or carried is None:
        return None
    y, after = torch.empty_like(x), torch.empty_like(state)
    _function("dplr_step", "8qd31q")(
        batch,
        dim,
        heads,
        *ranks,
        DTYPES[dtype],
        torch.get_num_threads() if dim * dim >= SERIAL_SIZE else 1,
        eps,
        *given,
        *carried,
        y.data_ptr(),
        after.data_ptr(),
    )
    return y, after
