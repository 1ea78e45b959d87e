"""The Triton kernels of the scan: h[t] = a[t] h[t-1] + x[t] and its gradient.

A program walks the rows of one sequence for a block of neighbouring columns, BT rows at a time. The next STAGES - 1
tiles [BT, BD] are on their way while one is worked on: taken apart into rows (kernels/triton_rows.py), of which a
thread has whole columns. The recurrence is then the plain loop over time, in registers and in the order in which it is
written, and no thread waits for another one's result. The rows that come out are put together into a tile and stored.

Where time is split (C is not None), a program has C steps of a sequence. scan_chunks makes one step of each chunk, the
product of its decays and the state that it ends with from 0; scan_forward makes the states between chunks of these,
which are rows of a scan like any other; then scan_forward or scan_backward start from them, every chunk by itself.
docs/derivations/scan.md has the whole.

Rows are counted in the order of the walk, from step 0. The first tile is the ragged one, so that nothing follows the
last step; what precedes step 0 is masked, with decay and input 0 where the state is 0 and decay 1 where it is given.
Everything is computed in STATE, float32 or for float64 sequences float64: rows are cast right after they are read and
right before they are written. No two programs write to one place, nothing that a launch reads is written by it, and
there are no atomics: the programs may run in any order and give the same bits.
"""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_rows import (
    choose,
    columns_of,
    conjugate,
    constant,
    first_state,
    load_rows,
    plus,
    share,
    store_rows,
    times,
    walk,
)


@triton.jit(do_not_specialize=["T", "W", "N", "C", "a_b", "a_t", "x_b", "x_t", "h_b"])
def scan_forward(
    a, x, initial, entering, h, final, cu_seqlens, T, W, N, C, a_b, a_t, x_b, x_t, h_b,
    UNIT: tl.constexpr, REVERSE: tl.constexpr, PIECES: tl.constexpr, PAIRS: tl.constexpr, TWO: tl.constexpr,
    STATE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    width = W * UNIT
    piece, column = columns_of(width, BD)
    n, first, begin, count, length = share(cu_seqlens, piece, T, N, C, PIECES)
    inside = column < width
    offset = tl.arange(0, BT)[:, None]
    row = first + length - 1 - begin if REVERSE else first + begin
    a, a_t = walk(a, n, row, a_b, a_t, offset, column, UNIT, not REVERSE)
    x, x_t = walk(x, n, row, x_b, x_t, offset, column, UNIT, not REVERSE)
    h, h_t = walk(h, n, row, h_b, W, offset, column, UNIT, not REVERSE)

    state = first_state(initial, entering, n, piece, begin, length, width, column, inside, BD, STATE, PAIRS, TWO)
    one = constant(1.0, BD, STATE, PAIRS, TWO)
    tiles = tl.cdiv(count, BT)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        step = (tile - tiles) * BT + count
        missing = tl.where(tile == 0, tiles * BT - count, 0).to(tl.int32)
        present = (offset >= missing) & inside
        decays = load_rows(a + step * a_t, present, STATE, TWO)
        inputs = load_rows(x + step * x_t, present, STATE, TWO)
        outputs = ()
        for s in tl.static_range(BT):
            decay = decays[s]
            if (initial is not None) or (entering is not None):
                decay = choose(s >= missing, decay, one)
            state = plus(times(decay, state, PAIRS), inputs[s])
            outputs += (state,)
        store_rows(h + step * h_t, outputs, present)
    if final is not None:
        last = (begin + count == length) & ((count > 0) | (begin == 0))
        store_rows(final + n * width + column, (state,), inside & last)


@triton.jit(do_not_specialize=["T", "W", "N", "C", "a_b", "a_t", "x_b", "x_t"])
def scan_chunks(
    a, x, product, ending, cu_seqlens, T, W, N, C, a_b, a_t, x_b, x_t,
    UNIT: tl.constexpr, REVERSE: tl.constexpr, BACKWARD: tl.constexpr, PAIRS: tl.constexpr, TWO: tl.constexpr,
    STATE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Of every chunk but the last of a sequence, all of which are whole
    width = W * UNIT
    piece, column = columns_of(width, BD)
    n, first, begin, count, length = share(cu_seqlens, piece, T, N, C, False)
    followed = begin + count < length
    inside = column < width
    offset = tl.arange(0, BT)[:, None]
    row = first + length - 1 - begin if REVERSE else first + begin
    a, a_t = walk(a, n, row, a_b, a_t, offset, column, UNIT, not REVERSE)
    if x is not None:
        x, x_t = walk(x, n, row, x_b, x_t, offset, column, UNIT, not REVERSE)
    state = constant(0.0, BD, STATE, PAIRS, TWO)
    decays_so_far = constant(1.0, BD, STATE, PAIRS, TWO)
    present = (offset >= 0) & inside
    tiles = tl.where(followed, count // BT, 0)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        step = (tile - tiles) * BT + count
        decays = load_rows(a + step * a_t, present, STATE, TWO)
        if x is not None:
            inputs = load_rows(x + step * x_t, present, STATE, TWO)
        for s in tl.static_range(BT):
            decay = conjugate(decays[s], PAIRS) if BACKWARD else decays[s]
            decays_so_far = times(decay, decays_so_far, PAIRS)
            if BACKWARD:
                if x is not None:
                    state = times(decay, plus(state, inputs[s]), PAIRS)
            else:
                state = plus(times(decay, state, PAIRS), inputs[s])
    place = piece.to(tl.int64) * width + column
    store_rows(product + place, (decays_so_far,), inside & followed)
    store_rows(ending + place, (state,), inside & followed)


@triton.jit(do_not_specialize=["T", "W", "N", "C", "dh_b", "dh_t", "a_b", "a_t", "h_b", "h_t", "out_b"])
def scan_backward(
    dh, dfinal, entering, a, h, initial, da, dx, dinitial, cu_seqlens,
    T, W, N, C, dh_b, dh_t, a_b, a_t, h_b, h_t, out_b,
    UNIT: tl.constexpr, REVERSE: tl.constexpr, PAIRS: tl.constexpr, TWO: tl.constexpr, STATE: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # The walk is against time, and its state is s[t] = conj(a[t]) g[t], so that a row of a is met where it is needed:
    # g = dh + s, dx = g, da = g conj(h before). What is before a step in time is at the next step of the walk.
    width = W * UNIT
    piece, column = columns_of(width, BD)
    n, first, begin, count, length = share(cu_seqlens, piece, T, N, C, False)
    inside = column < width
    offset = tl.arange(0, BT)[:, None]
    row = first + begin if REVERSE else first + length - 1 - begin
    a, a_t = walk(a, n, row, a_b, a_t, offset, column, UNIT, REVERSE)
    if dh is not None:
        dh, dh_t = walk(dh, n, row, dh_b, dh_t, offset, column, UNIT, REVERSE)
    if da is not None:
        h, h_t = walk(h, n, row, h_b, h_t, offset, column, UNIT, REVERSE)
        da, da_t = walk(da, n, row, out_b, W, offset, column, UNIT, REVERSE)
    if dx is not None:
        dx, dx_t = walk(dx, n, row, out_b, W, offset, column, UNIT, REVERSE)

    state = first_state(dfinal, entering, n, piece, begin, length, width, column, inside, BD, STATE, PAIRS, TWO)
    if initial is not None:
        before_first = load_rows(initial + n * width + column, inside, STATE, TWO)[0]
    one = constant(1.0, BD, STATE, PAIRS, TWO)
    tiles = tl.cdiv(count, BT)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        step = (tile - tiles) * BT + count
        missing = tl.where(tile == 0, tiles * BT - count, 0).to(tl.int32)
        present = (offset >= missing) & inside
        # The row before the first is not in memory
        more = begin + step + BT < length
        decays = load_rows(a + step * a_t, present, STATE, TWO)
        if dh is not None:
            inputs = load_rows(dh + step * dh_t, present, STATE, TWO)
        if da is not None:
            befores = load_rows(h + (step + 1) * h_t, present & ((offset < BT - 1) | more), STATE, TWO)
        decay_gradients = ()
        input_gradients = ()
        for s in tl.static_range(BT):
            gradient = state if dh is None else plus(state, inputs[s])
            input_gradients += (gradient,)
            if da is not None:
                before = befores[s]
                if initial is not None and s == BT - 1:
                    before = choose(more, before, before_first)
                decay_gradients += (times(gradient, conjugate(before, PAIRS), PAIRS),)
            decay = decays[s]
            if (dfinal is not None) or (entering is not None):
                decay = choose(s >= missing, decay, one)
            state = times(conjugate(decay, PAIRS), gradient, PAIRS)
        if dx is not None:
            store_rows(dx + step * dx_t, input_gradients, present)
        if da is not None:
            store_rows(da + step * da_t, decay_gradients, present)
    if dinitial is not None:
        last = (begin + count == length) & ((count > 0) | (begin == 0))
        store_rows(dinitial + n * width + column, (state,), inside & last)
