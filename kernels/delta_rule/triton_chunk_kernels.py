"""The Triton kernels of the delta rule in chunks of C rows; docs/derivations/delta_rule.md has the equations.

First (I + A diag(β))⁻¹, for all chunks at once: what is below its diagonal, and beside it the products of rows that the
others want, M as `reads` and A as `overlaps`. Then two walks over the chunks of a sequence, with the state or its
gradient in registers, BLOCKS tiles of BK keys: forward, which makes the outputs, or leaves the state that enters each
chunk in `entering` and u before its strength in `errors`; and against time, which leaves the gradient of the state that
leaves each chunk in `leaving`, and that of the values. Between these two states a chunk's other gradients are its own
business: they are made for all chunks at once, by a program each that has all values, so that no sum is in parts.

Tiles are turned so that a product has many rows, 16 to a warp: states are [values, keys], rows of values [values, C].
Rows past the end of a sequence are zeros, which do nothing. Everything is computed in float32. PRECISE is what products
of any numbers are computed with; a factor that is an input is NARROW where it has 16 bits, whose digits TF32 has. Sizes
are known to the compiler where a program has many places to hold.
"""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_chunks import chunk_rows, load_tile, load_vector, store_vector
from kernels.triton_matrix import place


@triton.jit
def high_part(x):
    # The digits that TF32 has, to nearest: the rest is twice as small, and that of two factors is left out
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, sums, BATCHED: tl.constexpr, PRECISE: tl.constexpr):
    # sums + a @ b; BATCHED: 16 rows at a time, of which each warp has its own
    if BATCHED:
        G: tl.constexpr = a.shape[0] // 16
        every = tl.broadcast_to(b[None, :, :], [G, b.shape[0], b.shape[1]])
        found = tl.reshape(sums, [G, 16, b.shape[1]])
        found = tl.dot(tl.reshape(a, [G, 16, a.shape[1]]), every, found, input_precision=PRECISE)
        return tl.reshape(found, [a.shape[0], b.shape[1]])
    else:
        return tl.dot(a, b, sums, input_precision=PRECISE)


@triton.jit
def product(a, b, NARROW: tl.constexpr, PRECISE: tl.constexpr, BATCHED: tl.constexpr = False):
    # a @ b; NARROW: b has few digits. What is small comes first; Triton's own tf32x3 takes more registers
    if PRECISE == "tf32x3":
        high, found = high_part(a), tl.zeros([a.shape[0], b.shape[1]], tl.float32)
        if not NARROW:
            rest = b - high_part(b)
            b = high_part(b)
            found = dot(high, rest, found, BATCHED, "tf32")
        found = dot(a - high, b, found, BATCHED, "tf32")
        return dot(high, b, found, BATCHED, "tf32")
    else:
        return tl.dot(a, b, input_precision=PRECISE)


@triton.jit
def added(sums, a, b, NARROW: tl.constexpr, PRECISE: tl.constexpr, BATCHED: tl.constexpr):
    # sums + a @ b, in the registers of the sums where they are many
    if NARROW and PRECISE == "tf32x3":
        high = high_part(a)
        return dot(a - high, b, dot(high, b, sums, BATCHED, "tf32"), BATCHED, "tf32")
    else:
        return sums + product(a, b, NARROW, PRECISE, BATCHED)


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
def load_blocks(states, index, K, V, values, BK: tl.constexpr, BLOCKS: tl.constexpr):
    # The same, BK keys to each tile of a tuple
    blocks = ()
    for b in tl.static_range(BLOCKS):
        blocks += (load_state(states, index, K, V, b * BK + tl.arange(0, BK), values),)
    return blocks


@triton.jit
def store_blocks(states, index, K, V, values, blocks, BK: tl.constexpr, BLOCKS: tl.constexpr):
    for b in tl.static_range(BLOCKS):
        keys = b * BK + tl.arange(0, BK)
        inside = (values < V)[:, None] & (keys < K)[None, :]
        tl.store(states + index * K * V + (keys[None, :] * V + values[:, None]), blocks[b], inside)


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
def load_pairs(pairs, index, inside, C: tl.constexpr):
    # [C, C] of [..., C, C]; zeros but inside
    return tl.load(pairs + index * C * C + cells(C), inside, other=0.0)


@triton.jit
def load_inverse(inverses, index, C: tl.constexpr):
    ones = tl.where(tl.arange(0, C)[:, None] == tl.arange(0, C)[None, :], 1.0, 0.0)
    return load_pairs(inverses, index, below(C), C) + ones


@triton.jit
def lower(C: tl.constexpr):
    return tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]


@triton.jit
def store_inverse(inverses, index, A, strength, C: tl.constexpr, PRECISE: tl.constexpr):
    # Of I + A diag(strength), of what A has below its diagonal
    L = tl.where(below(C), A * strength[None, :], 0.0)
    row, column = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    # from blocks of two rows up: what is below two inverse blocks comes from both
    X = tl.where(row == column, 1.0, tl.where(row // 2 == column // 2, -L, 0.0))
    for level in tl.static_range(1, 6):
        if 2**level < C:
            # corners of 2^level rows
            inside = (row >> level + 1 == column >> level + 1) & (row >> level != column >> level)
            corner = tl.dot(tl.where(inside, L, 0.0), X, input_precision=PRECISE)
            X -= tl.dot(X, corner, input_precision=PRECISE)
    tl.store(inverses + index * C * C + cells(C), X, below(C))


@triton.jit(do_not_specialize=["T", "N"])
def delta_pairs(
    q, k, beta, log_decay, inverses, reads, overlaps, cu_seqlens, T, N, H, K,
    C: tl.constexpr, BK: tl.constexpr, NARROW: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    chunk, h = tl.program_id(0) // H, tl.program_id(0) % H
    _, first, count = chunk_rows(cu_seqlens, chunk, T, N, C)
    # packed sequences leave chunks that are nobody's
    if count > 0:
        index = chunk.to(tl.int64) * H + h
        A, M = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
        for start in range(0, K, BK):
            keys = start + tl.arange(0, BK)
            key = load_tile(k, first, count, h, H, K, keys, C)
            if reads is not None:
                query = load_tile(q, first, count, h, H, K, keys, C)
            A += product_of_inputs(key, tl.trans(key), NARROW, PRECISE)
            if reads is not None:
                M += product_of_inputs(query, tl.trans(key), NARROW, PRECISE)
        between = between_rows(log_decay, first, count, h, H, C)
        A, M = A * between, M * between
        if reads is not None:
            tl.store(reads + index * C * C + cells(C), M, lower(C))
        if overlaps is not None:
            tl.store(overlaps + index * C * C + cells(C), A, below(C))
        store_inverse(inverses, index, A, load_vector(beta, first, count, h, H, C), C, PRECISE)


@triton.jit(do_not_specialize=["T"])
def delta_chunks(
    q, k, v, beta, log_decay, initial, inverses, reads, y, final, entering, errors, cu_seqlens, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BLOCKS: tl.constexpr, BV: tl.constexpr, NARROW: tl.constexpr, PRECISE: tl.constexpr, BATCHED: tl.constexpr,
):  # fmt: skip
    n, h, _, values, begin, length, slot = place(cu_seqlens, T, H, V, C, BV)
    state = load_blocks(initial, n * H + h, K, V, values, BK, BLOCKS)
    for c in range(0, tl.cdiv(length, C)):
        first, count, index = begin + c * C, rows_left(length, c, C), (slot + c) * H + h
        if entering is not None:
            store_blocks(entering, index, K, V, values, state, BK, BLOCKS)
        seen, out = tl.zeros([BV, C], tl.float32), tl.zeros([BV, C], tl.float32)
        M = tl.zeros([C, C], tl.float32)
        for b in tl.static_range(BLOCKS):
            keys = b * BK + tl.arange(0, BK)
            key = load_tile(k, first, count, h, H, K, keys, C)
            seen = added(seen, state[b], tl.trans(key), NARROW, PRECISE, BATCHED)
            if y is not None:
                # beside the other read, for the sake of registers
                query = load_tile(q, first, count, h, H, K, keys, C)
                out = added(out, state[b], tl.trans(query), NARROW, PRECISE, BATCHED)
                if reads is None:
                    M += product_of_inputs(query, tl.trans(key), NARROW, PRECISE)
        prefix, suffix, total = decays(log_decay, first, count, h, H, C)
        error = load_turned(v, first, count, h, H, V, values, C) - seen * prefix[None, :]
        error = product(error, tl.trans(load_inverse(inverses, index, C)), False, PRECISE, BATCHED)
        if errors is not None:
            store_turned(errors, first, count, h, H, V, values, error, C)
        u = error * load_vector(beta, first, count, h, H, C)[None, :]
        if y is not None:
            if reads is None:
                M *= between_rows(log_decay, first, count, h, H, C)
            else:
                M = load_pairs(reads, index, lower(C), C)
            out = out * prefix[None, :] + product(u, tl.trans(M), False, PRECISE, BATCHED)
            store_turned(y, first, count, h, H, V, values, out * SCALE, C)
        u *= suffix[None, :]
        left = ()
        for b in tl.static_range(BLOCKS):
            if BLOCKS > 1:
                # once more, for the sake of registers
                key = load_tile(k, first, count, h, H, K, b * BK + tl.arange(0, BK), C)
            left += (added(total * state[b], u, key, NARROW, PRECISE, BATCHED),)
        state = left
    if final is not None:
        store_blocks(final, n * H + h, K, V, values, state, BK, BLOCKS)


@triton.jit(do_not_specialize=["T"])
def delta_chunks_back(
    dy, dfinal, q, k, beta, log_decay, inverses, reads, leaving, dvalues, dinitial, cu_seqlens, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BLOCKS: tl.constexpr, BV: tl.constexpr, NARROW: tl.constexpr, PRECISE: tl.constexpr, BATCHED: tl.constexpr,
):  # fmt: skip
    n, h, _, values, begin, length, slot = place(cu_seqlens, T, H, V, C, BV)
    dstate = load_blocks(dfinal, n * H + h, K, V, values, BK, BLOCKS)
    chunks = tl.cdiv(length, C)
    for back in range(0, chunks):
        c = chunks - 1 - back
        first, count, index = begin + c * C, rows_left(length, c, C), (slot + c) * H + h
        store_blocks(leaving, index, K, V, values, dstate, BK, BLOCKS)
        du = tl.zeros([BV, C], tl.float32)
        for b in tl.static_range(BLOCKS):
            keys = b * BK + tl.arange(0, BK)
            key = load_tile(k, first, count, h, H, K, keys, C)
            du = added(du, dstate[b], tl.trans(key), NARROW, PRECISE, BATCHED)
        out = load_turned(dy, first, count, h, H, V, values, C) * SCALE
        prefix, suffix, total = decays(log_decay, first, count, h, H, C)
        du = du * suffix[None, :] + product(out, load_pairs(reads, index, lower(C), C), False, PRECISE, BATCHED)
        du *= load_vector(beta, first, count, h, H, C)[None, :]
        dvalue = product(du, load_inverse(inverses, index, C), False, PRECISE, BATCHED)
        store_turned(dvalues, first, count, h, H, V, values, dvalue, C)
        out, dvalue = out * prefix[None, :], dvalue * prefix[None, :]
        entered = ()
        for b in tl.static_range(BLOCKS):
            # once more, for the sake of registers
            keys = b * BK + tl.arange(0, BK)
            key = load_tile(k, first, count, h, H, K, keys, C)
            query = load_tile(q, first, count, h, H, K, keys, C)
            kept = added(total * dstate[b], out, query, NARROW, PRECISE, BATCHED)
            entered += (added(kept, -dvalue, key, NARROW, PRECISE, BATCHED),)
        dstate = entered
    if dinitial is not None:
        store_blocks(dinitial, n * H + h, K, V, values, dstate, BK, BLOCKS)


@triton.jit(do_not_specialize=["T", "N"])
def delta_chunk_gradients(
    dy, q, k, beta, log_decay, entering, leaving, errors, dvalues, reads, overlaps, dq, dk, dv, dbeta, dlog_decay,
    cu_seqlens, T, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    chunk, h = tl.program_id(0) // H, tl.program_id(0) % H
    _, first, count = chunk_rows(cu_seqlens, chunk, T, N, C)
    if count > 0:
        keys = tl.arange(0, BK)
        index = chunk.to(tl.int64) * H + h
        # of what reads the entering state, and of what is written to the leaving one but for its strength
        dquery, dread, dwrite = (tl.zeros([BK, C], tl.float32),) * 3
        # of the products of rows, but for their decays and strengths
        dM, dA, dtotal = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32), tl.zeros([BK], tl.float32)
        for block in range(0, tl.cdiv(V, BV)):
            values = block * BV + tl.arange(0, BV)
            state = load_state(entering, index, K, V, keys, values)
            dstate = load_state(leaving, index, K, V, keys, values)
            dtotal += tl.sum(state * dstate, 0)
            error = load_turned(errors, first, count, h, H, V, values, C)
            out = load_turned(dy, first, count, h, H, V, values, C) * SCALE
            dvalue = load_turned(dvalues, first, count, h, H, V, values, C)
            if dv is not None:
                store_turned(dv, first, count, h, H, V, values, dvalue, C)
            dwrite += product(tl.trans(dstate), error, False, PRECISE)
            dquery += product(tl.trans(state), out, False, PRECISE)
            dread += product(tl.trans(state), -dvalue, False, PRECISE)
            dM += product(tl.trans(out), error, False, PRECISE)
            dA += product(tl.trans(-dvalue), error, False, PRECISE)
        key = load_turned(k, first, count, h, H, K, keys, C)
        query = load_turned(q, first, count, h, H, K, keys, C)
        strength = load_vector(beta, first, count, h, H, C)
        between = between_rows(log_decay, first, count, h, H, C)
        prefix, suffix, total = decays(log_decay, first, count, h, H, C)
        dquery, dread, dwrite = dquery * prefix[None, :], dread * prefix[None, :], dwrite * suffix[None, :]
        # these have their decays
        M = dM * load_pairs(reads, index, lower(C), C)
        A = dA * load_pairs(overlaps, index, below(C), C)
        if dbeta is not None:
            store_vector(dbeta, first, count, h, H, tl.sum(M + A, 0) + tl.sum(dwrite * key, 0), C)
        dwrite *= strength[None, :]
        if dlog_decay is not None:
            reading, writing = tl.sum(dquery * query + dread * key, 0), tl.sum(dwrite * key, 0)
            # a decay is in all that reaches from before its row to its row or past it
            past = tl.cumsum((M + A) * strength[None, :], 0, reverse=True)
            dlogs = tl.sum(tl.where(below(C), past + writing[None, :], reading[None, :]), 1)
            store_vector(dlog_decay, first, count, h, H, dlogs + total * tl.sum(dtotal, 0), C)
        dM, dA = dM * between * strength[None, :], tl.where(below(C), dA * between * strength[None, :], 0.0)
        dquery += product(key, tl.trans(dM), False, PRECISE)
        dread += dwrite + product(query, dM, False, PRECISE)
        dread += product(key, dA + tl.trans(dA), False, PRECISE)
        if dq is not None:
            store_turned(dq, first, count, h, H, K, keys, dquery, C)
        if dk is not None:
            store_turned(dk, first, count, h, H, K, keys, dread, C)
