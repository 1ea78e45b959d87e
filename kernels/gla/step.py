"""One token of normalised linear attention in C++ for CPUs, with what stands around its recurrence. See native_step.h.

For one token every call costs more than its numbers: here features, gates, recurrence and division are one call. It has
no gradient, and nobody can watch it: where `can_step` says no, the same is made of gla.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import jit_cpp, pool
from kernels.gla.native import SERIAL_SIZE, SOURCE
from kernels.memory import DTYPES, address, columns_together, contiguous, heads
from kernels.problem import state_dtype
from kernels.registration import needs_gradient, plain, watched

_function = jit_cpp.functions(SOURCE)


def can_step(x: Tensor, state: Tensor, cu_seqlens: Tensor | None, backend: str, *others: Tensor) -> bool:
    """For x [B, T, ...], a state and all other tensors that would want a gradient."""
    return (
        x.shape[1] == 1
        and cu_seqlens is None
        and backend in ("auto", "native")
        and x.device.type == "cpu"
        and x.dtype in DTYPES
        and state.dtype == state_dtype(x.dtype)
        and not watched()
        and not needs_gradient((x, state, *others))
        and plain((x, state, *others))
        and jit_cpp.reason(SOURCE) is None
    )


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    *,
    scale: float,
    eps: float,
    gates: Sequence[Tensor] | None = None,
    cap: float | None = None,
) -> tuple[Tensor, ...]:
    """(y [B, 1, H, V] in v's dtype, final_state, and with gates their last maximum) of one token of each sequence.

        S' = f S + i k [v, 1]ᵀ,   [h, n] = scale · S'ᵀ q,   y = h / (max(|n|, floor) + eps)

    Args:
        q, k: [B, 1, H, K], or d < K numbers, of which K = 1 + d + d (d + 1) / 2 Taylor features are made.
        v: [B, 1, H, V].
        state: S [B, H, K, V + 1] in the state dtype.
        gates: logits of i and f [B, 1, H] and the maximum m [B, H], in the state dtype, of an mLSTM, whose floor is
            e^{-m'}; None: f = i = 1 and floor = 0.
        cap: of the logits, as cap · tanh(logits / cap); None for none.
    """
    q, k, v, state = columns_together(q), columns_together(k), columns_together(v), contiguous(state)
    y, final_state = pool.empty_like(v), torch.empty_like(state)
    i, f, m = (None, None, None) if gates is None else map(contiguous, gates)
    last = None if m is None else torch.empty_like(m)
    _function("gla_step", "7q3d19q")(
        *state.shape[:3],
        v.shape[3],
        DTYPES[q.dtype],
        torch.get_num_threads() if state.numel() >= SERIAL_SIZE else 1,
        q.shape[3],
        scale,
        eps,
        cap or 0.0,
        *heads(q),
        *heads(k),
        *heads(v),
        state.data_ptr(),
        address(i),
        address(f),
        address(m),
        y.data_ptr(),
        final_state.data_ptr(),
        address(last),
    )
    return (y, final_state) if last is None else (y, final_state, last)
