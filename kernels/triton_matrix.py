"""What Triton kernels of recurrences with a matrix state share: rows, states, and which of them are a program's.

A program has one sequence, one head and BV neighbouring values, and of those the whole state [BK, BV] in registers.
Forward it walks down the rows. Backward a first walk leaves the state before every R-th row in `kept`; then, chunk of R
rows by chunk against time, a program makes the states before these rows again, leaves them in its own part of
`scratch`, and walks back over them with the gradient of the state in registers. So a gradient of a decay is the sum
that defines it, without a difference, and every decay is safe.

Sums over all values are left as one part for each block of values, and added up later. No two programs write to one
place and there are no atomics: the programs may run in any order and give the same bits. Everything is computed in
STATE, float32 or for float64 sequences float64. Tensors are contiguous; J is 1 or K.
"""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(cu_seqlens, T, H, V, R: tl.constexpr, BV: tl.constexpr):
    # This program's sequence, head, block, values [BV], first row, length, and first place in `kept`
    blocks = tl.cdiv(V, BV)
    block = tl.program_id(0) % blocks
    n = (tl.program_id(0) // blocks // H).to(tl.int64)
    h = tl.program_id(0) // blocks % H
    values = block * BV + tl.arange(0, BV)
    if cu_seqlens is None:
        return n, h, block, values, n * T, n * 0 + T, n * tl.cdiv(T, R)
    else:
        first = tl.load(cu_seqlens + n).to(tl.int64)
        length = tl.load(cu_seqlens + n + 1).to(tl.int64) - first
        # every sequence has room for a chunk that is not whole
        return n, h, block, values, first, length, first // R + n


@triton.jit
def load_row(tensor, row, W, columns, STATE: tl.constexpr):
    return tl.load(tensor + row * W + columns, columns < W, other=0.0).to(STATE)


@triton.jit
def store_row(tensor, row, W, columns, numbers):
    tl.store(tensor + row * W + columns, numbers.to(tensor.dtype.element_ty), columns < W)


@triton.jit
def load_decay(log_decay, row, J, keys, PER_KEY: tl.constexpr):
    # [BK, 1], or [1, 1] where all keys share it; no decay past the last key
    if PER_KEY:
        return tl.exp(tl.load(log_decay + row * J + keys, keys < J, other=0.0))[:, None]
    else:
        return tl.exp(tl.load(log_decay + row + tl.arange(0, 1)))[:, None]


@triton.jit
def decayed(state, log_decay, row, J, keys, PER_KEY: tl.constexpr):
    if log_decay is not None:
        state = state * load_decay(log_decay, row, J, keys, PER_KEY)
    return state


@triton.jit
def store_decay_gradient(dlog_decay, row, J, keys, sums, PER_KEY: tl.constexpr):
    # sums [BK]: over this program's values
    if PER_KEY:
        store_row(dlog_decay, row, J, keys, sums)
    else:
        tl.store(dlog_decay + row, tl.sum(sums, 0))


@triton.jit
def load_state(states, index, K, V, keys, values, STATE: tl.constexpr):
    # The state at this index of [..., K, V]
    inside = (keys < K)[:, None] & (values < V)[None, :]
    return tl.load(states + index * K * V + keys[:, None] * V + values[None, :], inside, other=0.0).to(STATE)


@triton.jit
def first_state(states, index, K, V, keys, values, STATE: tl.constexpr):
    # The same, or zeros where there are none
    if states is None:
        return tl.zeros([keys.shape[0], values.shape[0]], STATE)
    else:
        return load_state(states, index, K, V, keys, values, STATE)


@triton.jit
def store_state(states, index, K, V, keys, values, state):
    inside = (keys < K)[:, None] & (values < V)[None, :]
    tl.store(states + index * K * V + keys[:, None] * V + values[None, :], state, inside)
