"""The Triton kernels of the gated norm and its gradient: each number is read once and written once.

A program has one head of R rows at a time, as a tile [R, BV] of BV >= V columns in registers. Backward it goes through
CT rows of one head and adds what they give to the gradients of weight and bias; triton_sums.py adds those of all
programs, in one order. Sums are in STATE, float32 or for float64 rows float64. No two programs write to one place,
nothing that is read is written, and there are no atomics: the programs may run in any order and give the same bits.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from kernels.hgru.triton_gates import activated


@triton.jit
def _places(row, head, batch_stride, stride, T, column, V: tl.constexpr, UNIT: tl.constexpr):
    # Offsets [R, BV] in a tensor [B, T, H, V]. Strides come in units that divide them, so that the compiler knows it.
    batch, step = (row // T).to(tl.int64), (row % T).to(tl.int64)
    start = (batch * batch_stride + step * stride) * UNIT + head.to(tl.int64) * V
    return start[:, None] + column[None, :]


@triton.jit
def _normalised(u, inside, V: tl.constexpr, EPS: tl.constexpr, CENTER: tl.constexpr):
    # n [R, BV], zeros outside, and 1 / deviation [R, 1]
    if CENTER:
        u = tl.where(inside, u - (tl.sum(u, 1) / V)[:, None], 0.0)
    inverse = (1 / tl.sqrt(tl.sum(u * u, 1) / V + EPS))[:, None]
    return u * inverse, inverse


@triton.jit
def _parameter(parameter, head, column, V: tl.constexpr, STATE: tl.constexpr):
    # [1, BV]
    return tl.load(parameter + head * V + column, column < V, other=0.0).to(STATE)[None, :]


@triton.jit(do_not_specialize=["rows", "T", "H", "x_b", "x_t", "gate_b", "gate_t"])
def norm_forward(
    x, gate, weight, bias, y, rows, T, H, x_b, x_t, gate_b, gate_t,
    V: tl.constexpr, UNIT: tl.constexpr, EPS: tl.constexpr, CENTER: tl.constexpr, ACTIVATION: tl.constexpr,
    GATE_FIRST: tl.constexpr, STATE: tl.constexpr, R: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % H
    row = tl.program_id(0) // H * R + tl.arange(0, R)
    column = tl.arange(0, BV)
    inside = (row < rows)[:, None] & (column < V)[None, :]
    u = tl.load(x + _places(row, head, x_b, x_t, T, column, V, UNIT), inside, other=0.0).to(STATE)
    if gate is not None:
        g = tl.load(gate + _places(row, head, gate_b, gate_t, T, column, V, UNIT), inside, other=0.0).to(STATE)
        opened = activated(g, ACTIVATION)[0]
        if GATE_FIRST:
            u *= opened
    z = _normalised(u, inside, V, EPS, CENTER)[0]
    if weight is not None:
        z *= _parameter(weight, head, column, V, STATE)
    if bias is not None:
        z += _parameter(bias, head, column, V, STATE)
    if gate is not None and not GATE_FIRST:
        z *= opened
    place = ((row.to(tl.int64) * H + head) * V)[:, None] + column[None, :]
    tl.store(y + place, z.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "T", "H", "x_b", "x_t", "gate_b", "gate_t", "dy_b", "dy_t"])
def norm_backward(
    dy, x, gate, weight, bias, dx, dgate, partial, rows, T, H, x_b, x_t, gate_b, gate_t, dy_b, dy_t,
    V: tl.constexpr, UNIT: tl.constexpr, EPS: tl.constexpr, CENTER: tl.constexpr, ACTIVATION: tl.constexpr,
    GATE_FIRST: tl.constexpr, STATE: tl.constexpr, R: tl.constexpr, BV: tl.constexpr, CT: tl.constexpr,
    STAGES: tl.constexpr, DWEIGHT: tl.constexpr, DBIAS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % H
    chunk = tl.program_id(0) // H
    column = tl.arange(0, BV)
    dweight = tl.zeros([R, BV], STATE)
    dbias = tl.zeros([R, BV], STATE)
    if weight is not None:
        w = _parameter(weight, head, column, V, STATE)
    if bias is not None:
        b = _parameter(bias, head, column, V, STATE)
    for begin in tl.range(chunk * CT, tl.minimum(chunk * CT + CT, rows), R, num_stages=STAGES):
        row = begin + tl.arange(0, R)
        inside = (row < rows)[:, None] & (column < V)[None, :]
        u = tl.load(x + _places(row, head, x_b, x_t, T, column, V, UNIT), inside, other=0.0).to(STATE)
        dz = tl.load(dy + _places(row, head, dy_b, dy_t, T, column, V, UNIT), inside, other=0.0).to(STATE)
        if gate is not None:
            g = tl.load(gate + _places(row, head, gate_b, gate_t, T, column, V, UNIT), inside, other=0.0).to(STATE)
            opened, slope = activated(g, ACTIVATION)
            if GATE_FIRST:
                slope *= u
                u *= opened
            else:
                slope *= dz
                dz *= opened
        n, inverse = _normalised(u, inside, V, EPS, CENTER)
        place = ((row.to(tl.int64) * H + head) * V)[:, None] + column[None, :]
        if dgate is not None and not GATE_FIRST:
            z = n
            if weight is not None:
                z *= w
            if bias is not None:
                z += b
            tl.store(dgate + place, (slope * z).to(dgate.dtype.element_ty), inside)
        if DWEIGHT:
            dweight += dz * n
        if DBIAS:
            dbias += dz
        if weight is not None:
            dz *= w
        du = dz - n * (tl.sum(dz * n, 1) / V)[:, None]
        if CENTER:
            du -= (tl.sum(dz, 1) / V)[:, None]
        du *= inverse
        if gate is not None and GATE_FIRST:
            if dgate is not None:
                tl.store(dgate + place, (slope * du).to(dgate.dtype.element_ty), inside)
            du *= opened
        if dx is not None:
            tl.store(dx + place, du.to(dx.dtype.element_ty), inside)
    # Into [chunks, 2, H, V]
    place = (chunk.to(tl.int64) * 2 * H + head) * V + column
    if DWEIGHT:
        tl.store(partial + place, tl.sum(dweight, 0), column < V)
    if DBIAS:
        tl.store(partial + H * V + place, tl.sum(dbias, 0), column < V)
