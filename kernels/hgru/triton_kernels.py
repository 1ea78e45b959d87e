"""The Triton kernels of HGRN's recurrence: those of the scan (kernels/scan/triton_kernels.py) with the gates in them.

    a = λ e^{iθ},  λ = γ + (1 − γ) σ(f),   h[t] = a[t] h[t-1] + (1 − γ) σ(−f[t]) act(i[t])

Gates are computed in registers from i and f, forward and again backward, and are never in memory. What backward adds up
over rows for γ and θ stays in a program's registers until its last row; triton_sums.py then adds what programs have
left, in one order. No two programs write to one place, nothing that a launch reads is written by it, and there are no
atomics.

W is how many numbers of i are in a row; the parts of a pair share one of f. The first tile of a walk is the ragged one,
whose missing rows leave the state as it is.
"""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.hgru.triton_gates import (
    bound_of,
    decayed,
    gate_columns,
    gates_of,
    inputs_of,
    onto,
    through_inputs,
    turn_of,
)
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
    gate = gate_columns(column, PAIRS, BD, width)
    n, first, begin, count, length = share(cu_seqlens, piece, T, N, C, False)
    inside = column < width
    offset = tl.arange(0, BT)[:, None]
    row = first + length - 1 - begin if REVERSE else first + begin
    i, i_t = walk(i, n, row, i_b, i_t, offset, column, UNIT, not REVERSE)
    f, f_t = walk(f, n, row, f_b, f_t, offset, gate, UNIT, not REVERSE)
    h, h_t = walk(h, n, row, h_b, W, offset, column, UNIT, not REVERSE)
    bound = bound_of(lower_bound, gate, gate < gates, STATE, BOTH)
    turn = turn_of(theta, gate, gate < gates, STATE, False)

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
            decay, rest, _ = gates_of(forgets[s], bound)
            after = plus(decayed(decay, turn, state, PAIRS), inputs_of(inputs[s], rest, PAIRS, ACTIVATION))
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
    gate = gate_columns(column, PAIRS, BD, width)
    n, first, begin, count, length = share(cu_seqlens, piece, T, N, C, False)
    followed = begin + count < length
    inside = column < width
    offset = tl.arange(0, BT)[:, None]
    row = first + length - 1 - begin if REVERSE else first + begin
    if i is not None:
        i, i_t = walk(i, n, row, i_b, i_t, offset, column, UNIT, not REVERSE)
    f, f_t = walk(f, n, row, f_b, f_t, offset, gate, UNIT, not REVERSE)
    bound = bound_of(lower_bound, gate, gate < gates, STATE, BOTH)
    turn = turn_of(theta, gate, gate < gates, STATE, BACKWARD)
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
            decay, rest, _ = gates_of(forgets[s], bound)
            decays_so_far = decayed(decay, turn, decays_so_far, PAIRS)
            if BACKWARD:
                if i is not None:
                    state = decayed(decay, turn, plus(state, inputs[s]), PAIRS)
            else:
                state = plus(decayed(decay, turn, state, PAIRS), inputs_of(inputs[s], rest, PAIRS, ACTIVATION))
    place = piece.to(tl.int64) * width + column
    store_rows(product + place, (decays_so_far,), inside & followed)
    store_rows(ending + place, (state,), inside & followed)


@triton.jit(
    do_not_specialize=[
        "T", "W", "G", "N", "C", "dh_b", "dh_t", "i_b", "i_t", "f_b", "f_t", "h_b", "h_t", "di_b", "df_b", "df_t",
    ]
)  # fmt: skip
def hgru_backward(
    dh, dfinal, entering, i, f, h, lower_bound, theta, initial, di, df, partial, dinitial, cu_seqlens,
    T, W, G, N, C, dh_b, dh_t, i_b, i_t, f_b, f_t, h_b, h_t, di_b, df_b, df_t,
    UNIT: tl.constexpr, REVERSE: tl.constexpr, ACTIVATION: tl.constexpr, PAIRS: tl.constexpr, TWO: tl.constexpr,
    STATE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr, BOUND: tl.constexpr,
    THETA: tl.constexpr,
):  # fmt: skip
    # The walk is against time, and its state is s[t] = conj(a[t]) g[t] with g = dh + s, the gradient of h[t]. From it
    #   di = (1 − λ) act'(i) g,   dλ = Re(e^{−iθ} g conj(h before)) − act(i) · g,   df = dλ (1 − γ) σ(f) σ(−f),
    # and the sums over rows of dλ σ(−f) for γ and of λ Im(e^{−iθ} g conj(h before)) for θ.
    width = W * UNIT
    gates = G * UNIT
    BOTH: tl.constexpr = TWO and not PAIRS
    piece, column = columns_of(width, BD)
    gate = gate_columns(column, PAIRS, BD, width)
    n, first, begin, count, length = share(cu_seqlens, piece, T, N, C, False)
    inside = column < width
    offset = tl.arange(0, BT)[:, None]
    row = first + begin if REVERSE else first + length - 1 - begin
    i, i_t = walk(i, n, row, i_b, i_t, offset, column, UNIT, REVERSE)
    f, f_t = walk(f, n, row, f_b, f_t, offset, gate, UNIT, REVERSE)
    if dh is not None:
        dh, dh_t = walk(dh, n, row, dh_b, dh_t, offset, column, UNIT, REVERSE)
    # h is needed for the gradient of the decay alone
    DECAY: tl.constexpr = (df is not None) or BOUND or THETA
    if DECAY:
        h, h_t = walk(h, n, row, h_b, h_t, offset, column, UNIT, REVERSE)
    if di is not None:
        di, di_t = walk(di, n, row, di_b, W, offset, column, UNIT, REVERSE)
    if df is not None:
        df, df_t = walk(df, n, row, df_b, df_t, offset, gate, UNIT, REVERSE)
    bound = bound_of(lower_bound, gate, gate < gates, STATE, BOTH)
    turn = turn_of(theta, gate, gate < gates, STATE, True)

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
            decay, rest, slope = gates_of(forgets[s], bound)
            own, through = through_inputs(inputs[s], rest, gradient, PAIRS, ACTIVATION)
            input_gradients += (own,)
            if DECAY:
                before = befores[s]
                if initial is not None and s == BT - 1:
                    before = choose(more, before, before_first)
                along, across = onto(gradient, before, turn, PAIRS)
                forget = ()
                new_sums = ()
                new_angles = ()
                for k in tl.static_range(len(decay)):
                    of_decay = along[k] - through[k]
                    forget += (of_decay * slope[k],)
                    if BOUND:
                        new_sums += (sums[k] + tl.where(s >= missing, of_decay * sigmoids(forgets[s][k])[1], 0.0),)
                    if THETA:
                        new_angles += (angles[k] + tl.where(s >= missing, decay[k] * across[k], 0.0),)
                forget_gradients += (forget,)
                if BOUND:
                    sums = new_sums
                if THETA:
                    angles = new_angles
            state = choose(s >= missing, decayed(decay, turn, gradient, PAIRS), state)
        if di is not None:
            store_rows(di + step * di_t, input_gradients, present & inside)
        if df is not None:
            store_rows(df + step * df_t, forget_gradients, present & (gate < gates))
    if dinitial is not None:
        last = (begin + count == length) & ((count > 0) | (begin == 0))
        store_rows(dinitial + n * width + column, (state,), inside & last)
    # Into [pieces, 2, D]
    place = piece.to(tl.int64) * (2 * gates) + gate
    if BOUND:
        store_rows(partial + place, (sums,), gate < gates)
    if THETA:
        store_rows(partial + gates + place, (angles,), gate < gates)
