"""The Triton kernels of the delta rule in chunks of C rows; docs/derivations/delta_rule.md has the equations.

First (I + A diag(β))⁻¹, for all chunks at once: what is below its diagonal, and beside it the products of rows that the
others want, M as `reads` and A as `overlaps`. Then two walks over the chunks of a sequence, with the state or its
gradient in registers, BLOCKS tiles of BK keys: forward, which makes the outputs, or leaves the state that enters each
chunk in `entering` and u before its strength in `errors`; and against time, which leaves the gradient of the state that
leaves each chunk in `leaving`, and that of the values. Between these two states a chunk's other gradients are its own
business: they are made for all chunks at once, by a program each that has all values, so that no sum is in parts.

Sizes are known to the compiler where a program has many places to hold.
"""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.delta_rule.triton_chunk_tiles import (
    added,
    below,
    cells,
    gradients_of_values,
    load_blocks,
    load_inverse,
    load_keys,
    load_pairs,
    load_turned,
    lower,
    over_groups,
    product,
    rows_left,
    store_block,
    store_blocks,
    store_inverse,
    store_turned,
    to_groups,
    turned,
)
from kernels.triton_chunks import chunk_rows, load_tile, load_vector, store_vector
from kernels.triton_matrix import place


@triton.jit
def product_of_inputs(a, b, NARROW: tl.constexpr, PRECISE: tl.constexpr):
    return tl.dot(a, b, input_precision="tf32" if NARROW and PRECISE == "tf32x3" else PRECISE)


@triton.jit
def between_rows(log_decay, first, count, h, H, C: tl.constexpr):
    # The decays from row j to row i on and below the diagonal [i, j], else 0
    if log_decay is None:
        return tl.where(lower(C), 1.0, 0.0)
    else:
        # logarithms are only ever added, and at most 0: see "Decays" in the derivation
        g = load_vector(log_decay, first, count, h, H, C)
        return tl.where(lower(C), tl.exp(tl.cumsum(tl.where(below(C), g[:, None], 0.0), 0)), 0.0)


@triton.jit
def decays(log_decay, first, count, h, H, C: tl.constexpr):
    # Of what enters by row [C], of what a row writes by the chunk's end [C], and over the chunk
    if log_decay is None:
        # one that the compiler does not know: sums on a state that is not multiplied it leaves to the end, all at once
        total = tl.where(count > 0, 1.0, 0.0)
        return tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32), total
    else:
        g = load_vector(log_decay, first, count, h, H, C)
        suffix = tl.exp(tl.sum(tl.where(below(C), g[:, None], 0.0), 0))
        return tl.exp(tl.cumsum(g, 0)), suffix, tl.exp(tl.sum(g, 0))


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
    AHEAD: tl.constexpr,
):  # fmt: skip
    # what no group has to itself has half of the rows
    INNER: tl.constexpr = BATCHED and not AHEAD
    n, h, _, values, begin, length, slot = place(cu_seqlens, T, H, V, C, BV)
    state = load_blocks(initial, n * H + h, K, V, values, BK, BLOCKS, AHEAD)
    # a number of 64 bits is two registers
    chunks = tl.cdiv(length, C).to(tl.int32)
    for c in range(0, chunks):
        first, count, index = begin + c * C, rows_left(length, c, C), (slot + c) * H + h
        seen, out = (tl.zeros([2 * BV if AHEAD else BV, C], tl.float32),) * 2
        M = tl.zeros([C, C], tl.float32)
        for b in tl.static_range(BLOCKS):
            key = load_keys(k, first, count, h, H, K, b, BK, C, AHEAD)
            # these sums have room in B200's tensor memory, whatever the others are
            seen = added(seen, state[b], turned(key), NARROW, PRECISE, AHEAD > 0)
            if y is not None:
                # beside the other read, for the sake of registers
                query = load_keys(q, first, count, h, H, K, b, BK, C, AHEAD)
                out = added(out, state[b], turned(query), NARROW, PRECISE, BATCHED)
                if reads is None:
                    M += product_of_inputs(query, turned(key), NARROW, PRECISE)
        seen, out = over_groups(seen, AHEAD), over_groups(out, AHEAD)
        prefix, suffix, total = decays(log_decay, first, count, h, H, C)
        error = load_turned(v, first, count, h, H, V, values, C) - seen * prefix[None, :]
        error = product(error, tl.trans(load_inverse(inverses, index, C)), False, PRECISE, INNER)
        if errors is not None:
            store_turned(errors, first, count, h, H, V, values, error, C)
        u = error * load_vector(beta, first, count, h, H, C)[None, :]
        if y is not None:
            if reads is None:
                M *= between_rows(log_decay, first, count, h, H, C)
            else:
                M = load_pairs(reads, index, lower(C), C)
            out = out * prefix[None, :] + product(u, tl.trans(M), False, PRECISE, INNER)
            store_turned(y, first, count, h, H, V, values, out * SCALE, C)
        u = to_groups(u * suffix[None, :], AHEAD)
        left = ()
        for b in tl.static_range(BLOCKS):
            if entering is not None:
                store_block(entering, index, K, V, values, b, state[b], BK, AHEAD)
            if BLOCKS > 1:
                # once more, for the sake of registers
                key = load_keys(k, first, count, h, H, K, b, BK, C, AHEAD)
            left += (added(total * state[b], u, key, NARROW, PRECISE, BATCHED),)
        state = left
    if final is not None:
        store_blocks(final, n * H + h, K, V, values, state, BK, BLOCKS, AHEAD)


@triton.jit(do_not_specialize=["T"])
def delta_chunks_back(
    dy, dfinal, q, k, beta, log_decay, inverses, reads, leaving, dvalues, dinitial, cu_seqlens, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BLOCKS: tl.constexpr, BV: tl.constexpr, NARROW: tl.constexpr, PRECISE: tl.constexpr, BATCHED: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    # what no group has to itself has half of the rows
    INNER: tl.constexpr = BATCHED and not AHEAD
    n, h, _, values, begin, length, slot = place(cu_seqlens, T, H, V, C, BV)
    dstate = load_blocks(dfinal, n * H + h, K, V, values, BK, BLOCKS, AHEAD)
    chunks = tl.cdiv(length, C).to(tl.int32)
    for back in range(0, chunks):
        c = chunks - 1 - back
        first, count, index = begin + c * C, rows_left(length, c, C), (slot + c) * H + h
        prefix, suffix, total = decays(log_decay, first, count, h, H, C)
        du, kept = tl.zeros([2 * BV if AHEAD else BV, C], tl.float32), ()
        if BATCHED:
            out = load_turned(dy, first, count, h, H, V, values, C) * SCALE
            written = product(out, load_pairs(reads, index, lower(C), C), False, PRECISE, INNER)
            out = to_groups(out * prefix[None, :], AHEAD)
        for b in tl.static_range(BLOCKS):
            key = load_keys(k, first, count, h, H, K, b, BK, C, AHEAD)
            du = added(du, dstate[b], turned(key), NARROW, PRECISE, AHEAD > 0)
            if BATCHED:
                # no query waits beside the keys
                store_block(leaving, index, K, V, values, b, dstate[b], BK, AHEAD)
                query = load_keys(q, first, count, h, H, K, b, BK, C, AHEAD)
                kept += (added(total * dstate[b], out, query, NARROW, PRECISE, BATCHED),)
        if not BATCHED:
            out = load_turned(dy, first, count, h, H, V, values, C) * SCALE
            written = product(out, load_pairs(reads, index, lower(C), C), False, PRECISE, INNER)
            out = to_groups(out * prefix[None, :], AHEAD)
        du = (over_groups(du, AHEAD) * suffix[None, :] + written) * load_vector(beta, first, count, h, H, C)[None, :]
        dvalue = product(du, load_inverse(inverses, index, C), False, PRECISE, INNER)
        store_turned(dvalues, first, count, h, H, V, values, dvalue, C)
        if not BATCHED:
            for b in tl.static_range(BLOCKS):
                store_block(leaving, index, K, V, values, b, dstate[b], BK, AHEAD)
                query = load_keys(q, first, count, h, H, K, b, BK, C, AHEAD)
                kept += (added(total * dstate[b], out, query, NARROW, PRECISE, BATCHED),)
        dvalue = to_groups(-prefix[None, :] * dvalue, AHEAD)
        entered = ()
        for b in tl.static_range(BLOCKS):
            # once more, for the sake of registers
            key = load_keys(k, first, count, h, H, K, b, BK, C, AHEAD)
            entered += (added(kept[b], dvalue, key, NARROW, PRECISE, BATCHED),)
        dstate = entered
    if dinitial is not None:
        store_blocks(dinitial, n * H + h, K, V, values, dstate, BK, BLOCKS, AHEAD)


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
        dquery, dread, dwrite, dM, dA, dtotal = gradients_of_values(
            dy, entering, leaving, errors, dvalues, dv, index, first, count, h, H, K, V, keys, SCALE, C, BV, PRECISE
        )
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
