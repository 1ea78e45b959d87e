"""The Triton kernels of gated linear attention: its loop over time, with the state in registers.

A program has one sequence, one head and BV neighbouring values, and of those the whole state [BK, BV]. Forward it walks
down the rows. Backward a first walk leaves the state before every R-th row in `kept`; then, chunk of R rows by chunk
against time, a program makes the states before these rows again, leaves them in its own part of `scratch`, and walks
back over them with the gradient of the state in registers. So a gradient of a decay is the sum that defines it, without
a difference, and every decay is safe.

Sums over all values (dq, dk, dlog_decay, dbonus) are left as one part for each block of values, and added up later. No
two programs write to one place and there are no atomics: the programs may run in any order and give the same bits.
Everything is computed in STATE, float32 or for float64 sequences float64. Tensors are contiguous; J is 1 or K.
"""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(cu_seqlens, T, H, V, R: tl.constexpr, BV: tl.constexpr):
    # This program's sequence, head, values [BV], first row, length, and first place in `kept`
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
def _row(tensor, row, W, columns, STATE: tl.constexpr):
    return tl.load(tensor + row * W + columns, columns < W, other=0.0).to(STATE)


@triton.jit
def _decay(log_decay, row, J, keys, PER_KEY: tl.constexpr):
    # [BK, 1], or [1, 1] where all keys share it; no decay past the last key
    if PER_KEY:
        return tl.exp(tl.load(log_decay + row * J + keys, keys < J, other=0.0))[:, None]
    else:
        return tl.exp(tl.load(log_decay + row + tl.arange(0, 1)))[:, None]


@triton.jit
def _state(states, place, K, V, keys, values, STATE: tl.constexpr):
    # The state at this place of [..., K, V]
    inside = (keys < K)[:, None] & (values < V)[None, :]
    return tl.load(states + place * K * V + keys[:, None] * V + values[None, :], inside, other=0.0).to(STATE)


@triton.jit
def _keep(states, place, K, V, keys, values, state):
    inside = (keys < K)[:, None] & (values < V)[None, :]
    tl.store(states + place * K * V + keys[:, None] * V + values[None, :], state, inside)


@triton.jit(do_not_specialize=["T"])
def gla_forward(
    q, k, v, log_decay, initial, bonus, y, final, kept, cu_seqlens, T, H, K, V,
    SCALE: tl.constexpr, PER_KEY: tl.constexpr, STATE: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    n, h, _, values, first, length, chunk = _place(cu_seqlens, T, H, V, R, BV)
    keys = tl.arange(0, BK)
    if initial is None:
        state = tl.zeros([BK, BV], STATE)
    else:
        state = _state(initial, n * H + h, K, V, keys, values, STATE)
    if bonus is not None:
        u = _row(bonus, h, K, keys, STATE)
    for t in range(0, length):
        if kept is not None and t % R == 0:
            _keep(kept, (chunk + t // R) * H + h, K, V, keys, values, state)
        row = (first + t) * H + h
        key, value = _row(k, row, K, keys, STATE), _row(v, row, V, values, STATE)
        before = state
        if log_decay is not None:
            state = state * _decay(log_decay, row, K, keys, PER_KEY)
        state += key[:, None] * value[None, :]
        if y is not None:
            seen = state if bonus is None else before + (u * key)[:, None] * value[None, :]
            out = tl.sum(seen * _row(q, row, K, keys, STATE)[:, None], 0) * SCALE
            tl.store(y + row * V + values, out.to(y.dtype.element_ty), values < V)
    if final is not None:
        _keep(final, n * H + h, K, V, keys, values, state)


@triton.jit(do_not_specialize=["T", "ROWS", "N"])
def gla_backward(
    dy, dfinal, q, k, v, log_decay, bonus, kept, scratch, dq, dk, dv, dlog_decay, dinitial, dbonus, cu_seqlens,
    T, ROWS, N, H, K, V,
    SCALE: tl.constexpr, PER_KEY: tl.constexpr, STATE: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    n, h, block, values, first, length, chunk = _place(cu_seqlens, T, H, V, R, BV)
    keys = tl.arange(0, BK)
    # where this block of values puts its part of sums over all values
    part = block.to(tl.int64) * ROWS * H
    own = scratch + tl.program_id(0).to(tl.int64) * (R * BK * BV)
    cells = tl.arange(0, BK)[:, None] * BV + tl.arange(0, BV)[None, :]
    if dfinal is None:
        dstate = tl.zeros([BK, BV], STATE)
    else:
        dstate = _state(dfinal, n * H + h, K, V, keys, values, STATE)
    if bonus is not None:
        u = _row(bonus, h, K, keys, STATE)
        du = tl.zeros([BK], STATE)
    chunks = tl.cdiv(length, R)
    for c in range(0, chunks):
        start = (chunks - 1 - c) * R
        count = tl.minimum(length - start, R)
        state = _state(kept, (chunk + chunks - 1 - c) * H + h, K, V, keys, values, STATE)
        for r in range(0, count):
            tl.store(own + r * (BK * BV) + cells, state)
            row = (first + start + r) * H + h
            if log_decay is not None:
                state = state * _decay(log_decay, row, K, keys, PER_KEY)
            state += _row(k, row, K, keys, STATE)[:, None] * _row(v, row, V, values, STATE)[None, :]
        tl.debug_barrier()
        for i in range(0, count):
            r = count - 1 - i
            row = (first + start + r) * H + h
            before = tl.load(own + r * (BK * BV) + cells)
            query, key = _row(q, row, K, keys, STATE), _row(k, row, K, keys, STATE)
            value = _row(v, row, V, values, STATE)
            if dy is None:
                out = tl.zeros([BV], STATE)
            else:
                out = _row(dy, row, V, values, STATE) * SCALE
            seen_gradient = query[:, None] * out[None, :]
            decayed = before
            if log_decay is not None:
                decay = _decay(log_decay, row, K, keys, PER_KEY)
                decayed = before * decay
            if bonus is None:
                seen = decayed + key[:, None] * value[None, :]
                dstate += seen_gradient
                added_gradient = dstate
            else:
                seen = before + (u * key)[:, None] * value[None, :]
                added_gradient = dstate + u[:, None] * seen_gradient
                du += query * key * tl.sum(value * out, 0)
            inside = keys < K
            if dq is not None:
                tl.store(dq + (part + row) * K + keys, tl.sum(seen * out[None, :], 1).to(dq.dtype.element_ty), inside)
            if dk is not None:
                sums = tl.sum(added_gradient * value[None, :], 1)
                tl.store(dk + (part + row) * K + keys, sums.to(dk.dtype.element_ty), inside)
            if dv is not None:
                sums = tl.sum(added_gradient * key[:, None], 0)
                tl.store(dv + row * V + values, sums.to(dv.dtype.element_ty), values < V)
            if dlog_decay is not None:
                sums = tl.sum(dstate * decayed, 1)
                if PER_KEY:
                    tl.store(dlog_decay + (part + row) * K + keys, sums, inside)
                else:
                    tl.store(dlog_decay + part + row, tl.sum(sums, 0))
            if log_decay is not None:
                dstate = dstate * decay
            if bonus is not None:
                dstate += seen_gradient
        tl.debug_barrier()
    if dinitial is not None:
        _keep(dinitial, n * H + h, K, V, keys, values, dstate)
    if dbonus is not None:
        tl.store(dbonus + ((block * N + n) * H + h) * K + keys, du, keys < K)
