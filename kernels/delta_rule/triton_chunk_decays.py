"""The Triton kernels of the delta rule in chunks where each key has a decay of its own.

The launches and names are those of triton_chunk_kernels.py. What a single decay for all keys does to rows of values,
outside of products, each key's does to rows of keys inside of them: the reads of a state have rows scaled by the decays
before them, its writes rows scaled by those after. The products of rows are made for the halves of blocks of rows,
level by level, so that both factors have scales of at most 1: docs/derivations/chunks.md. A scaled row has float32's
digits, whatever the input had, and a walk goes through tiles of fewer keys.
"""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.delta_rule.triton_chunk_tiles import (
    below,
    cells,
    gradients_of_values,
    load_blocks,
    load_inverse,
    load_pairs,
    load_turned,
    lower,
    product,
    rows_left,
    store_blocks,
    store_inverse,
    store_turned,
    summed,
    updated,
)
from kernels.triton_chunks import (
    LEAST,
    chunk_rows,
    decays_over,
    diagonal_of,
    halves_reach,
    load_logs,
    load_tile,
    load_vector,
    meets,
    on_diagonal,
    reach,
    store_vector,
)
from kernels.triton_matrix import place


@triton.jit(do_not_specialize=["T", "N"])
def delta_pairs_by_key(
    q, k, beta, log_decay, inverses, reads, overlaps, cu_seqlens, T, N, H, K,
    C: tl.constexpr, BK: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    chunk, h = tl.program_id(0) // H, tl.program_id(0) % H
    _, first, count = chunk_rows(cu_seqlens, chunk, T, N, C)
    # packed sequences leave chunks that are nobody's
    if count > 0:
        index = chunk.to(tl.int64) * H + h
        A, M, diagonal = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32), tl.zeros([C], tl.float32)
        for start in range(0, K, BK):
            keys = start + tl.arange(0, BK)
            key = load_tile(k, first, count, h, H, K, keys, C)
            logs = load_logs(log_decay, first, count, h, H, K, keys, C)
            if reads is not None:
                query = load_tile(q, first, count, h, H, K, keys, C)
                diagonal += tl.sum(query * key, 1)
            level = 0
            while 1 << level < C:
                decays = decays_over(halves_reach(level, False, C), logs, PRECISE)
                scaled, met = tl.trans(key * decays), meets(level, False, C)
                A += tl.where(met, tl.dot(key * decays, scaled, input_precision=PRECISE), 0.0)
                if reads is not None:
                    M += tl.where(met, tl.dot(query * decays, scaled, input_precision=PRECISE), 0.0)
                level += 1
        if reads is not None:
            tl.store(reads + index * C * C + cells(C), M + on_diagonal(diagonal, C), lower(C))
        if overlaps is not None:
            tl.store(overlaps + index * C * C + cells(C), A, below(C))
        store_inverse(inverses, index, A, load_vector(beta, first, count, h, H, C), C, PRECISE)


@triton.jit(do_not_specialize=["T"])
def delta_chunks_by_key(
    q, k, v, beta, log_decay, initial, inverses, reads, y, final, entering, errors, cu_seqlens, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BLOCKS: tl.constexpr, BV: tl.constexpr, PRECISE: tl.constexpr, BATCHED: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = k.dtype.element_ty.primitive_bitwidth == 16
    n, h, _, values, begin, length, slot = place(cu_seqlens, T, H, V, C, BV)
    state = load_blocks(initial, n * H + h, K, V, values, BK, BLOCKS)
    for c in range(0, tl.cdiv(length, C).to(tl.int32)):
        first, count, index = begin + c * C, rows_left(length, c, C), (slot + c) * H + h
        if entering is not None:
            store_blocks(entering, index, K, V, values, state, BK, BLOCKS)
        # the same for all chunks, but a product's copy of them would be in registers through the whole loop
        before = tl.where(count > 0, reach(True, False, C), 0.0)
        after = tl.where(count > 0, reach(False, False, C), 0.0)
        seen, out = tl.zeros([BV, C], tl.float32), tl.zeros([BV, C], tl.float32)
        for b in tl.static_range(BLOCKS):
            keys = b * BK + tl.arange(0, BK)
            prefix = decays_over(before, load_logs(log_decay, first, count, h, H, K, keys, C), PRECISE)
            key = load_tile(k, first, count, h, H, K, keys, C) * prefix
            # these sums have room in B200's tensor memory, whatever the others are
            seen = summed(seen, state[b], tl.trans(key), PRECISE, False)
            if y is not None:
                query = load_tile(q, first, count, h, H, K, keys, C) * prefix
                out = summed(out, state[b], tl.trans(query), PRECISE, BATCHED)
        error = load_turned(v, first, count, h, H, V, values, C) - seen
        error = product(error, tl.trans(load_inverse(inverses, index, C)), False, PRECISE, BATCHED)
        if errors is not None:
            store_turned(errors, first, count, h, H, V, values, error, C)
        u = error * load_vector(beta, first, count, h, H, C)[None, :]
        if y is not None:
            M = load_pairs(reads, index, lower(C), C)
            out += product(u, tl.trans(M), False, PRECISE, BATCHED)
            store_turned(y, first, count, h, H, V, values, out * SCALE, C)
        left = ()
        for b in tl.static_range(BLOCKS):
            # once more, for the sake of registers
            keys = b * BK + tl.arange(0, BK)
            logs = load_logs(log_decay, first, count, h, H, K, keys, C)
            key = load_tile(k, first, count, h, H, K, keys, C) * decays_over(after, logs, PRECISE)
            left += (updated(tl.exp(tl.sum(logs, 0))[None, :] * state[b], u, key, NARROW, PRECISE, BATCHED),)
        state = left
    if final is not None:
        store_blocks(final, n * H + h, K, V, values, state, BK, BLOCKS)


@triton.jit(do_not_specialize=["T"])
def delta_chunks_back_by_key(
    dy, dfinal, q, k, beta, log_decay, inverses, reads, leaving, dvalues, dinitial, cu_seqlens, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BLOCKS: tl.constexpr, BV: tl.constexpr, PRECISE: tl.constexpr, BATCHED: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = k.dtype.element_ty.primitive_bitwidth == 16
    n, h, _, values, begin, length, slot = place(cu_seqlens, T, H, V, C, BV)
    dstate = load_blocks(dfinal, n * H + h, K, V, values, BK, BLOCKS)
    chunks = tl.cdiv(length, C).to(tl.int32)
    for back in range(0, chunks):
        c = chunks - 1 - back
        first, count, index = begin + c * C, rows_left(length, c, C), (slot + c) * H + h
        store_blocks(leaving, index, K, V, values, dstate, BK, BLOCKS)
        before = tl.where(count > 0, reach(True, False, C), 0.0)
        after = tl.where(count > 0, reach(False, False, C), 0.0)
        du, kept = tl.zeros([BV, C], tl.float32), ()
        if BATCHED:
            out = load_turned(dy, first, count, h, H, V, values, C) * SCALE
        for b in tl.static_range(BLOCKS):
            keys = b * BK + tl.arange(0, BK)
            logs = load_logs(log_decay, first, count, h, H, K, keys, C)
            key = load_tile(k, first, count, h, H, K, keys, C) * decays_over(after, logs, PRECISE)
            du = summed(du, dstate[b], tl.trans(key), PRECISE, False)
            if BATCHED:
                # what queries add waits in B200's tensor memory, and no query beside the keys
                query = load_tile(q, first, count, h, H, K, keys, C) * decays_over(before, logs, PRECISE)
                kept += (updated(tl.exp(tl.sum(logs, 0))[None, :] * dstate[b], out, query, NARROW, PRECISE, False),)
        if not BATCHED:
            out = load_turned(dy, first, count, h, H, V, values, C) * SCALE
        du += product(out, load_pairs(reads, index, lower(C), C), False, PRECISE, BATCHED)
        du *= load_vector(beta, first, count, h, H, C)[None, :]
        dvalue = product(du, load_inverse(inverses, index, C), False, PRECISE, BATCHED)
        store_turned(dvalues, first, count, h, H, V, values, dvalue, C)
        entered = ()
        for b in tl.static_range(BLOCKS):
            # once more, for the sake of registers
            keys = b * BK + tl.arange(0, BK)
            logs = load_logs(log_decay, first, count, h, H, K, keys, C)
            prefix = decays_over(before, logs, PRECISE)
            if BATCHED:
                left = kept[b]
            else:
                query = load_tile(q, first, count, h, H, K, keys, C) * prefix
                left = updated(tl.exp(tl.sum(logs, 0))[None, :] * dstate[b], out, query, NARROW, PRECISE, False)
            key = load_tile(k, first, count, h, H, K, keys, C) * prefix
            entered += (updated(left, -dvalue, key, NARROW, PRECISE, BATCHED),)
        dstate = entered
    if dinitial is not None:
        store_blocks(dinitial, n * H + h, K, V, values, dstate, BK, BLOCKS)


@triton.jit
def decays_turned(matrix, logs, PRECISE: tl.constexpr):
    # For every row [keys, C] the decays of the rows that the matrix has for it; zeros and ones have few digits
    return tl.exp(product(logs, tl.trans(matrix), True, PRECISE))


@triton.jit(do_not_specialize=["T", "N"])
def delta_chunk_gradients_by_key(
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
        logs = load_turned(log_decay, first, count, h, H, K, keys, C)
        logs = tl.maximum(logs, LEAST, propagate_nan=tl.PropagateNan.ALL)
        strength = load_vector(beta, first, count, h, H, C)
        before, after = reach(True, False, C), reach(False, False, C)
        prefix = decays_turned(before, logs, PRECISE)
        dquery, dread, dwrite = dquery * prefix, dread * prefix, dwrite * decays_turned(after, logs, PRECISE)
        if dbeta is not None:
            # these have their decays
            pairs = dM * load_pairs(reads, index, lower(C), C) + dA * load_pairs(overlaps, index, below(C), C)
            store_vector(dbeta, first, count, h, H, tl.sum(pairs, 0) + tl.sum(dwrite * key, 0), C)
        dwrite *= strength[None, :]
        dM, dA = dM * strength[None, :], dA * strength[None, :]
        # a decay is in all that reaches from before its row to its row or past it
        dlogs = product(dquery * query + dread * key, before, True, PRECISE)
        dlogs += product(dwrite * key, after, True, PRECISE) + (tl.exp(tl.sum(logs, 1)) * dtotal)[:, None]
        dread += dwrite
        level = 0
        while 1 << level < C:
            rows, met = halves_reach(level, False, C), meets(level, False, C)
            decays = decays_turned(rows, logs, PRECISE)
            dreads, doverlaps = tl.where(met, dM, 0.0), tl.where(met, dA, 0.0)
            scaled = key * decays
            high = decays * product(scaled, tl.trans(dreads), False, PRECISE)
            both = product(scaled, doverlaps + tl.trans(doverlaps), False, PRECISE)
            both = decays * (both + product(query * decays, dreads, False, PRECISE))
            dquery += high
            dread += both
            dlogs += product(query * high + key * both, rows, True, PRECISE)
            level += 1
        diagonal = diagonal_of(dM, C)[None, :]
        dquery, dread = dquery + diagonal * key, dread + diagonal * query
        if dlog_decay is not None:
            store_turned(dlog_decay, first, count, h, H, K, keys, dlogs, C)
        if dq is not None:
            store_turned(dq, first, count, h, H, K, keys, dquery, C)
        if dk is not None:
            store_turned(dk, first, count, h, H, K, keys, dread, C)
