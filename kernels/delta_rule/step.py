"""One token of the mixers with a delta rule in C++ for CPUs, with all that stands between their projections.

Convolution, q and k of length 1, rates and decays, the recurrence and the gated norm are one call. See native_step.h;
why there is such a call is in kernels/lone.py. Elsewhere the same is made of short_conv, delta_rule and gated_norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import jit_cpp
from kernels.delta_rule.native import SOURCE
from kernels.memory import DTYPES
from kernels.problem import state_dtype

# fewer numbers of states than this are there and back before a second thread has woken up
SERIAL_SIZE = 1 << 16
_function = jit_cpp.functions(SOURCE)


def step(
    qkv: Tensor,
    beta: Tensor,
    decay: Tensor | None,
    gate: Tensor | None,
    state: Tensor,
    conv_state: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    A_log: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor | None,
    *,
    heads: int,
    largest_beta: float,
    sigmoid: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y [B, 1, value_heads · V] and the states, of the convolution last, after one token of each sequence.

        [q, k, v] = silu(conv(qkv)),   q, k = unit(q) / √K, unit(k),   β = largest_beta σ(beta)
        R = diag(exp(−exp(A_log) softplus(decay + dt_bias))) S,   S' = R + β k (v − Rᵀ k)ᵀ,   o = S'ᵀ q
        y = o / rms(o) ⊙ norm_weight ⊙ act(gate)

    Args:
        qkv: [B, 1, channels], projected: queries and keys of `heads`, values of value_heads.
        beta: logits [B, 1, value_heads].
        decay: logits [B, 1, value_heads or value_heads · K]; None: nothing decays.
        gate: [B, 1, value_heads · V], of which act is the sigmoid, or else SiLU; None for 1.
        state: S [B, value_heads, K, V] in the state dtype; all else is in one dtype.
        conv_state: the last tokens [B, W − 1, channels]; None, as its weight [channels, W]: no convolution.
        A_log, dt_bias: [value_heads], and as many as decay has for a token.
        norm_weight: [V]; eps is added to the mean square.

    Raises:
        ValueError: a tensor has another size. TypeError: the state is not in qkv's state dtype.
    """
    batch, value_heads, keys, values = state.shape
    channels, rows, dtype = 2 * heads * keys + value_heads * values, batch * value_heads, qkv.dtype
    decays = 0 if A_log is None or dt_bias is None else dt_bias.shape[0] // A_log.shape[0]
    taps = 0 if conv_weight is None else conv_weight.shape[1]
    if state.dtype != state_dtype(dtype):
        raise TypeError(f"delta_rule: state is {state.dtype} beside {dtype}, expected {state_dtype(dtype)}")
    tensors = []
    # in the order of native_step.h
    for name, x, size in (
        ("qkv", qkv, batch * channels),
        ("beta", beta, rows),
        ("decay", decay, rows * decays),
        ("gate", gate, rows * values),
        ("state", state, rows * keys * values),
        ("conv_state", conv_state, batch * (taps - 1) * channels),
        ("conv_weight", conv_weight, taps * channels),
        ("conv_bias", conv_bias, channels),
        ("A_log", A_log, value_heads),
        ("dt_bias", dt_bias, value_heads * decays),
        ("norm_weight", norm_weight, values),
    ):
        if x is not None:
            if x.numel() != size:
                fits = f"with a state {list(state.shape)} and {heads} heads of queries"
                raise ValueError(f"delta_rule: {name} has {x.numel()} numbers {list(x.shape)}, expected {size} {fits}")
            # what is projected may come from anybody's module
            if x.dtype != dtype and x is not state:
                x = x.to(dtype)
            x = x.contiguous()
        tensors.append(x)
    y, final_state = qkv.new_empty((batch, 1, value_heads * values)), torch.empty(state.shape, dtype=state.dtype)
    final_conv = None if conv_state is None else torch.empty(conv_state.shape, dtype=dtype)
    _function("delta_rule_step", "10q3d14q")(
        batch,
        heads,
        value_heads,
        keys,
        values,
        taps,
        decays,
        DTYPES[dtype],
        sigmoid,
        torch.get_num_threads() if state.numel() >= SERIAL_SIZE else 1,
        keys**-0.5,
        largest_beta,
        eps,
        *[0 if x is None else x.data_ptr() for x in (*tensors, y, final_state, final_conv)],
    )
    return y, final_state, final_conv
