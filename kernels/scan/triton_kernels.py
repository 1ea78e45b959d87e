"""The Triton kernels of the scan: h[t] = a[t] h[t-1] + x[t] and its gradient, each in one pass over the data.

A program walks the rows of one sequence for a block of neighbouring columns, BT rows at a time. Tiles [BT, BD] travel
between memory and the chip by 16 bytes to a thread, several rows to an instruction, and the next STAGES - 1 of them are
on their way while one is worked on. On the chip a tile is taken apart into its rows [1, BD], which turns it so that a
thread owns whole columns: the recurrence is then the plain loop over time, in registers and in the order in which it is
written, and no thread waits for another one's result. The rows that come out are put together into a tile and stored.

A row is a tuple of parts: (re, im) for pairs; (even columns, odd columns) for two columns to a thread; else (columns,).
Rows are counted in the order of the walk, from step 0. The first tile is the ragged one, so that nothing follows the
last step; what precedes step 0 is masked, with decay and input 0 where the state is 0 and decay 1 where it is given.
Everything is computed in STATE, float32 or for float64 sequences float64: rows are cast right after they are read and
right before they are written. No two programs write to one place, nothing that is read is written, and there are no
atomics: the programs may run in any order and give the same bits.
"""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _times(a, b, PAIRS: tl.constexpr):
    if len(a) == 1:
        return (a[0] * b[0],)
    elif PAIRS:
        return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]
    else:
        return a[0] * b[0], a[1] * b[1]


@triton.jit
def _plus(a, b):
    if len(a) == 1:
        return (a[0] + b[0],)
    else:
        return a[0] + b[0], a[1] + b[1]


@triton.jit
def _conjugate(a, PAIRS: tl.constexpr):
    if PAIRS:
        return a[0], -a[1]
    else:
        return a


@triton.jit
def _choose(condition, a, b):
    if len(a) == 1:
        return (tl.where(condition, a[0], b[0]),)
    else:
        return tl.where(condition, a[0], b[0]), tl.where(condition, a[1], b[1])


@triton.jit
def _constant(number, BD: tl.constexpr, STATE: tl.constexpr, PAIRS: tl.constexpr, TWO: tl.constexpr):
    # A row of one real number
    if PAIRS:
        return tl.full([1, BD // 2], number, STATE), tl.full([1, BD // 2], 0.0, STATE)
    elif TWO:
        return tl.full([1, BD // 2], number, STATE), tl.full([1, BD // 2], number, STATE)
    else:
        return (tl.full([1, BD], number, STATE),)


@triton.jit
def _take_apart(tile):
    # [n, columns] -> its n rows [1, columns]
    if tile.shape[0] == 1:
        return (tile,)
    else:
        halves = tl.reshape(tile, [tile.shape[0] // 2, 2, tile.shape[1]])
        even, odd = tl.split(tl.permute(halves, [0, 2, 1]))
        evens, odds = _take_apart(even), _take_apart(odd)
        rows = ()
        for i in tl.static_range(len(evens)):
            rows += (evens[i], odds[i])
        return rows


@triton.jit
def _put_together(rows):
    # The inverse
    if len(rows) == 1:
        return rows[0]
    else:
        even, odd = _put_together(rows[0::2]), _put_together(rows[1::2])
        return tl.reshape(tl.permute(tl.join(even, odd), [0, 2, 1]), [len(rows), even.shape[1]])


@triton.jit
def _load(place, mask, STATE: tl.constexpr, TWO: tl.constexpr):
    # The rows of a tile [n, BD] in memory
    tile = tl.load(place, mask, other=0.0)
    rows = ()
    if TWO:
        # [n, BD] -> [n, BD / 2] twice, neighbours to one thread
        even, odd = tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 2, 2]))
        evens, odds = _take_apart(even), _take_apart(odd)
        for i in tl.static_range(len(evens)):
            rows += ((evens[i].to(STATE), odds[i].to(STATE)),)
    else:
        columns = _take_apart(tile)
        for i in tl.static_range(len(columns)):
            rows += ((columns[i].to(STATE),),)
    return rows


@triton.jit
def _store(place, rows, mask):
    # The inverse
    firsts = ()
    seconds = ()
    for i in tl.static_range(len(rows)):
        firsts += (rows[i][0].to(place.dtype.element_ty),)
        if len(rows[i]) == 2:
            seconds += (rows[i][1].to(place.dtype.element_ty),)
    tile = _put_together(firsts)
    if len(seconds) > 0:
        tile = tl.reshape(tl.join(tile, _put_together(seconds)), [tile.shape[0], tile.shape[1] * 2])
    tl.store(place, tile, mask)


@triton.jit
def _place(cu_seqlens, T, W, BD: tl.constexpr):
    # This program's sequence, where that begins, how long it is, and the columns [1, BD]
    blocks = tl.cdiv(W, BD)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BD + tl.arange(0, BD)[None, :]
    if cu_seqlens is None:
        return n, n * 0, n * 0 + T, column
    else:
        first = tl.load(cu_seqlens + n).to(tl.int64)
        return n, first, tl.load(cu_seqlens + n + 1).to(tl.int64) - first, column


@triton.jit
def _walk(rows, n, row, batch_stride, stride, offset, column, UNIT: tl.constexpr, UP: tl.constexpr):
    # Pointers [BT, BD] for a walk that begins at this row, and the distance from a step to the next. Strides come in
    # units that divide them, so that the compiler knows it.
    stride = stride.to(tl.int64) * UNIT
    rows += n * (batch_stride.to(tl.int64) * UNIT) + row * stride
    if not UP:
        stride = -stride
    return rows + (offset * stride + column), stride


@triton.jit(do_not_specialize=["T", "W", "a_b", "a_t", "x_b", "x_t", "h_b"])
def scan_forward(
    a, x, initial, h, final, cu_seqlens, T, W, a_b, a_t, x_b, x_t, h_b,
    UNIT: tl.constexpr, REVERSE: tl.constexpr, PAIRS: tl.constexpr, TWO: tl.constexpr, STATE: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    width = W * UNIT
    n, first, length, column = _place(cu_seqlens, T, width, BD)
    inside = column < width
    offset = tl.arange(0, BT)[:, None]
    row = first + length - 1 if REVERSE else first
    a, a_t = _walk(a, n, row, a_b, a_t, offset, column, UNIT, not REVERSE)
    x, x_t = _walk(x, n, row, x_b, x_t, offset, column, UNIT, not REVERSE)
    h, h_t = _walk(h, n, row, h_b, W, offset, column, UNIT, not REVERSE)

    states = n * width + column
    if initial is None:
        state = _constant(0.0, BD, STATE, PAIRS, TWO)
    else:
        state = _load(initial + states, inside, STATE, TWO)[0]
    one = _constant(1.0, BD, STATE, PAIRS, TWO)
    tiles = tl.cdiv(length, BT)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        step = (tile - tiles) * BT + length
        missing = tl.where(tile == 0, tiles * BT - length, 0).to(tl.int32)
        present = (offset >= missing) & inside
        decays = _load(a + step * a_t, present, STATE, TWO)
        inputs = _load(x + step * x_t, present, STATE, TWO)
        outputs = ()
        for s in tl.static_range(BT):
            decay = decays[s] if initial is None else _choose(s >= missing, decays[s], one)
            state = _plus(_times(decay, state, PAIRS), inputs[s])
            outputs += (state,)
        _store(h + step * h_t, outputs, present)
    _store(final + states, (state,), inside)


@triton.jit(do_not_specialize=["T", "W", "dh_b", "dh_t", "a_b", "a_t", "h_b", "h_t", "out_b"])
def scan_backward(
    dh, dfinal, a, h, initial, da, dx, dinitial, cu_seqlens, T, W, dh_b, dh_t, a_b, a_t, h_b, h_t, out_b,
    UNIT: tl.constexpr, REVERSE: tl.constexpr, PAIRS: tl.constexpr, TWO: tl.constexpr, STATE: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # The walk is against time, and its state is s[t] = conj(a[t]) g[t], so that a row of a is met where it is needed:
    # g = dh + s, dx = g, da = g conj(h before). What is before a step in time is at the next step of the walk.
    width = W * UNIT
    n, first, length, column = _place(cu_seqlens, T, width, BD)
    inside = column < width
    offset = tl.arange(0, BT)[:, None]
    row = first if REVERSE else first + length - 1
    a, a_t = _walk(a, n, row, a_b, a_t, offset, column, UNIT, REVERSE)
    if dh is not None:
        dh, dh_t = _walk(dh, n, row, dh_b, dh_t, offset, column, UNIT, REVERSE)
    if da is not None:
        h, h_t = _walk(h, n, row, h_b, h_t, offset, column, UNIT, REVERSE)
        da, da_t = _walk(da, n, row, out_b, W, offset, column, UNIT, REVERSE)
    if dx is not None:
        dx, dx_t = _walk(dx, n, row, out_b, W, offset, column, UNIT, REVERSE)

    states = n * width + column
    if dfinal is None:
        state = _constant(0.0, BD, STATE, PAIRS, TWO)
    else:
        state = _load(dfinal + states, inside, STATE, TWO)[0]
    if initial is not None:
        before_first = _load(initial + states, inside, STATE, TWO)[0]
    one = _constant(1.0, BD, STATE, PAIRS, TWO)
    tiles = tl.cdiv(length, BT)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        step = (tile - tiles) * BT + length
        missing = tl.where(tile == 0, tiles * BT - length, 0).to(tl.int32)
        present = (offset >= missing) & inside
        # The row before the first is not in memory
        more = tile < tiles - 1
        decays = _load(a + step * a_t, present, STATE, TWO)
        if dh is not None:
            inputs = _load(dh + step * dh_t, present, STATE, TWO)
        if da is not None:
            befores = _load(h + (step + 1) * h_t, present & ((offset < BT - 1) | more), STATE, TWO)
        decay_gradients = ()
        input_gradients = ()
        for s in tl.static_range(BT):
            gradient = state if dh is None else _plus(state, inputs[s])
            input_gradients += (gradient,)
            if da is not None:
                before = befores[s]
                if initial is not None and s == BT - 1:
                    before = _choose(more, before, before_first)
                decay_gradients += (_times(gradient, _conjugate(before, PAIRS), PAIRS),)
            decay = decays[s] if dfinal is None else _choose(s >= missing, decays[s], one)
            state = _times(_conjugate(decay, PAIRS), gradient, PAIRS)
        if dx is not None:
            _store(dx + step * dx_t, input_gradients, present)
        if da is not None:
            _store(da + step * da_t, decay_gradients, present)
    if dinitial is not None:
        _store(dinitial + states, (state,), inside)
