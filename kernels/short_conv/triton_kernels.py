"""The Triton kernels of the short convolution and its gradient: each row of x is read once, each row of y written once.

A program walks through a chunk of CT rows of one sequence for a block of BD neighbouring columns, BT rows at a time. A
tile [BT, BD] travels by 16 bytes to a thread and is taken apart into its rows (kernels/triton_rows.py), of which a
thread has whole columns; what a thread needs of the rows of the past stays in its registers. A program reads the
S = W - 1 rows before its chunk again, as a tile of P rows; backward, those after it too.

Steps t count in the order of time from 0 in each sequence; x[t] with t < 0 is in the initial state. Sums are in STATE,
float32 or for float64 sequences float64. No two programs write to one place, nothing that is read is written, and there
are no atomics: the programs may run in any order and give the same bits.
"""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_rows import (
    choose,
    chunk_of,
    columns_of,
    constant,
    load_rows,
    plus,
    sigmoids,
    store_rows,
    times,
    walk,
)


@triton.jit
def _share(cu_seqlens, T, N, D, CT: tl.constexpr, BD: tl.constexpr, REVERSE: tl.constexpr):
    # This program's piece and sequence, the row of its step 0, its length, the chunk's first step, the columns [1, BD]
    piece, column = columns_of(D, BD)
    n, first, length, begin = chunk_of(cu_seqlens, piece, T, N, CT)
    row = first + length - 1 if REVERSE else first
    return piece, n, row, length.to(tl.int32), begin.to(tl.int32), column


@triton.jit
def _taps(weight, column, inside, W: tl.constexpr, STATE: tl.constexpr, TWO: tl.constexpr):
    # Rows; those of a column lie side by side
    k = tl.arange(0, triton.next_power_of_2(W))[:, None]
    return load_rows(weight + column * W + k, inside & (k < W), STATE, TWO)


@triton.jit
def _offset(bias, column, inside, BD: tl.constexpr, STATE: tl.constexpr, TWO: tl.constexpr):
    if bias is None:
        return constant(0.0, BD, STATE, False, TWO)
    else:
        return load_rows(bias + column, inside, STATE, TWO)[0]


@triton.jit
def _past(x, x_t, states, t, D, some, S: tl.constexpr, inside, STATE: tl.constexpr, TWO: tl.constexpr):
    # x[t], ..., x[t + S - 1], some of which may be in the initial state
    inside = inside & (some < S)
    rows = load_rows(x + (t + some) * x_t, inside & (t + some >= 0), STATE, TWO)
    if states is not None:
        older = load_rows(states + (S + t + some) * D, inside & (t + some < 0), STATE, TWO)
        both = ()
        for s in tl.static_range(S):
            both += (plus(rows[s], older[s]),)
        rows = both
    return rows[:S]


@triton.jit
def _convolved(offset, taps, rows, s: tl.constexpr, W: tl.constexpr, BACK: tl.constexpr):
    # offset + the sum over k of taps[k] rows[s + k], BACK: rows[s - k]
    z = offset
    for k in tl.static_range(W):
        z = plus(z, times(taps[k], rows[s - k if BACK else s + k], False))
    return z


@triton.jit
def _kept(rows, BT: tl.constexpr, STATE: tl.constexpr):
    # All but the first BT. Triton copies ahead in no loop that hands on what it was handed itself, which rows are that
    # stay for longer than a step: casts to integers and back, which cost nothing, make new ones of them
    BITS: tl.constexpr = tl.int64 if STATE.primitive_bitwidth == 64 else tl.int32
    kept = ()
    for s in tl.static_range(BT, len(rows)):
        row = ()
        for i in tl.static_range(len(rows[s])):
            row += (rows[s][i].to(BITS, bitcast=True).to(STATE, bitcast=True),)
        kept += (row,)
    return kept


@triton.jit
def _silu(z):
    # Of each part, and its derivative
    value = ()
    slope = ()
    for i in tl.static_range(len(z)):
        p, q = sigmoids(z[i])
        value += (z[i] * p,)
        slope += (p * (1 + z[i] * q),)
    return value, slope


@triton.jit(do_not_specialize=["T", "N", "D", "x_b", "x_t", "y_b"])
def conv_forward(
    x, weight, bias, initial, y, final, cu_seqlens, T, N, D, x_b, x_t, y_b,
    UNIT: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
    STATE: tl.constexpr, TWO: tl.constexpr, CT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = W - 1
    width = D * UNIT
    _, n, row, length, begin, column = _share(cu_seqlens, T, N, width, CT, BD, REVERSE)
    end = tl.minimum(begin + CT, length)
    inside = column < width
    steps = tl.arange(0, BT)[:, None]
    some = tl.arange(0, P)[:, None]
    x, x_t = walk(x, n, row, x_b, x_t, 0, column, UNIT, not REVERSE)
    y, y_t = walk(y, n, row, y_b, D, 0, column, UNIT, not REVERSE)
    states = n * S * width + column
    before = None if initial is None else initial + states
    taps = _taps(weight, column, inside, W, STATE, TWO)
    offset = _offset(bias, column, inside, BD, STATE, TWO)

    window = ()
    if S > 0:
        window = _past(x, x_t, before, begin - S, width, some, S, inside & (begin <= length), STATE, TWO)
    for t in tl.range(begin, end, BT, num_stages=STAGES):
        here = inside & (t + steps < end)
        window += load_rows(x + (t + steps) * x_t, here, STATE, TWO)
        outputs = ()
        for s in tl.static_range(BT):
            z = _convolved(offset, taps, window, s, W, False)
            outputs += (_silu(z)[0] if SILU else z,)
        store_rows(y + (t + steps) * y_t, outputs, here)
        window = _kept(window, BT, STATE)
    # The chunk in which the sequence ends, which is the first one if it has no rows
    if S > 0:
        last = (begin < length) & (length <= begin + CT) | (begin == 0) & (length == 0)
        t = length - S + some
        present = inside & (some < S) & last
        tile = tl.load(x + t * x_t, present & (t >= 0), other=0.0)
        if before is not None:
            tile += tl.load(before + (S + t) * width, present & (t < 0), other=0.0)
        tl.store(final + states + some * width, tile, present)


@triton.jit(do_not_specialize=["T", "N", "D", "dy_b", "dy_t", "x_b", "x_t", "dx_b"])
def conv_backward(
    dy, dfinal, x, weight, bias, initial, dx, dinitial, partial, cu_seqlens, T, N, D, dy_b, dy_t, x_b, x_t, dx_b,
    UNIT: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
    STATE: tl.constexpr, TWO: tl.constexpr, CT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # dz[t] = dy[t] act'(z[t]) of the chunk and of the S steps after it, whose outputs its last rows of x are part of.
    # x[t - S] gets sum over k of taps[k] dz[t - k], and from step `length` on the gradient of the final state.
    S: tl.constexpr = W - 1
    width = D * UNIT
    piece, n, row, length, begin, column = _share(cu_seqlens, T, N, width, CT, BD, REVERSE)
    end = tl.minimum(begin + CT, length)
    inside = column < width
    steps = tl.arange(0, BT)[:, None]
    some = tl.arange(0, P)[:, None]
    x, x_t = walk(x, n, row, x_b, x_t, 0, column, UNIT, not REVERSE)
    if dy is not None:
        dy, dy_t = walk(dy, n, row, dy_b, dy_t, 0, column, UNIT, not REVERSE)
    if dx is not None:
        dx, dx_t = walk(dx, n, row, dx_b, D, 0, column, UNIT, not REVERSE)
    states = n * S * width + column
    before = None if initial is None else initial + states
    taps = _taps(weight, column, inside, W, STATE, TWO)
    offset = _offset(bias, column, inside, BD, STATE, TWO)
    zero = constant(0.0, BD, STATE, False, TWO)

    window = ()
    past = ()
    sums = ()
    if S > 0:
        window = _past(x, x_t, before, begin - S, width, some, S, inside & (begin <= length), STATE, TWO)
    for _ in tl.static_range(S):
        past += (zero,)
    for _ in tl.static_range(W + 1):
        sums += (zero,)
    # From S steps early, where what comes out belongs to the chunk before or to the initial state
    for t in tl.range(begin, tl.where(begin <= length, end + S, begin), BT, num_stages=STAGES):
        step = t + steps
        window += load_rows(x + step * x_t, inside & (step < length), STATE, TWO)
        if dy is not None:
            given = load_rows(dy + step * dy_t, inside & (step < length), STATE, TWO)
        if dfinal is not None:
            last = inside & (step >= length) & (step < length + S)
            after = load_rows(dfinal + states + (step - length) * width, last, STATE, TWO)
        gradients = ()
        for s in tl.static_range(BT):
            dz = zero if dy is None else given[s]
            if SILU:
                dz = times(dz, _silu(_convolved(offset, taps, window, s, W, False))[1], False)
            past += (dz,)
            if partial is not None:
                own = choose(t + s < end, dz, zero)
                added = ()
                for k in tl.static_range(W):
                    added += (plus(sums[k], times(own, window[s + k], False)),)
                added += (plus(sums[W], own),)
                sums = added
            gradient = _convolved(zero, taps, past, S + s, W, True)
            if dfinal is not None:
                gradient = plus(gradient, after[s])
            gradients += (gradient,)
        if dx is not None:
            store_rows(dx + (step - S) * dx_t, gradients, inside & (step >= begin + S) & (step < end + S))
        if dinitial is not None:
            store_rows(dinitial + states + step * width, gradients, inside & (begin == 0) & (step < S))
        window = _kept(window, BT, STATE)
        past = _kept(past, BT, STATE)
    if partial is not None:
        R: tl.constexpr = triton.next_power_of_2(W + 1)
        for _ in tl.static_range(R - W - 1):
            sums += (zero,)
        k = tl.arange(0, R)[:, None]
        store_rows(partial + (piece.to(tl.int64) * (W + 1) + k) * width + column, sums, inside & (k < W + 1))
