"""The Triton kernels of the diagonal-plus-rank-one rule: its loop over time, with the state in registers."""
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
def after(
    state, k, v, a, b, log_decay, row, K, V, keys, values, PER_KEY: tl.constexpr, STATE: tl.constexpr
):  # fmt: skip
    # diag(decay) S + b (aᵀ S) + k vᵀ
    read = tl.sum(state * load_row(a, row, K, keys, STATE)[:, None], 0)
    state = decayed(state, log_decay, row, K, keys, PER_KEY)
    state += load_row(b, row, K, keys, STATE)[:, None] * read[None, :]
    return state + load_row(k, row, K, keys, STATE)[:, None] * load_row(v, row, V, values, STATE)[None, :]


@triton.jit(do_not_specialize=["T"])
def dplr_forward(
    q, k, v, a, b, log_decay, initial, y, final, kept, cu_seqlens, T, H, K, V,
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
        state = after(state, k, v, a, b, log_decay, row, K, V, keys, values, PER_KEY, STATE)
        if y is not None:
            store_row(y, row, V, values, tl.sum(state * load_row(q, row, K, keys, STATE)[:, None], 0) * SCALE)
    if final is not None:
        store_state(final, n * H + h, K, V, keys, values, state)


@triton.jit(do_not_specialize=["T", "ROWS"])
def dplr_backward(
    dy, dfinal, q, k, v, a, b, log_decay, kept, scratch, dq, dk, dv, da, db, dlog_decay, dinitial, cu_seqlens,
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
            tl.store(own + r * (BK * BV) + cells, state)
            row = (first + start + r) * H + h
            state = after(state, k, v, a, b, log_decay, row, K, V, keys, values, PER_KEY, STATE)
        tl.debug_barrier()
        for i in range(0, count):
            r = count - 1 - i
            row = (first + start + r) * H + h
            before = tl.load(own + r * (BK * BV) + cells)
            from_, to = load_row(a, row, K, keys, STATE), load_row(b, row, K, keys, STATE)
            if dy is not None:
                out = load_row(dy, row, V, values, STATE) * SCALE
                if dq is not None:
                    seen = after(before, k, v, a, b, log_decay, row, K, V, keys, values, PER_KEY, STATE)
                    store_row(dq, part + row, K, keys, tl.sum(seen * out[None, :], 1))
                dstate += load_row(q, row, K, keys, STATE)[:, None] * out[None, :]
            elif dq is not None:
                store_row(dq, part + row, K, keys, tl.zeros([BK], STATE))
            if dk is not None:
                store_row(dk, part + row, K, keys, tl.sum(dstate * load_row(v, row, V, values, STATE)[None, :], 1))
            if dv is not None:
                store_row(dv, row, V, values, tl.sum(dstate * load_row(k, row, K, keys, STATE)[:, None], 0))
            if db is not None:
                read = tl.sum(before * from_[:, None], 0)
                store_row(db, part + row, K, keys, tl.sum(dstate * read[None, :], 1))
            dread = tl.sum(dstate * to[:, None], 0)
            if da is not None:
                store_row(da, part + row, K, keys, tl.sum(before * dread[None, :], 1))
            dstate = decayed(dstate, log_decay, row, K, keys, PER_KEY)
            if dlog_decay is not None:
                store_decay_gradient(dlog_decay, part + row, K, keys, tl.sum(dstate * before, 1), PER_KEY)
            dstate += from_[:, None] * dread[None, :]
        tl.debug_barrier()
    if dinitial is not None:
        store_state(dinitial, n * H + h, K, V, keys, values, dstate)
