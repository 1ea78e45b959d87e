"""The Triton kernels of the delta rule in chunks of C rows; docs/derivations/delta_rule.md has the equations.

First (I + A diag(β))⁻¹, for all chunks at once: what is below its diagonal. Then two walks over the chunks of a
sequence, with the state or its gradient in registers: forward, which makes the outputs, or leaves the state that enters
each chunk in `entering` and u before its strength in `errors`; and against time, which leaves the gradient of the state
that leaves each chunk in `leaving`, and that of the values. Between these two states a chunk's other gradients are its
own business: they are made for all chunks at once, by a program each that has all values, so that no sum is in parts.

Tiles are turned so that a product has many rows, 16 to a warp: states are [values, keys], rows of values [values, C].
Rows past the end of a sequence are zeros, which do nothing. Everything is computed in float32. PRECISE is what products
of any numbers are computed with; a factor that is an input is NARROW where it has 16 bits, whose digits TF32 has.
"""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_chunks import chunk_rows, load_tile, load_vector, store_vector
from kernels.triton_matrix import place


@triton.jit
def added(sums, a, b, NARROW: tl.constexpr, PRECISE: tl.constexpr):
    # sums + a @ b; NARROW: b has few digits
    if NARROW and PRECISE == "tf32x3":
        high = (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        return tl.dot(a - high, b, tl.dot(high, b, sums, input_precision="tf32"), input_precision="tf32")
    else:
        return tl.dot(a, b, sums, input_precision=PRECISE)


@triton.jit
def product(a, b, NARROW: tl.constexpr, PRECISE: tl.constexpr):
    return added(tl.zeros([a.shape[0], b.shape[1]], tl.float32), a, b, NARROW, PRECISE)


@triton.jit
def product_of_inputs(a, b, NARROW: tl.constexpr, PRECISE: tl.constexpr):
    return tl.dot(a, b, input_precision="tf32" if NARROW and PRECISE == "tf32x3" else PRECISE)


@triton.jit
def rows_left(length, c, C: tl.constexpr):
    # of chunk c, in 32 bits: numbers of 64 are two registers
    return tl.minimum(length - c * C, C).to(tl.int32)


@triton.jit
def load_turned(tensor, first, count, h, H, W, columns, C: tl.constexpr):
    # [columns, C]
    rows = tl.arange(0, C)
    inside = (columns < W)[:, None] & (rows < count)[None, :]
    begin = tensor + (first * H + h) * W
    return tl.load(begin + (rows[None, :] * (H * W) + columns[:, None]), inside, other=0.0).to(tl.float32)


@triton.jit
def store_turned(tensor, first, count, h, H, W, columns, numbers, C: tl.constexpr):
    rows = tl.arange(0, C)
    inside = (columns < W)[:, None] & (rows < count)[None, :]
    begin = tensor + (first * H + h) * W
    tl.store(begin + (rows[None, :] * (H * W) + columns[:, None]), numbers.to(tensor.dtype.element_ty), inside)


@triton.jit
def load_state(states, index, K, V, keys, values):
    # [values, keys] of the state at this index of [..., K, V]; zeros where there are no states
    if states is None:
        return tl.zeros([values.shape[0], keys.shape[0]], tl.float32)
    else:
        inside = (values < V)[:, None] & (keys < K)[None, :]
        return tl.load(states + index * K * V + (keys[None, :] * V + values[:, None]), inside, other=0.0)


@triton.jit
def store_state(states, index, K, V, keys, values, state):
    inside = (values < V)[:, None] & (keys < K)[None, :]
    tl.store(states + index * K * V + (keys[None, :] * V + values[:, None]), state, inside)


@triton.jit
def below(C: tl.constexpr):
    return tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :]


@triton.jit
def between_rows(log_decay, first, count, h, H, C: tl.constexpr):
    # The decays from row j to row i on and below the diagonal [i, j], else 0
    lower = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]
    if log_decay is None:
        return tl.where(lower, 1.0, 0.0)
    else:
        # logarithms are only ever added, and at most 0: see "Decays" in the derivation
        g = load_vector(log_decay, first, count, h, H, C)
        return tl.where(lower, tl.exp(tl.cumsum(tl.where(below(C), g[:, None], 0.0), 0)), 0.0)


@triton.jit
def decays(log_decay, first, count, h, H, C: tl.constexpr):
    # Of what enters by row [C], of what a row writes by the chunk's end [C], and over the chunk
    if log_decay is None:
        return tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32), 1.0
    else:
        g = load_vector(log_decay, first, count, h, H, C)
        suffix = tl.exp(tl.sum(tl.where(below(C), g[:, None], 0.0), 0))
        return tl.exp(tl.cumsum(g, 0)), suffix, tl.exp(tl.sum(g, 0))


@triton.jit
def cells(C: tl.constexpr):
    return tl.arange(0, C)[:, None] * C + tl.arange(0, C)[None, :]


@triton.jit
def load_inverse(inverses, index, C: tl.constexpr):
    ones = tl.where(tl.arange(0, C)[:, None] == tl.arange(0, C)[None, :], 1.0, 0.0)
    return tl.load(inverses + index * C * C + cells(C), below(C), other=0.0) + ones


@triton.jit(do_not_specialize=["T", "N"])
def delta_inverses(
    k, beta, log_decay, inverses, cu_seqlens, T, N, H, K,
    C: tl.constexpr, BK: tl.constexpr, NARROW: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    chunk, h = tl.program_id(0) // H, tl.program_id(0) % H
    _, first, count = chunk_rows(cu_seqlens, chunk, T, N, C)
    # packed sequences leave chunks that are nobody's
    if count > 0:
        key = load_tile(k, first, count, h, H, K, tl.arange(0, BK), C)
        L = product_of_inputs(key, tl.trans(key), NARROW, PRECISE) * between_rows(log_decay, first, count, h, H, C)
        L = tl.where(below(C), L * load_vector(beta, first, count, h, H, C)[None, :], 0.0)
        row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
        # from blocks of two rows up: what is below two inverse blocks comes from both
        X = tl.where(row == column, 1.0, tl.where(row // 2 == column // 2, -L, 0.0))
        for level in tl.static_range(1, 6):
            if 2**level < C:
                # corners of 2^level rows
                inside = (row >> level + 1 == column >> level + 1) & (row >> level != column >> level)
                corner = tl.dot(tl.where(inside, L, 0.0), X, input_precision=PRECISE)
                X -= tl.dot(X, corner, input_precision=PRECISE)
        tl.store(inverses + (chunk.to(tl.int64) * H + h) * C * C + cells(C), X, below(C))


@triton.jit(do_not_specialize=["T"])
def delta_chunks(
    q, k, v, beta, log_decay, initial, inverses, y, final, entering, errors, cu_seqlens, T, H, K, V,
    SCALE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NARROW: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    n, h, _, values, begin, length, slot = place(cu_seqlens, T, H, V, C, BV)
    keys = tl.arange(0, BK)
    state = load_state(initial, n * H + h, K, V, keys, values)
    for c in range(0, tl.cdiv(length, C)):
        first, count, index = begin + c * C, rows_left(length, c, C), (slot + c) * H + h
        if entering is not None:
            store_state(entering, index, K, V, keys, values, state)
        prefix, suffix, total = decays(log_decay, first, count, h, H, C)
        key = load_tile(k, first, count, h, H, K, keys, C)
        seen = product(state, tl.trans(key), NARROW, PRECISE) * prefix[None, :]
        if y is not None:
            # beside the other read, for the sake of registers
            query = load_tile(q, first, count, h, H, K, keys, C)
            out = product(state, tl.trans(query), NARROW, PRECISE) * prefix[None, :]
        error = load_turned(v, first, count, h, H, V, values, C) - seen
        error = tl.dot(error, tl.trans(load_inverse(inverses, index, C)), input_precision=PRECISE)
        if errors is not None:
            store_turned(errors, first, count, h, H, V, values, error, C)
        u = error * load_vector(beta, first, count, h, H, C)[None, :]
        if y is not None:
            M = product_of_inputs(query, tl.trans(key), NARROW, PRECISE) * between_rows(
                log_decay, first, count, h, H, C
            )
            out += tl.dot(u, tl.trans(M), input_precision=PRECISE)
            store_turned(y, first, count, h, H, V, values, out * SCALE, C)
        state = added(total * state, u * suffix[None, :], key, NARROW, PRECISE)
    if final is not None:
        store_state(final, n * H + h, K, V, keys, values, state)


@triton.jit(do_not_specialize=["T"])
def delta_chunks_back(
    dy, dfinal, q, k, beta, log_decay, inverses, leaving, dvalues, dinitial, cu_seqlens, T, H, K, V,
    SCALE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NARROW: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    n, h, _, values, begin, length, slot = place(cu_seqlens, T, H, V, C, BV)
    keys = tl.arange(0, BK)
    dstate = load_state(dfinal, n * H + h, K, V, keys, values)
    chunks = tl.cdiv(length, C)
    for back in range(0, chunks):
        c = chunks - 1 - back
        first, count, index = begin + c * C, rows_left(length, c, C), (slot + c) * H + h
        store_state(leaving, index, K, V, keys, values, dstate)
        prefix, suffix, total = decays(log_decay, first, count, h, H, C)
        key = load_tile(k, first, count, h, H, K, keys, C)
        du = product(dstate, tl.trans(key), NARROW, PRECISE) * suffix[None, :]
        query = load_tile(q, first, count, h, H, K, keys, C)
        M = product_of_inputs(query, tl.trans(key), NARROW, PRECISE) * between_rows(log_decay, first, count, h, H, C)
        out = load_turned(dy, first, count, h, H, V, values, C) * SCALE
        du += tl.dot(out, M, input_precision=PRECISE)
        du *= load_vector(beta, first, count, h, H, C)[None, :]
        dvalue = tl.dot(du, load_inverse(inverses, index, C), input_precision=PRECISE)
        store_turned(dvalues, first, count, h, H, V, values, dvalue, C)
        dstate = added(total * dstate, out * prefix[None, :], query, NARROW, PRECISE)
        dstate = added(dstate, -dvalue * prefix[None, :], key, NARROW, PRECISE)
    if dinitial is not None:
        store_state(dinitial, n * H + h, K, V, keys, values, dstate)


@triton.jit(do_not_specialize=["T", "N"])
def delta_chunk_gradients(
    dy, q, k, beta, log_decay, entering, leaving, errors, dvalues, dq, dk, dv, dbeta, dlog_decay, cu_seqlens, T, N, H,
    K, V,
    SCALE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NARROW: tl.constexpr,
    PRECISE: tl.constexpr,
):  # fmt: skip
    chunk, h = tl.program_id(0) // H, tl.program_id(0) % H
    _, first, count = chunk_rows(cu_seqlens, chunk, T, N, C)
    if count > 0:
        keys = tl.arange(0, BK)
        index = chunk.to(tl.int64) * H + h
        # of what reads the entering state, and of what is written to the leaving one but for its strength
        dquery, dread, dwrite = (tl.zeros([BK, C], tl.float32),) * 3
        # of the products of rows, but for their decays and strengths
        dM, dA, dtotal = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32), 0.0
        for block in range(0, tl.cdiv(V, BV)):
            values = block * BV + tl.arange(0, BV)
            state = load_state(entering, index, K, V, keys, values)
            dstate = load_state(leaving, index, K, V, keys, values)
            dtotal += tl.sum(tl.sum(state * dstate, 1), 0)
            error = load_turned(errors, first, count, h, H, V, values, C)
            out = load_turned(dy, first, count, h, H, V, values, C) * SCALE
            dvalue = load_turned(dvalues, first, count, h, H, V, values, C)
            if dv is not None:
                store_turned(dv, first, count, h, H, V, values, dvalue, C)
            dwrite += tl.dot(tl.trans(dstate), error, input_precision=PRECISE)
            dquery += tl.dot(tl.trans(state), out, input_precision=PRECISE)
            dread -= tl.dot(tl.trans(state), dvalue, input_precision=PRECISE)
            dM += tl.dot(tl.trans(out), error, input_precision=PRECISE)
            dA -= tl.dot(tl.trans(dvalue), error, input_precision=PRECISE)
        key = load_turned(k, first, count, h, H, K, keys, C)
        query = load_turned(q, first, count, h, H, K, keys, C)
        strength = load_vector(beta, first, count, h, H, C)
        between = between_rows(log_decay, first, count, h, H, C)
        prefix, suffix, total = decays(log_decay, first, count, h, H, C)
        dquery, dread, dwrite = dquery * prefix[None, :], dread * prefix[None, :], dwrite * suffix[None, :]
        dM, dA = dM * between, tl.where(below(C), dA * between, 0.0)
        M = dM * product_of_inputs(tl.trans(query), key, NARROW, PRECISE)
        A = dA * product_of_inputs(tl.trans(key), key, NARROW, PRECISE)
        if dbeta is not None:
            store_vector(dbeta, first, count, h, H, tl.sum(M + A, 0) + tl.sum(dwrite * key, 0), C)
        dwrite, dM, dA = dwrite * strength[None, :], dM * strength[None, :], dA * strength[None, :]
        if dlog_decay is not None:
            reads, writes = tl.sum(dquery * query + dread * key, 0), tl.sum(dwrite * key, 0)
            # a decay is in all that reaches from before its row to its row or past it
            past = tl.cumsum((M + A) * strength[None, :], 0, reverse=True)
            sums = tl.sum(tl.where(below(C), past + writes[None, :], reads[None, :]), 1) + total * dtotal
            store_vector(dlog_decay, first, count, h, H, sums, C)
        if dq is not None:
            dquery += tl.dot(key, tl.trans(dM), input_precision=PRECISE)
            store_turned(dq, first, count, h, H, K, keys, dquery, C)
        if dk is not None:
            dread += dwrite + tl.dot(query, dM, input_precision=PRECISE)
            dread += tl.dot(key, dA + tl.trans(dA), input_precision=PRECISE)
            store_turned(dk, first, count, h, H, K, keys, dread, C)
