"""The Triton kernels of HGRN's recurrence: those of the scan (kernels/scan/triton_kernels.py) with the gates in them.

    a = λ e^{iθ},  λ = γ + (1 − γ) σ(f),   h[t] = a[t] h[t-1] + (1 − γ) σ(−f[t]) act(i[t])

Gates are computed in registers from i and f, forward and again backward, and are never in memory. What backward adds up
over rows for γ and θ stays in a program's registers until its last row; hgru_sums then adds what programs have left, in
one order. No two programs write to one place, nothing that a launch reads is written by it, and there are no atomics.

W is how many numbers of i are in a row; the parts of a pair share one of f. The first tile of a walk is the ragged one,
whose missing rows leave the state as it is.
"""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_rows import (
    choose,
    columns_of,
    constant,
    first_state,
    load_rows,
    plus,
    share,
    sigmoids,
    store_rows,
    walk,
)


@triton.jit
def _activation(x, ACTIVATION: tl.constexpr):
    # act(x) and its derivative
    if ACTIVATION == "identity":
        return x, tl.full(x.shape, 1.0, x.dtype)
    elif ACTIVATION == "tanh":
        p, q = sigmoids(2 * x)
        s = x * x
        # Near 0 its series: p - q would cancel
        few: tl.constexpr = 0.02 if x.dtype.primitive_bitwidth == 64 else 0.2
        series = x * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
        return tl.where(tl.abs(x) < few, series, p - q), 4 * p * q
    else:
        p, q = sigmoids(x)
        if ACTIVATION == "silu":
            return x * p, p * (1 + x * q)
        elif ACTIVATION == "sigmoid":
            return p, p * q
        else:
            return tl.where(x >= 0, x + 0.5, p), tl.where(x >= 0, 1.0, p * q)


@triton.jit
def _gates(f, bound):
    # Of each part of a row of f: λ, 1 − λ, and 1 − γ times the derivative of σ
    decay = ()
    rest = ()
    slope = ()
    for k in tl.static_range(len(f)):
        p, q = sigmoids(f[k])
        if bound is None:
            decay += (p,)
            rest += (q,)
            slope += (p * q,)
        else:
            decay += (bound[k] + (1 - bound[k]) * p,)
            rest += ((1 - bound[k]) * q,)
            slope += ((1 - bound[k]) * p * q,)
    return decay, rest, slope


@triton.jit
def _decayed(decay, turn, state, PAIRS: tl.constexpr):
    # λ e^{iθ} times a row; `turn` is cos θ, sin θ
    if len(state) == 1:
        return (decay[0] * state[0],)
    elif not PAIRS:
        return decay[0] * state[0], decay[1] * state[1]
    elif turn is None:
        return decay[0] * state[0], decay[0] * state[1]
    else:
        real = turn[0] * state[0] - turn[1] * state[1]
        imaginary = turn[0] * state[1] + turn[1] * state[0]
        return decay[0] * real, decay[0] * imaginary


@triton.jit
def _inputs(i, rest, PAIRS: tl.constexpr, ACTIVATION: tl.constexpr):
    # (1 − λ) act(i)
    row = ()
    for k in tl.static_range(len(i)):
        row += (rest[0 if PAIRS else k] * _activation(i[k], ACTIVATION)[0],)
    return row


@triton.jit
def _through_inputs(i, rest, gradient, PAIRS: tl.constexpr, ACTIVATION: tl.constexpr):
    # The gradient of i, and act(i) times the gradient of (1 − λ) act(i), as one number for a number of f
    own = ()
    through = ()
    for k in tl.static_range(len(i)):
        act, derivative = _activation(i[k], ACTIVATION)
        own += (rest[0 if PAIRS else k] * derivative * gradient[k],)
        through += (act * gradient[k],)
    if PAIRS:
        return own, (through[0] + through[1],)
    else:
        return own, through


@triton.jit
def _onto(gradient, before, turn, PAIRS: tl.constexpr):
    # Real and imaginary part of e^{−iθ} g conj(h before), which are along and across λ; `turn` is that of -θ
    if len(gradient) == 1:
        return (gradient[0] * before[0],), (gradient[0] * 0,)
    elif not PAIRS:
        return (gradient[0] * before[0], gradient[1] * before[1]), (gradient[0] * 0, gradient[1] * 0)
    else:
        real = gradient[0] * before[0] + gradient[1] * before[1]
        imaginary = gradient[1] * before[0] - gradient[0] * before[1]
        if turn is None:
            return (real,), (imaginary,)
        else:
            return (turn[0] * real - turn[1] * imaginary,), (turn[0] * imaginary + turn[1] * real,)


@triton.jit
def _turn(angle):
    # cos and sin by their series, in float64: the library's reduction of large angles needs memory of its own
    angle = angle.to(tl.float64)
    quarters = tl.floor(angle * 0.6366197723675814 + 0.5)
    # π / 2 in three parts, products with the first two of which are exact
    r = angle - quarters * 1.57079632673412561417 - quarters * 6.07710050630396597660e-11
    r -= quarters * 2.02226624879595063154e-21
    s = r * r
    sin = -1 / 1307674368000 + s * (1 / 355687428096000)
    sin = -1 / 39916800 + s * (1 / 6227020800 + s * sin)
    sin = r * (1 + s * (-1 / 6 + s * (1 / 120 + s * (-1 / 5040 + s * (1 / 362880 + s * sin)))))
    cos = -1 / 87178291200 + s * (1 / 20922789888000)
    cos = 1 / 40320 + s * (-1 / 3628800 + s * (1 / 479001600 + s * cos))
    cos = 1 + s * (-1 / 2 + s * (1 / 24 + s * (-1 / 720 + s * cos)))
    quadrant = quarters - 4 * tl.floor(quarters * 0.25)
    odd = (quadrant == 1) | (quadrant == 3)
    x, y = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((quadrant == 1) | (quadrant == 2), -x, x), tl.where(quadrant >= 2, -y, y)


@triton.jit
def _angle(theta, place, inside, STATE: tl.constexpr, BACK: tl.constexpr):
    # cos θ and sin θ, BACK: of -θ
    if theta is None:
        return None
    else:
        cos, sin = _turn(tl.load(theta + place, inside, other=0.0))
        return cos.to(STATE), (-sin if BACK else sin).to(STATE)


@triton.jit
def _bound(lower_bound, place, inside, STATE: tl.constexpr, TWO: tl.constexpr):
    if lower_bound is None:
        return None
    else:
        return load_rows(lower_bound + place, inside, STATE, TWO)[0]


@triton.jit
def _gate_columns(column, PAIRS: tl.constexpr, BD: tl.constexpr, W):
    # The columns of f beside these of i
    if PAIRS:
        blocks = tl.cdiv(W, BD)
        return tl.program_id(0) % blocks * (BD // 2) + tl.arange(0, BD // 2)[None, :]
    else:
        return column


@triton.jit(do_not_specialize=["T", "W", "G", "N", "C", "i_b", "i_t", "f_b", "f_t", "h_b"])
def hgru_forward(
    i, f, lower_bound, theta, initial, entering, h, final, cu_seqlens, T, W, G, N, C, i_b, i_t, f_b, f_t, h_b,
    UNIT: tl.constexpr, REVERSE: tl.constexpr, ACTIVATION: tl.constexpr, PAIRS: tl.constexpr, TWO: tl.constexpr,
    STATE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    width = W * UNIT
    gates = G * UNIT
    BOTH: tl.constexpr = TWO and not PAIRS
    piece, column = columns_of(width, BD)
    gate = _gate_columns(column, PAIRS, BD, width)
    n, first, begin, count, length = share(cu_seqlens, piece, T, N, C, False)
    inside = column < width
    offset = tl.arange(0, BT)[:, None]
    row = first + length - 1 - begin if REVERSE else first + begin
    i, i_t = walk(i, n, row, i_b, i_t, offset, column, UNIT, not REVERSE)
    f, f_t = walk(f, n, row, f_b, f_t, offset, gate, UNIT, not REVERSE)
    h, h_t = walk(h, n, row, h_b, W, offset, column, UNIT, not REVERSE)
    bound = _bound(lower_bound, gate, gate < gates, STATE, BOTH)
    turn = _angle(theta, gate, gate < gates, STATE, False)

    state = first_state(initial, entering, n, piece, begin, length, width, column, inside, BD, STATE, PAIRS, TWO)
    tiles = tl.cdiv(count, BT)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        step = (tile - tiles) * BT + count
        missing = tl.where(tile == 0, tiles * BT - count, 0).to(tl.int32)
        present = offset >= missing
        inputs = load_rows(i + step * i_t, present & inside, STATE, TWO)
        forgets = load_rows(f + step * f_t, present & (gate < gates), STATE, BOTH)
        outputs = ()
        for s in tl.static_range(BT):
            decay, rest, _ = _gates(forgets[s], bound)
            after = plus(_decayed(decay, turn, state, PAIRS), _inputs(inputs[s], rest, PAIRS, ACTIVATION))
            state = choose(s >= missing, after, state)
            outputs += (state,)
        store_rows(h + step * h_t, outputs, present & inside)
    last = (begin + count == length) & ((count > 0) | (begin == 0))
    store_rows(final + n * width + column, (state,), inside & last)


@triton.jit(do_not_specialize=["T", "W", "G", "N", "C", "i_b", "i_t", "f_b", "f_t"])
def hgru_chunks(
    i, f, lower_bound, theta, product, ending, cu_seqlens, T, W, G, N, C, i_b, i_t, f_b, f_t,
    UNIT: tl.constexpr, REVERSE: tl.constexpr, ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr, PAIRS: tl.constexpr,
    TWO: tl.constexpr, STATE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Of every chunk but the last of a sequence, all of which are whole. Backward i is the gradient of h.
    width = W * UNIT
    gates = G * UNIT
    BOTH: tl.constexpr = TWO and not PAIRS
    piece, column = columns_of(width, BD)
    gate = _gate_columns(column, PAIRS, BD, width)
    n, first, begin, count, length = share(cu_seqlens, piece, T, N, C, False)
    followed = begin + count < length
    inside = column < width
    offset = tl.arange(0, BT)[:, None]
    row = first + length - 1 - begin if REVERSE else first + begin
    if i is not None:
        i, i_t = walk(i, n, row, i_b, i_t, offset, column, UNIT, not REVERSE)
    f, f_t = walk(f, n, row, f_b, f_t, offset, gate, UNIT, not REVERSE)
    bound = _bound(lower_bound, gate, gate < gates, STATE, BOTH)
    turn = _angle(theta, gate, gate < gates, STATE, BACKWARD)
    state = constant(0.0, BD, STATE, PAIRS, TWO)
    decays_so_far = constant(1.0, BD, STATE, PAIRS, TWO)
    every = offset >= 0
    tiles = tl.where(followed, count // BT, 0)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        step = (tile - tiles) * BT + count
        if i is not None:
            inputs = load_rows(i + step * i_t, every & inside, STATE, TWO)
        forgets = load_rows(f + step * f_t, every & (gate < gates), STATE, BOTH)
        for s in tl.static_range(BT):
            decay, rest, _ = _gates(forgets[s], bound)
            decays_so_far = _decayed(decay, turn, decays_so_far, PAIRS)
            if BACKWARD:
                if i is not None:
                    state = _decayed(decay, turn, plus(state, inputs[s]), PAIRS)
            else:
                state = plus(_decayed(decay, turn, state, PAIRS), _inputs(inputs[s], rest, PAIRS, ACTIVATION))
    place = piece.to(tl.int64) * width + column
    store_rows(product + place, (decays_so_far,), inside & followed)
    store_rows(ending + place, (state,), inside & followed)


@triton.jit(
    do_not_specialize=[
        "T", "W", "G", "N", "C", "dh_b", "dh_t", "i_b", "i_t", "f_b", "f_t", "h_b", "h_t", "di_b", "df_b", "df_t",
    ]
)  # fmt: skip
def hgru_backward(
    dh, dfinal, entering, i, f, h, lower_bound, theta, initial, di, df, bounds, thetas, dinitial, cu_seqlens,
    T, W, G, N, C, dh_b, dh_t, i_b, i_t, f_b, f_t, h_b, h_t, di_b, df_b, df_t,
    UNIT: tl.constexpr, REVERSE: tl.constexpr, ACTIVATION: tl.constexpr, PAIRS: tl.constexpr, TWO: tl.constexpr,
    STATE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # The walk is against time, and its state is s[t] = conj(a[t]) g[t] with g = dh + s, the gradient of h[t]. From it
    #   di = (1 − λ) act'(i) g,   dλ = Re(e^{−iθ} g conj(h before)) − act(i) · g,   df = dλ (1 − γ) σ(f) σ(−f),
    # and the sums over rows of dλ σ(−f) for γ and of λ Im(e^{−iθ} g conj(h before)) for θ.
    width = W * UNIT
    gates = G * UNIT
    BOTH: tl.constexpr = TWO and not PAIRS
    piece, column = columns_of(width, BD)
    gate = _gate_columns(column, PAIRS, BD, width)
    n, first, begin, count, length = share(cu_seqlens, piece, T, N, C, False)
    inside = column < width
    offset = tl.arange(0, BT)[:, None]
    row = first + begin if REVERSE else first + length - 1 - begin
    i, i_t = walk(i, n, row, i_b, i_t, offset, column, UNIT, REVERSE)
    f, f_t = walk(f, n, row, f_b, f_t, offset, gate, UNIT, REVERSE)
    if dh is not None:
        dh, dh_t = walk(dh, n, row, dh_b, dh_t, offset, column, UNIT, REVERSE)
    # h is needed for the gradient of the decay alone
    DECAY: tl.constexpr = (df is not None) or (bounds is not None) or (thetas is not None)
    if DECAY:
        h, h_t = walk(h, n, row, h_b, h_t, offset, column, UNIT, REVERSE)
    if di is not None:
        di, di_t = walk(di, n, row, di_b, W, offset, column, UNIT, REVERSE)
    if df is not None:
        df, df_t = walk(df, n, row, df_b, df_t, offset, gate, UNIT, REVERSE)
    bound = _bound(lower_bound, gate, gate < gates, STATE, BOTH)
    turn = _angle(theta, gate, gate < gates, STATE, True)

    state = first_state(dfinal, entering, n, piece, begin, length, width, column, inside, BD, STATE, PAIRS, TWO)
    if DECAY and initial is not None:
        before_first = load_rows(initial + n * width + column, inside, STATE, TWO)[0]
    sums = ()
    angles = ()
    for _ in tl.static_range(2 if BOTH else 1):
        sums += (tl.zeros(gate.shape if not BOTH else [1, BD // 2], STATE),)
        angles += (tl.zeros(gate.shape if not BOTH else [1, BD // 2], STATE),)
    tiles = tl.cdiv(count, BT)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        step = (tile - tiles) * BT + count
        missing = tl.where(tile == 0, tiles * BT - count, 0).to(tl.int32)
        present = offset >= missing
        # The row before the first is not in memory
        more = begin + step + BT < length
        inputs = load_rows(i + step * i_t, present & inside, STATE, TWO)
        forgets = load_rows(f + step * f_t, present & (gate < gates), STATE, BOTH)
        if dh is not None:
            given = load_rows(dh + step * dh_t, present & inside, STATE, TWO)
        if DECAY:
            here = present & inside & ((offset < BT - 1) | more)
            befores = load_rows(h + (step + 1) * h_t, here, STATE, TWO)
        input_gradients = ()
        forget_gradients = ()
        for s in tl.static_range(BT):
            gradient = state if dh is None else plus(state, given[s])
            decay, rest, slope = _gates(forgets[s], bound)
            own, through = _through_inputs(inputs[s], rest, gradient, PAIRS, ACTIVATION)
            input_gradients += (own,)
            if DECAY:
                before = befores[s]
                if initial is not None and s == BT - 1:
                    before = choose(more, before, before_first)
                along, across = _onto(gradient, before, turn, PAIRS)
                forget = ()
                new_sums = ()
                new_angles = ()
                for k in tl.static_range(len(decay)):
                    of_decay = along[k] - through[k]
                    forget += (of_decay * slope[k],)
                    if bounds is not None:
                        new_sums += (sums[k] + tl.where(s >= missing, of_decay * sigmoids(forgets[s][k])[1], 0.0),)
                    if thetas is not None:
                        new_angles += (angles[k] + tl.where(s >= missing, decay[k] * across[k], 0.0),)
                forget_gradients += (forget,)
                if bounds is not None:
                    sums = new_sums
                if thetas is not None:
                    angles = new_angles
            state = choose(s >= missing, _decayed(decay, turn, gradient, PAIRS), state)
        if di is not None:
            store_rows(di + step * di_t, input_gradients, present & inside)
        if df is not None:
            store_rows(df + step * df_t, forget_gradients, present & (gate < gates))
    if dinitial is not None:
        last = (begin + count == length) & ((count > 0) | (begin == 0))
        store_rows(dinitial + n * width + column, (state,), inside & last)
    if bounds is not None:
        store_rows(bounds + piece.to(tl.int64) * gates + gate, (sums,), gate < gates)
    if thetas is not None:
        store_rows(thetas + piece.to(tl.int64) * gates + gate, (angles,), gate < gates)


@triton.jit(do_not_specialize=["pieces"])
def hgru_sums(bounds, thetas, dlower_bound, dtheta, pieces, D, STATE: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr):
    # Rows [pieces, D], added in one order: a program has BD columns of one of the two, or of the only one
    blocks = tl.cdiv(D, BD)
    second = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks * BD + tl.arange(0, BD))[None, :]
    lane = tl.arange(0, BP)[:, None]
    if bounds is not None:
        _sum(bounds, dlower_bound, pieces, D, lane, column, second == 0, STATE)
    if thetas is not None:
        _sum(thetas, dtheta, pieces, D, lane, column, (second == 1) | (bounds is None), STATE)


@triton.jit
def _sum(parts, total, pieces, D, lane, column, here, STATE: tl.constexpr):
    sums = tl.zeros([lane.shape[0], column.shape[1]], STATE)
    inside = (column < D) & here
    for piece in range(0, tl.where(here, pieces, 0), lane.shape[0]):
        row = piece + lane
        sums += tl.load(parts + row.to(tl.int64) * D + column, (row < pieces) & inside, other=0.0)
    tl.store(total + column, tl.sum(sums, 0)[None, :], inside)
