"""One token of GLA, HGRN2 and RWKV-6 in C++ for CPUs, with all that stands between their projections.

Decays, the recurrence and the gated norm are one call. See gated_step.cpp; why there is such a call is in
kernels/lone.py. Elsewhere the same is made of gla and gated_norm. The bits do not depend on the number of threads.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from kernels import jit_cpp
from kernels.gated_norm.native import ACTIVATIONS
from kernels.gla.step import SERIAL_SIZE
from kernels.memory import DTYPES
from kernels.problem import state_dtype

SOURCE = Path(__file__).with_suffix(".cpp")
# in the order in which gated_step.cpp counts them
LOGARITHMS, LOGITS, GATES = range(3)
_function = jit_cpp.functions(SOURCE)


def step(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    decay: Tensor,
    gate: Tensor | None,
    state: Tensor,
    *,
    heads: int,
    scale: float | None = None,
    temperature: float | None = None,
    lower_bound: Tensor | float = 0.0,
    bonus: Tensor | None = None,
    weight: Tensor | None,
    bias: Tensor | None,
    whole: bool = False,
    center: bool,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y [B, 1, H · V] in v's dtype, and the state after one token of each sequence.

        S' = diag(a) S + k vᵀ,   o = scale · S'ᵀ q, or with a bonus u   o = scale · (S + diag(u) k vᵀ)ᵀ q
        y = (norm(o) ⊙ weight + bias) ⊙ act(gate)

    Args:
        q, k, decay: [B, 1, H · K]. decay is log a, in the state dtype; or, with a temperature, logits:
            log a = log σ(decay) / temperature; or, where k is None, those of gates that are bounded from below by γ:
            a = γ + (1 − γ) σ(decay), k = 1 − a, and q stands for SiLU(q).
        v, gate: [B, 1, H · V]; no gate is 1.
        state: S [B, H, K, V] in the state dtype; all that is not said to be is in v's dtype.
        heads: H.
        scale: None for K^-½.
        lower_bound: γ, or γ [H · K] in the state dtype.
        bonus: u [H, K].
        weight, bias: [numbers of a norm], or [norms of a token, numbers of each]; None for ones and zeros.
        whole: a token has one norm, of all heads; else there is one of each head.
        center: the norm subtracts the mean first.
        activation: one of kernels.gated_norm.native.ACTIVATIONS.
        eps: added to the mean square.

    Raises:
        ValueError: a shape does not fit. TypeError: the state is not in v's state dtype.
    """
    dtype, wide, (batch, _, keys), values = v.dtype, state_dtype(v.dtype), q.shape, v.shape[-1]
    K, V = keys // heads, values // heads
    if state.dtype != wide:
        raise TypeError(f"gla: state is {state.dtype} beside {dtype}, expected {wide}")
    decays = GATES if k is None else LOGARITHMS if temperature is None else LOGITS
    gamma, bound = (lower_bound, 0.0) if isinstance(lower_bound, Tensor) else (None, lower_bound)
    of_keys, of_values, normed = (batch, 1, heads * K), (batch, 1, heads * V), heads * V if whole else V
    first = bias if weight is None else weight
    parameters = (normed,) if first is None or first.ndim == 1 else (heads * V // normed, normed)
    tensors, given = [], []
    # in the order of gated_step.cpp
    for name, x, shape, kept in (
        ("q", q, of_keys, dtype),
        ("k", k, of_keys, dtype),
        ("v", v, of_values, dtype),
        ("decay", decay, of_keys, wide if decays == LOGARITHMS else dtype),
        ("gate", gate, of_values, dtype),
        ("state", state, (batch, heads, K, V), wide),
        ("bonus", bonus, (heads, K), dtype),
        ("lower_bound", gamma, (keys,), wide),
        ("weight", weight, parameters, dtype),
        ("bias", bias, parameters, dtype),
    ):
        if x is None:
            given.append(0)
            continue
        if x.shape != shape:
            raise ValueError(f"gla: {name} is {list(x.shape)}, expected {list(shape)}")
        # what is projected may come from anybody's module
        x = (x if x.dtype is kept else x.to(kept)).contiguous()
        tensors.append(x)
        given.append(x.data_ptr())
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    final_state = torch.empty_like(state, memory_format=torch.contiguous_format)
    _function("gla_gated_step", "11q4d12q")(
        batch,
        heads,
        K,
        V,
        DTYPES[dtype],
        torch.get_num_threads() if state.numel() >= SERIAL_SIZE else 1,
        decays,
        0 if gate is None else ACTIVATIONS[activation],
        normed,
        math.prod(parameters),
        center,
        K**-0.5 if scale is None else scale,
        temperature or 1.0,
        eps,
        bound,
        *given,
        y.data_ptr(),
        final_state.data_ptr(),
    )
    return y, final_state
