"""The Triton kernels of the delta rule: its loop over time, with the state in registers."""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_matrix import (
    decayed,
    first_state,
    load_row,
    load_state,
    place,
    store_decay_gradient,
    store_row,
    store_state,
)


@triton.jit
def missing(state, key, value):
    # v − Rᵀ k: what the state does not hold for the key yet
    return value - tl.sum(state * key[:, None], 0)


@triton.jit(do_not_specialize=["T"])
def delta_forward(
    q, k, v, beta, log_decay, initial, y, final, kept, cu_seqlens, T, H, K, V,
    SCALE: tl.constexpr, PER_KEY: tl.constexpr, STATE: tl.constexpr, R: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    n, h, _, values, first, length, chunk = place(cu_seqlens, T, H, V, R, BV)
    keys = tl.arange(0, BK)
    state = first_state(initial, n * H + h, K, V, keys, values, STATE)
    for t in range(0, length):
        if kept is not None and t % R == 0:
            store_state(kept, (chunk + t // R) * H + h, K, V, keys, values, state)
        row = (first + t) * H + h
        key, value = load_row(k, row, K, keys, STATE), load_row(v, row, V, values, STATE)
        state = decayed(state, log_decay, row, K, keys, PER_KEY)
        u = missing(state, key, value) * tl.load(beta + row).to(STATE)
        state += key[:, None] * u[None, :]
        if y is not None:
            store_row(y, row, V, values, tl.sum(state * load_row(q, row, K, keys, STATE)[:, None], 0) * SCALE)
    if final is not None:
        store_state(final, n * H + h, K, V, keys, values, state)


@triton.jit(do_not_specialize=["T", "ROWS"])
def delta_backward(
    dy, dfinal, q, k, v, beta, log_decay, kept, scratch, dq, dk, dv, dbeta, dlog_decay, dinitial, cu_seqlens,
    T, ROWS, H, K, V,
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
    chunks = tl.cdiv(length, R)
    for c in range(0, chunks):
        start = (chunks - 1 - c) * R
        count = tl.minimum(length - start, R)
        state = load_state(kept, (chunk + chunks - 1 - c) * H + h, K, V, keys, values, STATE)
        for r in range(0, count):
            row = (first + start + r) * H + h
            state = decayed(state, log_decay, row, K, keys, PER_KEY)
            tl.store(own + r * (BK * BV) + cells, state)
            key, value = load_row(k, row, K, keys, STATE), load_row(v, row, V, values, STATE)
            u = missing(state, key, value) * tl.load(beta + row).to(STATE)
            state += key[:, None] * u[None, :]
        tl.debug_barrier()
        for i in range(0, count):
            r = count - 1 - i
            row = (first + start + r) * H + h
            # R of the equation: the state before the row, decayed
            left = tl.load(own + r * (BK * BV) + cells)
            key, value = load_row(k, row, K, keys, STATE), load_row(v, row, V, values, STATE)
            strength = tl.load(beta + row).to(STATE)
            error = missing(left, key, value)
            u = strength * error
            if dy is not None:
                out = load_row(dy, row, V, values, STATE) * SCALE
                if dq is not None:
                    store_row(dq, part + row, K, keys, tl.sum((left + key[:, None] * u[None, :]) * out[None, :], 1))
                dstate += load_row(q, row, K, keys, STATE)[:, None] * out[None, :]
            elif dq is not None:
                store_row(dq, part + row, K, keys, tl.zeros([BK], STATE))
            du = tl.sum(dstate * key[:, None], 0)
            dvalue = strength * du
            if dbeta is not None:
                tl.store(dbeta + part + row, tl.sum(du * error, 0).to(dbeta.dtype.element_ty))
            if dv is not None:
                store_row(dv, row, V, values, dvalue)
            if dk is not None:
                store_row(dk, part + row, K, keys, tl.sum(dstate * u[None, :] - left * dvalue[None, :], 1))
            dstate -= key[:, None] * dvalue[None, :]
            if dlog_decay is not None:
                store_decay_gradient(dlog_decay, part + row, K, keys, tl.sum(dstate * left, 1), PER_KEY)
            dstate = decayed(dstate, log_decay, row, K, keys, PER_KEY)
        tl.debug_barrier()
    if dinitial is not None:
        store_state(dinitial, n * H + h, K, V, keys, values, dstate)
