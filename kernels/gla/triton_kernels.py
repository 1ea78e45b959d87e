"""The Triton kernels of gated linear attention: its loop over time, with the state in registers."""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_matrix import (
    decayed,
    first_state,
    load_decay,
    load_row,
    load_state,
    place,
    store_decay_gradient,
    store_row,
    store_state,
)


@triton.jit(do_not_specialize=["T"])
def gla_forward(
    q, k, v, log_decay, initial, bonus, y, final, kept, cu_seqlens, T, H, K, V,
    SCALE: tl.constexpr, PER_KEY: tl.constexpr, STATE: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    n, h, _, values, first, length, chunk = place(cu_seqlens, T, H, V, R, BV)
    keys = tl.arange(0, BK)
    state = first_state(initial, n * H + h, K, V, keys, values, STATE)
    if bonus is not None:
        u = load_row(bonus, h, K, keys, STATE)
    for t in range(0, length):
        if kept is not None and t % R == 0:
            store_state(kept, (chunk + t // R) * H + h, K, V, keys, values, state)
        row = (first + t) * H + h
        key, value = load_row(k, row, K, keys, STATE), load_row(v, row, V, values, STATE)
        before = state
        state = decayed(state, log_decay, row, K, keys, PER_KEY)
        state += key[:, None] * value[None, :]
        if y is not None:
            seen = state if bonus is None else before + (u * key)[:, None] * value[None, :]
            out = tl.sum(seen * load_row(q, row, K, keys, STATE)[:, None], 0) * SCALE
            store_row(y, row, V, values, out)
    if final is not None:
        store_state(final, n * H + h, K, V, keys, values, state)


@triton.jit(do_not_specialize=["T", "ROWS", "N"])
def gla_backward(
    dy, dfinal, q, k, v, log_decay, bonus, kept, scratch, dq, dk, dv, dlog_decay, dinitial, dbonus, cu_seqlens,
    T, ROWS, N, H, K, V,
    SCALE: tl.constexpr, PER_KEY: tl.constexpr, STATE: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    n, h, block, values, first, length, chunk = place(cu_seqlens, T, H, V, R, BV)
    keys = tl.arange(0, BK)
    # where this block of values puts its part of sums over all values
    part = block.to(tl.int64) * ROWS * H
    own = scratch + tl.program_id(0).to(tl.int64) * (R * BK * BV)
    cells = tl.arange(0, BK)[:, None] * BV + tl.arange(0, BV)[None, :]
    dstate = first_state(dfinal, n * H + h, K, V, keys, values, STATE)
    if bonus is not None:
        u = load_row(bonus, h, K, keys, STATE)
        du = tl.zeros([BK], STATE)
    chunks = tl.cdiv(length, R)
    for c in range(0, chunks):
        start = (chunks - 1 - c) * R
        count = tl.minimum(length - start, R)
        state = load_state(kept, (chunk + chunks - 1 - c) * H + h, K, V, keys, values, STATE)
        for r in range(0, count):
            tl.store(own + r * (BK * BV) + cells, state)
            row = (first + start + r) * H + h
            state = decayed(state, log_decay, row, K, keys, PER_KEY)
            state += load_row(k, row, K, keys, STATE)[:, None] * load_row(v, row, V, values, STATE)[None, :]
        tl.debug_barrier()
        for i in range(0, count):
            r = count - 1 - i
            row = (first + start + r) * H + h
            before = tl.load(own + r * (BK * BV) + cells)
            query, key = load_row(q, row, K, keys, STATE), load_row(k, row, K, keys, STATE)
            value = load_row(v, row, V, values, STATE)
            if dy is None:
                out = tl.zeros([BV], STATE)
            else:
                out = load_row(dy, row, V, values, STATE) * SCALE
            seen_gradient = query[:, None] * out[None, :]
            left = before
            if log_decay is not None:
                decay = load_decay(log_decay, row, K, keys, PER_KEY)
                left = before * decay
            if bonus is None:
                seen = left + key[:, None] * value[None, :]
                dstate += seen_gradient
                added_gradient = dstate
            else:
                seen = before + (u * key)[:, None] * value[None, :]
                added_gradient = dstate + u[:, None] * seen_gradient
                du += query * key * tl.sum(value * out, 0)
            if dq is not None:
                store_row(dq, part + row, K, keys, tl.sum(seen * out[None, :], 1))
            if dk is not None:
                store_row(dk, part + row, K, keys, tl.sum(added_gradient * value[None, :], 1))
            if dv is not None:
                store_row(dv, row, V, values, tl.sum(added_gradient * key[:, None], 0))
            if dlog_decay is not None:
                store_decay_gradient(dlog_decay, part + row, K, keys, tl.sum(dstate * left, 1), PER_KEY)
            if log_decay is not None:
                dstate = dstate * decay
            if bonus is not None:
                dstate += seen_gradient
        tl.debug_barrier()
    if dinitial is not None:
        store_state(dinitial, n * H + h, K, V, keys, values, dstate)
    if dbonus is not None:
        tl.store(dbonus + ((block * N + n) * H + h) * K + keys, du, keys < K)
