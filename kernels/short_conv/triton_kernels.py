"""The Triton kernels of the short convolution and its gradient: each row of x is read once, each row of y written once.

A program walks through a chunk of CT rows of one sequence for a block of BD neighbouring columns, BT rows at a time. A
thread owns whole columns: it loads and stores neighbouring ones together, and keeps what it needs of the rows of the
past in registers, as tuples of [BD]. A program reads the S = W - 1 rows before its chunk again; backward, those after
it too.

Steps t count in the order of time from 0 in each sequence; x[t] with t < 0 is in the initial state. Sums are in STATE,
float32 or for float64 sequences float64. No two programs write to one place, nothing that is read is written, and there
are no atomics: the programs may run in any order and give the same bits.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_rows import sigmoids


@triton.jit
def _share(cu_seqlens, T, N, D, BD: tl.constexpr, CT: tl.constexpr):
    # This program's sequence: its number, first row, length; the first step of the chunk; and the columns [BD]
    blocks = tl.cdiv(D, BD)
    piece = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    if cu_seqlens is None:
        chunks = tl.cdiv(T, CT)
        n = piece // chunks
        return n.to(tl.int64), (n * 0).to(tl.int64), n * 0 + T, piece % chunks * CT, column
    else:
        # Sequence n has the pieces from cu_seqlens[n] // CT + n on: at least one, and as many as it has chunks
        low = piece * 0
        high = low + N
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(cu_seqlens + middle).to(tl.int32) // CT + middle <= piece
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        first = tl.load(cu_seqlens + low).to(tl.int64)
        length = (tl.load(cu_seqlens + low + 1).to(tl.int64) - first).to(tl.int32)
        chunk = piece - (first.to(tl.int32) // CT + low)
        return low.to(tl.int64), first, length, chunk * CT, column


@triton.jit
def _walk(rows, n, first, length, batch_stride, stride, column, UNIT: tl.constexpr, REVERSE: tl.constexpr):
    # Pointers [BD] to step 0, and the distance from a step to the next. Strides come in units that divide them, so that
    # the compiler knows it.
    stride = stride.to(tl.int64) * UNIT
    rows += n * (batch_stride.to(tl.int64) * UNIT) + first * stride
    if REVERSE:
        rows += (length - 1) * stride
        stride = -stride
    return rows + column, stride


@triton.jit
def _past(x, x_t, states, t, D, S: tl.constexpr, inside):
    # x[t], which may be in the initial state
    row = tl.load(x + t * x_t, inside & (t >= 0), other=0.0)
    if states is not None:
        row += tl.load(states + (S + t) * D, inside & (t < 0), other=0.0)
    return row


@triton.jit
def _columns(tile):
    # [BD, n] -> its n columns [BD]
    if tile.shape[1] == 1:
        return (tl.reshape(tile, [tile.shape[0]]),)
    else:
        even, odd = tl.split(tl.reshape(tile, [tile.shape[0], tile.shape[1] // 2, 2]))
        evens, odds = _columns(even), _columns(odd)
        columns = ()
        for i in tl.static_range(len(evens)):
            columns += (evens[i], odds[i])
        return columns


@triton.jit
def _taps(weight, column, inside, W: tl.constexpr, STATE: tl.constexpr):
    # W of [BD]; those of a thread's columns lie side by side
    k = tl.arange(0, triton.next_power_of_2(W))
    tile = tl.load(weight + column[:, None] * W + k[None, :], inside[:, None] & (k < W)[None, :], other=0.0)
    return _columns(tile.to(STATE))


@triton.jit
def _bias(bias, column, inside, STATE: tl.constexpr):
    if bias is None:
        return tl.zeros([column.shape[0]], STATE)
    else:
        return tl.load(bias + column, inside, other=0.0).to(STATE)


@triton.jit(do_not_specialize=["T", "N", "D", "x_b", "x_t", "y_b"])
def conv_forward(
    x, weight, bias, initial, y, final, cu_seqlens, T, N, D, x_b, x_t, y_b,
    UNIT: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr, W: tl.constexpr, STATE: tl.constexpr,
    CT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    S: tl.constexpr = W - 1
    width = D * UNIT
    n, first, length, begin, column = _share(cu_seqlens, T, N, width, BD, CT)
    end = tl.minimum(begin + CT, length)
    inside = column < width
    x, x_t = _walk(x, n, first, length, x_b, x_t, column, UNIT, REVERSE)
    y, y_t = _walk(y, n, first, length, y_b, D, column, UNIT, REVERSE)
    states = n * S * width + column
    before = None if initial is None else initial + states
    taps = _taps(weight, column, inside, W, STATE)
    offset = _bias(bias, column, inside, STATE)

    window = ()
    for j in tl.static_range(S):
        window += (_past(x, x_t, before, begin - S + j, width, S, inside & (begin <= length)).to(STATE),)
    for t in tl.range(begin, end, BT, num_stages=STAGES):
        for s in tl.static_range(BT):
            window += (tl.load(x + (t + s) * x_t, inside & (t + s < end), other=0.0).to(STATE),)
        for s in tl.static_range(BT):
            z = offset
            for k in tl.static_range(W):
                z += taps[k] * window[s + k]
            if SILU:
                z *= sigmoids(z)[0]
            tl.store(y + (t + s) * y_t, z.to(y.dtype.element_ty), inside & (t + s < end))
        window = window[BT:]
    # The chunk in which the sequence ends, which is the first one if it has no rows
    if (begin < length) & (length <= begin + CT) | (begin == 0) & (length == 0):
        for j in tl.static_range(S):
            row = _past(x, x_t, before, length - S + j, width, S, inside)
            tl.store(final + states + j * width, row, inside)


@triton.jit(do_not_specialize=["T", "N", "D", "dy_b", "dy_t", "x_b", "x_t", "dx_b"])
def conv_backward(
    dy, dfinal, x, weight, bias, initial, dx, dinitial, partial, cu_seqlens, T, N, D, dy_b, dy_t, x_b, x_t, dx_b,
    UNIT: tl.constexpr, REVERSE: tl.constexpr, SILU: tl.constexpr, W: tl.constexpr, STATE: tl.constexpr,
    CT: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # dz[t] = dy[t] act'(z[t]) of the chunk and of the S steps after it, whose outputs its last rows of x are part of.
    # x[t - S] gets sum over k of taps[k] dz[t - k], and from step `length` on the gradient of the final state.
    S: tl.constexpr = W - 1
    width = D * UNIT
    n, first, length, begin, column = _share(cu_seqlens, T, N, width, BD, CT)
    end = tl.minimum(begin + CT, length)
    inside = column < width
    x, x_t = _walk(x, n, first, length, x_b, x_t, column, UNIT, REVERSE)
    if dy is not None:
        dy, dy_t = _walk(dy, n, first, length, dy_b, dy_t, column, UNIT, REVERSE)
    if dx is not None:
        dx, dx_t = _walk(dx, n, first, length, dx_b, D, column, UNIT, REVERSE)
    states = n * S * width + column
    before = None if initial is None else initial + states
    after = None if dfinal is None else dfinal + states
    taps = _taps(weight, column, inside, W, STATE)
    offset = _bias(bias, column, inside, STATE)
    zero = tl.zeros([BD], STATE)

    window = ()
    past = ()
    sums = ()
    for j in tl.static_range(S):
        window += (_past(x, x_t, before, begin - S + j, width, S, inside & (begin <= length)).to(STATE),)
        past += (zero,)
    for _ in tl.static_range(W + 1):
        sums += (zero,)
    # From S steps early, where what comes out belongs to the chunk before or to the initial state
    for t in tl.range(begin, tl.where(begin <= length, end + S, begin), BT, num_stages=STAGES):
        gradients = ()
        for s in tl.static_range(BT):
            window += (tl.load(x + (t + s) * x_t, inside & (t + s < length), other=0.0).to(STATE),)
        for s in tl.static_range(BT):
            if dy is None:
                gradients += (zero,)
            else:
                gradients += (tl.load(dy + (t + s) * dy_t, inside & (t + s < length), other=0.0).to(STATE),)
        for s in tl.static_range(BT):
            dz = gradients[s]
            if SILU:
                z = offset
                for k in tl.static_range(W):
                    z += taps[k] * window[s + k]
                of_z, of_minus_z = sigmoids(z)
                dz *= of_z * (1 + z * of_minus_z)
            past += (dz,)
            if partial is not None:
                own = tl.where(t + s < end, dz, zero)
                added = ()
                for k in tl.static_range(W):
                    added += (sums[k] + own * window[s + k],)
                added += (sums[W] + own,)
                sums = added
            gradient = zero
            for k in tl.static_range(W):
                gradient += taps[k] * past[S + s - k]
            if after is not None:
                last = inside & (t + s >= length) & (t + s < length + S)
                gradient += tl.load(after + (t + s - length) * width, last, other=0.0).to(STATE)
            if dx is not None:
                here = inside & (t + s >= begin + S) & (t + s < end + S)
                tl.store(dx + (t + s - S) * dx_t, gradient.to(dx.dtype.element_ty), here)
            if dinitial is not None:
                early = inside & (begin == 0) & (t + s < S)
                place = dinitial + states + (t + s) * width
                tl.store(place, gradient.to(dinitial.dtype.element_ty), early)
        window = window[BT:]
        past = past[BT:]
    if partial is not None:
        piece = (tl.program_id(0) // tl.cdiv(width, BD)).to(tl.int64)
        for k in tl.static_range(W + 1):
            tl.store(partial + (piece * (W + 1) + k) * width + column, sums[k], inside)
