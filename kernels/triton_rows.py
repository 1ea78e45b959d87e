"""What Triton kernels of recurrences with a vector state share: rows in registers, and which rows are a program's.

A tile [n, BD] travels between memory and the chip by 16 bytes to a thread, several rows to an instruction. On the chip
it is taken apart into its rows [1, BD], which turns it so that a thread owns whole columns. A row is a tuple of parts:
(re, im) for pairs; (even columns, odd columns) for two columns to a thread; else (columns,).

A program has one sequence, or one chunk of C steps of it where time is split, for a block of BD columns.
"""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def times(a, b, PAIRS: tl.constexpr):
    if len(a) == 1:
        return (a[0] * b[0],)
    elif PAIRS:
        return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]
    else:
        return a[0] * b[0], a[1] * b[1]


@triton.jit
def plus(a, b):
    if len(a) == 1:
        return (a[0] + b[0],)
    else:
        return a[0] + b[0], a[1] + b[1]


@triton.jit
def conjugate(a, PAIRS: tl.constexpr):
    if PAIRS:
        return a[0], -a[1]
    else:
        return a


@triton.jit
def choose(condition, a, b):
    if len(a) == 1:
        return (tl.where(condition, a[0], b[0]),)
    else:
        return tl.where(condition, a[0], b[0]), tl.where(condition, a[1], b[1])


@triton.jit
def constant(number, BD: tl.constexpr, STATE: tl.constexpr, PAIRS: tl.constexpr, TWO: tl.constexpr):
    # A row of one real number
    if PAIRS:
        return tl.full([1, BD // 2], number, STATE), tl.full([1, BD // 2], 0.0, STATE)
    elif TWO:
        return tl.full([1, BD // 2], number, STATE), tl.full([1, BD // 2], number, STATE)
    else:
        return (tl.full([1, BD], number, STATE),)


@triton.jit
def take_apart(tile):
    # [n, columns] -> its n rows [1, columns]
    if tile.shape[0] == 1:
        return (tile,)
    else:
        halves = tl.reshape(tile, [tile.shape[0] // 2, 2, tile.shape[1]])
        even, odd = tl.split(tl.permute(halves, [0, 2, 1]))
        evens, odds = take_apart(even), take_apart(odd)
        rows = ()
        for i in tl.static_range(len(evens)):
            rows += (evens[i], odds[i])
        return rows


@triton.jit
def put_together(rows):
    # The inverse
    if len(rows) == 1:
        return rows[0]
    else:
        even, odd = put_together(rows[0::2]), put_together(rows[1::2])
        return tl.reshape(tl.permute(tl.join(even, odd), [0, 2, 1]), [len(rows), even.shape[1]])


@triton.jit
def load_rows(place, mask, STATE: tl.constexpr, TWO: tl.constexpr):
    # The rows of a tile [n, BD] in memory
    tile = tl.load(place, mask, other=0.0)
    rows = ()
    if TWO:
        # [n, BD] -> [n, BD / 2] twice, neighbours to one thread
        even, odd = tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 2, 2]))
        evens, odds = take_apart(even), take_apart(odd)
        for i in tl.static_range(len(evens)):
            rows += ((evens[i].to(STATE), odds[i].to(STATE)),)
    else:
        columns = take_apart(tile)
        for i in tl.static_range(len(columns)):
            rows += ((columns[i].to(STATE),),)
    return rows


@triton.jit
def store_rows(place, rows, mask):
    # The inverse
    firsts = ()
    seconds = ()
    for i in tl.static_range(len(rows)):
        firsts += (rows[i][0].to(place.dtype.element_ty),)
        if len(rows[i]) == 2:
            seconds += (rows[i][1].to(place.dtype.element_ty),)
    tile = put_together(firsts)
    if len(seconds) > 0:
        tile = tl.reshape(tl.join(tile, put_together(seconds)), [tile.shape[0], tile.shape[1] * 2])
    tl.store(place, tile, mask)


@triton.jit
def sigmoids(z):
    # sigmoid(z) and sigmoid(-z), neither by a subtraction
    e = tl.exp(-tl.abs(z))
    larger = 1 / (1 + e)
    smaller = e * larger
    return tl.where(z < 0, smaller, larger), tl.where(z < 0, larger, smaller)


@triton.jit
def sequence_of(cu_seqlens, n, T):
    # Where sequence n begins, and its length
    if cu_seqlens is None:
        return n * 0, n * 0 + T
    else:
        first = tl.load(cu_seqlens + n).to(tl.int64)
        return first, tl.load(cu_seqlens + n + 1).to(tl.int64) - first


@triton.jit
def chunk_of(cu_seqlens, piece, T, N, C):
    # The sequence that a piece is part of, where that begins, its length, and the first step of the piece
    if cu_seqlens is None:
        chunks = tl.cdiv(T, C)
        n = (piece // chunks).to(tl.int64)
        return n, n * 0, n * 0 + T, (piece % chunks).to(tl.int64) * C
    else:
        # Sequence n has the pieces from cu_seqlens[n] // C + n on: at least one, and as many as it has chunks
        low = piece * 0
        high = low + N
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(cu_seqlens + middle).to(tl.int64) // C + middle <= piece
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        n = low.to(tl.int64)
        first, length = sequence_of(cu_seqlens, n, T)
        return n, first, length, (piece - (first // C + n)) * C


@triton.jit
def share(cu_seqlens, piece, T, N, C, PIECES: tl.constexpr):
    # The sequence, its first row, the steps from `begin` on that are this program's, how many, and how many there are
    if C is None:
        n = piece.to(tl.int64)
        first, length = sequence_of(cu_seqlens, n, T)
        return n, first, n * 0, length, length
    elif PIECES:
        # The rows are the chunks of packed sequences, whose last one nothing follows
        n = piece.to(tl.int64)
        first, length = sequence_of(cu_seqlens, n, T)
        chunks = tl.maximum(tl.cdiv(length, C) - 1, 0)
        return n, first // C + n, n * 0, chunks, chunks
    else:
        n, first, length, begin = chunk_of(cu_seqlens, piece, T, N, C)
        return n, first, begin, tl.maximum(tl.minimum(length - begin, C), 0), length


@triton.jit
def first_state(
    initial, entering, n, piece, begin, length, width, column, inside,
    BD: tl.constexpr, STATE: tl.constexpr, PAIRS: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    # The state before step `begin`: that of the sequence, or what the chunk before leaves behind
    state = constant(0.0, BD, STATE, PAIRS, TWO)
    if initial is not None:
        state = load_rows(initial + n * width + column, inside & (begin == 0), STATE, TWO)[0]
    if entering is not None:
        place = entering + (piece.to(tl.int64) - 1) * width + column
        state = plus(state, load_rows(place, inside & (begin > 0) & (begin < length), STATE, TWO)[0])
    return state


@triton.jit
def columns_of(W, BD: tl.constexpr):
    # This program's sequence or piece, and its columns [1, BD]
    blocks = tl.cdiv(W, BD)
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks * BD + tl.arange(0, BD)[None, :]


@triton.jit
def walk(rows, n, row, batch_stride, stride, offset, column, UNIT: tl.constexpr, UP: tl.constexpr):
    # Pointers [BT, BD] for a walk that begins at this row, and the distance from a step to the next. Strides come in
    # units that divide them, so that the compiler knows it.
    stride = stride.to(tl.int64) * UNIT
    rows += n * (batch_stride.to(tl.int64) * UNIT) + row * stride
    if not UP:
        stride = -stride
    return rows + (offset * stride + column), stride
