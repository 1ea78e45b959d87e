"""One token of layers that are made of gla, in C++ for CPUs, with what stands around the recurrence. See step.cpp.

Features, gates, recurrence and division are one call. Where `can_step` says no, the same is made of gla; why there is
such a call is in kernels/lone.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels import jit_cpp, pool
from kernels.lone import alone, expect, readable
from kernels.memory import DTYPES, address, columns_together, contiguous, heads
from kernels.problem import state_dtype

# fewer numbers than this, of states or matrices, are there and back before a second thread has woken up
SERIAL_SIZE = 1 << 16
SOURCE = Path(__file__).with_suffix(".cpp")
_function = jit_cpp.functions(SOURCE)


def can_step(
    x: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    backend: str,
    *others: Tensor,
    states: Sequence[Tensor] = (),
) -> bool:
    """For x [B, T, ...] and others in its dtype, and states or what else is in the state dtype."""
    return alone(x, cu_seqlens, backend, SOURCE) and readable(x, others, (state, *states))


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

    Raises:
        ValueError: a shape does not fit.
    """
    (batch, _, H, d), V = q.shape, v.shape[-1]
    K = d if state.shape[2] == d else 1 + d + d * (d + 1) // 2
    expect("gla", k=(k, q.shape), v=(v, (batch, 1, H, V)), state=(state, (batch, H, K, V + 1)))
    if gates is not None:
        expect("gla", **{name: (gate, (batch, 1, H)) for name, gate in zip("if", gates)}, m=(gates[2], (batch, H)))
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


def slot_step(
    q: Tensor, k: Tensor, v: Tensor, f: Tensor, keys: Tensor, values: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y [B, 1, H · D] in v's dtype, keys', values') of one token of each sequence in gated slot attention.

        keys' = diag(α) keys + (1 − α) kᵀ,   values' = diag(α) values + (1 − α) vᵀ,   y = values'ᵀ softmax(keys' q)

    with SiLU of q, k, v [B, 1, H, D], and log α = log σ(f) / temperature, f [B, 1, H, M]; keys, values [B, H, M, D] in
    the state dtype.

    Raises:
        ValueError: a shape does not fit.
    """
    (batch, _, H, D), M = q.shape, f.shape[-1]
    expect("gla", k=(k, q.shape), v=(v, q.shape), f=(f, (batch, 1, H, M)))
    expect("gla", keys=(keys, (batch, H, M, D)), values=(values, (batch, H, M, D)))
    q, k, v, f = (columns_together(x) for x in (q, k, v, f))
    keys, values = contiguous(keys), contiguous(values)
    y = v.new_empty((v.shape[0], 1, v.shape[2] * v.shape[3]))
    final_keys, final_values = torch.empty_like(keys), torch.empty_like(values)
    _function("gla_slot_step", "6qd21q")(
        *keys.shape,
        DTYPES[q.dtype],
        torch.get_num_threads() if keys.numel() >= SERIAL_SIZE else 1,
        temperature,
        *heads(q),
        *heads(k),
        *heads(v),
        *heads(f),
        keys.data_ptr(),
        values.data_ptr(),
        y.data_ptr(),
        final_keys.data_ptr(),
        final_values.data_ptr(),
    )
    return y, final_keys, final_values


def shift_step(
    x: Tensor,
    before: Tensor,
    shares: tuple[Tensor, Tensor, Tensor, Tensor],
    decay: tuple[Tensor, Tensor, Tensor],
    *,
    most: float,
) -> tuple[Tensor, Tensor]:
    """RWKV-6's inputs [J, B, 1, D], mixed with the token before, and log decays [B, 1, D] in the state dtype.

        δ = before − x,   s = tanh((x + δ ⊙ μ) A),   mixed_j = x + δ ⊙ (μ_j + s_j B_j)
        log_decay = −exp(min(ω + tanh(mixed_0 C) D, most))

    Args:
        x, before: [B, 1, D], the token and the one before it.
        shares: μ [D], A [D, J · rank], B [J, rank, D] and the μ_j [J, D], in x's dtype as all that is given.
        decay: ω [D], C [D, decay_rank] and D [decay_rank, D].

    Raises:
        ValueError: a shape does not fit.
    """
    expect("gla", before=(before, x.shape))
    given = [t.contiguous() for t in (x, before, *shares, *decay)]
    (batch, _, dim), (inputs, rank, _) = x.shape, shares[2].shape
    mixed = x.new_empty((inputs, batch, 1, dim))
    log_decay = x.new_empty((batch, 1, dim), dtype=state_dtype(x.dtype))
    # of the matrices
    numbers = 2 * dim * (inputs * rank + decay[2].shape[0])
    _function("gla_shift_step", "7qd11q")(
        batch,
        dim,
        inputs,
        rank,
        decay[2].shape[0],
        DTYPES[x.dtype],
        torch.get_num_threads() if numbers >= SERIAL_SIZE else 1,
        most,
        *[t.data_ptr() for t in given],
        mixed.data_ptr(),
        log_decay.data_ptr(),
    )
    return mixed, log_decay


def retention_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, position: Tensor, frequency: Tensor
) -> tuple[Tensor, Tensor]:
    """(y [B, 1, H, V] in v's dtype, final_state) of one token of each sequence in RetNet's retention.

        S' = (1 − 2^(−5 − h)) S + R k vᵀ,   y = S'ᵀ R q / √K,   head by head

    R rotates the halves of q, k [B, 1, H, K] by position [B], int64, times frequency [K // 2], which is in the state
    dtype.

    Raises:
        ValueError: a shape does not fit. TypeError: position is not int64.
    """
    (batch, _, H, K), V = q.shape, v.shape[-1]
    expect("gla", k=(k, q.shape), v=(v, (batch, 1, H, V)), state=(state, (batch, H, K, V)))
    expect("gla", position=(position, (batch,)))
    if position.dtype != torch.int64:
        raise TypeError(f"gla: position is {position.dtype}, expected torch.int64")
    q, k, v, state = columns_together(q), columns_together(k), columns_together(v), contiguous(state)
    position = position.contiguous()
    y, final_state = torch.empty_like(v, memory_format=torch.contiguous_format), pool.empty_like(state)
    _function("gla_retention_step", "6qd17q")(
        *state.shape,
        DTYPES[q.dtype],
        torch.get_num_threads() if state.numel() >= SERIAL_SIZE else 1,
        state.shape[2] ** -0.5,
        *heads(q),
        *heads(k),
        *heads(v),
        position.data_ptr(),
        frequency.data_ptr(),
        state.data_ptr(),
        y.data_ptr(),
        final_state.data_ptr(),
    )
    return y, final_state


def space_step(
    q: Tensor, k: Tensor, v: Tensor, dt: Tensor, state: Tensor, bias: Tensor, A_log: Tensor, D: Tensor
) -> tuple[Tensor, Tensor]:
    """(y [B, 1, H, V] in v's dtype, final_state) of one token of each sequence in Mamba-2's state space.

        Δ = softplus(dt + bias),   S' = exp(−Δ e^A_log) S + Δ k vᵀ,   y = S'ᵀ q + D v,   head by head

    q, k [B, 1, G, K] are shared by H / G heads each; v [B, 1, H, V], dt [B, 1, H]; bias, A_log and D [H] in the
    state dtype.

    Raises:
        ValueError: a shape does not fit.
    """
    (batch, _, G, K), (H, V) = q.shape, v.shape[2:]
    expect("gla", k=(k, q.shape), v=(v, (batch, 1, H, V)), dt=(dt, (batch, 1, H)), state=(state, (batch, H, K, V)))
    q, k, v = columns_together(q), columns_together(k), columns_together(v)
    state, *parameters = (contiguous(t) for t in (state, bias, A_log, D))
    y, final_state = torch.empty_like(v, memory_format=torch.contiguous_format), pool.empty_like(state)
    _function("gla_space_step", "29q")(
        batch,
        H,
        G,
        K,
        V,
        DTYPES[q.dtype],
        torch.get_num_threads() if state.numel() >= SERIAL_SIZE else 1,
        *heads(q),
        *heads(k),
        *heads(v),
        dt.data_ptr(),
        *dt.stride(),
        *[t.data_ptr() for t in parameters],
        state.data_ptr(),
        y.data_ptr(),
        final_state.data_ptr(),
    )
    return y, final_state
