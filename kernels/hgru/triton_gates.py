"""The gates of HGRN's recurrence in registers, for its Triton kernels. A row is a tuple of parts, as in triton_rows."""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_rows import load_rows, sigmoids


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
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
def gates_of(f, bound):
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
def decayed(decay, turn, state, PAIRS: tl.constexpr):
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
def inputs_of(i, rest, PAIRS: tl.constexpr, ACTIVATION: tl.constexpr):
    # (1 − λ) act(i)
    row = ()
    for k in tl.static_range(len(i)):
        row += (rest[0 if PAIRS else k] * activated(i[k], ACTIVATION)[0],)
    return row


@triton.jit
def through_inputs(i, rest, gradient, PAIRS: tl.constexpr, ACTIVATION: tl.constexpr):
    # The gradient of i, and act(i) times the gradient of (1 − λ) act(i), as one number for a number of f
    own = ()
    through = ()
    for k in tl.static_range(len(i)):
        act, derivative = activated(i[k], ACTIVATION)
        own += (rest[0 if PAIRS else k] * derivative * gradient[k],)
        through += (act * gradient[k],)
    if PAIRS:
        return own, (through[0] + through[1],)
    else:
        return own, through


@triton.jit
def onto(gradient, before, turn, PAIRS: tl.constexpr):
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
def cos_and_sin(angle):
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
def turn_of(theta, place, inside, STATE: tl.constexpr, BACK: tl.constexpr):
    # cos θ and sin θ, BACK: of -θ; None without θ, which Triton 3.6 refuses where it is spelt out
    if theta is not None:
        cos, sin = cos_and_sin(tl.load(theta + place, inside, other=0.0))
        return cos.to(STATE), (-sin if BACK else sin).to(STATE)


@triton.jit
def bound_of(lower_bound, place, inside, STATE: tl.constexpr, TWO: tl.constexpr):
    if lower_bound is not None:
        return load_rows(lower_bound + place, inside, STATE, TWO)[0]


@triton.jit
def gate_columns(column, PAIRS: tl.constexpr, BD: tl.constexpr, W):
    # The columns of f beside these of i
    if PAIRS:
        blocks = tl.cdiv(W, BD)
        return tl.program_id(0) % blocks * (BD // 2) + tl.arange(0, BD // 2)[None, :]
    else:
        return column
