"""The Triton kernels of diagonal plus rank one in chunks of C rows; docs/derivations/delta_rule.md has the equations.

The launches are those of the delta rule (kernels/delta_rule/triton_chunk_kernels.py), tiles and products too. First
what rows have to do with rows, for all chunks at once: (I - A)⁻¹ of reads a and writes b, and the products of a and k,
q and k, q and b. Then two walks over the chunks of a sequence, with the state or its gradient in registers: forward,
which makes the outputs, or leaves the state that enters each chunk in `entering` and u = aᵀ S in `reads`; and against
time, which leaves the gradient of the state that leaves each chunk in `leaving`, that of u in `dreads`, and dv. A
chunk's other gradients are its own business: they are made for all chunks at once.

Every key may have a decay of its own, so the decays scale rows of keys, inside of the products. A row of a reads the
state before its own decay. So does one of q that has the row's decay in it, but for what its own row writes: both then
see earlier rows through the same decays. Scales are exponentials of sums of logarithms and at most 1, level by level in
the halves of a chunk: docs/derivations/chunks.md.
"""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.delta_rule.triton_chunk_decays import decays_turned
from kernels.delta_rule.triton_chunk_tiles import (
    below,
    cells,
    load_blocks,
    load_inverse,
    load_pairs,
    load_state,
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
    chunk_rows,
    decays_over,
    diagonal_of,
    halves_reach,
    load_logs,
    load_shared_logs,
    load_tile,
    meets,
    on_diagonal,
    reach,
    store_vector,
)
from kernels.triton_matrix import place


@triton.jit
def load_decays(log_decay, first, count, h, H, K, keys, C: tl.constexpr, PER_KEY: tl.constexpr):
    # Log decays [C, keys], finite
    if log_decay is None:
        return tl.zeros([C, keys.shape[0]], tl.float32)
    elif PER_KEY:
        return load_logs(log_decay, first, count, h, H, K, keys, C)
    else:
        shared = load_shared_logs(log_decay, first, count, h, H, C)
        return tl.broadcast_to(shared[:, None], [C, keys.shape[0]])


@triton.jit(do_not_specialize=["T", "N"])
def dplr_pairs(
    q, k, a, b, log_decay, inverses, ak, qk, qb, cu_seqlens, T, N, H, K,
    C: tl.constexpr, BK: tl.constexpr, PER_KEY: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    chunk, h = tl.program_id(0) // H, tl.program_id(0) % H
    _, first, count = chunk_rows(cu_seqlens, chunk, T, N, C)
    # packed sequences leave chunks that are nobody's
    if count > 0:
        index = chunk.to(tl.int64) * H + h
        AB, AK, QK, QB = (tl.zeros([C, C], tl.float32),) * 4
        for start in range(0, K, BK):
            keys = start + tl.arange(0, BK)
            query = load_tile(q, first, count, h, H, K, keys, C)
            key = load_tile(k, first, count, h, H, K, keys, C)
            read = load_tile(a, first, count, h, H, K, keys, C)
            write = load_tile(b, first, count, h, H, K, keys, C)
            logs = load_decays(log_decay, first, count, h, H, K, keys, C, PER_KEY)
            # of its own row a query sees what is written, and a read nothing
            QK += on_diagonal(tl.sum(query * key, 1), C)
            QB += on_diagonal(tl.sum(query * write, 1), C)
            query *= tl.exp(logs)
            level = 0
            while 1 << level < C:
                decays, met = decays_over(halves_reach(level, True, C), logs, PRECISE), meets(level, False, C)
                scaled = tl.trans(key * decays)
                AK += tl.where(met, tl.dot(read * decays, scaled, input_precision=PRECISE), 0.0)
                QK += tl.where(met, tl.dot(query * decays, scaled, input_precision=PRECISE), 0.0)
                scaled = tl.trans(write * decays)
                AB += tl.where(met, tl.dot(read * decays, scaled, input_precision=PRECISE), 0.0)
                QB += tl.where(met, tl.dot(query * decays, scaled, input_precision=PRECISE), 0.0)
                level += 1
        tl.store(ak + index * C * C + cells(C), AK, below(C))
        tl.store(qk + index * C * C + cells(C), QK, lower(C))
        tl.store(qb + index * C * C + cells(C), QB, lower(C))
        store_inverse(inverses, index, AB, tl.full([C], -1.0, tl.float32), C, PRECISE)


@triton.jit(do_not_specialize=["T"])
def dplr_chunks(
    q, k, v, a, b, log_decay, initial, inverses, ak, qk, qb, y, final, entering, reads, cu_seqlens, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BLOCKS: tl.constexpr, BV: tl.constexpr, PER_KEY: tl.constexpr, PRECISE: tl.constexpr, BATCHED: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = q.dtype.element_ty.primitive_bitwidth == 16
    n, h, _, values, begin, length, slot = place(cu_seqlens, T, H, V, C, BV)
    state = load_blocks(initial, n * H + h, K, V, values, BK, BLOCKS)
    # added up, as are rows: of a multiple of c the compiler makes an address for every tensor, held through the loop
    first, index = begin, slot * H + h
    for c in range(0, tl.cdiv(length, C).to(tl.int32)):
        count = rows_left(length, c, C)
        if entering is not None:
            store_blocks(entering, index, K, V, values, state, BK, BLOCKS)
        # the same for all chunks, but a product's copy of them would be in registers through the whole loop
        before = tl.where(count > 0, reach(True, True, C), 0.0)
        after = tl.trans(before)
        u, out = tl.zeros([BV, C], tl.float32), tl.zeros([BV, C], tl.float32)
        for block in tl.static_range(BLOCKS):
            keys = block * BK + tl.arange(0, BK)
            logs = load_decays(log_decay, first, count, h, H, K, keys, C, PER_KEY)
            prefix = decays_over(before, logs, PRECISE)
            read = load_tile(a, first, count, h, H, K, keys, C) * prefix
            u = summed(u, state[block], tl.trans(read), PRECISE, BATCHED)
            if y is not None:
                query = load_tile(q, first, count, h, H, K, keys, C) * tl.exp(logs) * prefix
                out = summed(out, state[block], tl.trans(query), PRECISE, BATCHED)
        value = load_turned(v, first, count, h, H, V, values, C)
        u = summed(u, value, tl.trans(load_pairs(ak, index, below(C), C)), PRECISE, BATCHED)
        u = product(u, tl.trans(load_inverse(inverses, index, C)), False, PRECISE, BATCHED)
        if reads is not None:
            store_turned(reads, first, count, h, H, V, values, u, C)
        if y is not None:
            out = summed(out, u, tl.trans(load_pairs(qb, index, lower(C), C)), PRECISE, BATCHED)
            out = summed(out, value, tl.trans(load_pairs(qk, index, lower(C), C)), PRECISE, BATCHED)
            store_turned(y, first, count, h, H, V, values, out * SCALE, C)
        left = ()
        for block in tl.static_range(BLOCKS):
            # decays once more, for the sake of registers
            keys = block * BK + tl.arange(0, BK)
            logs = load_decays(log_decay, first, count, h, H, K, keys, C, PER_KEY)
            decays = decays_over(after, logs, PRECISE)
            kept = tl.exp(tl.sum(logs, 0))[None, :] * state[block]
            write = load_tile(b, first, count, h, H, K, keys, C) * decays
            kept = updated(kept, u, write, NARROW, PRECISE, BATCHED)
            key = load_tile(k, first, count, h, H, K, keys, C) * decays
            left += (updated(kept, value, key, NARROW, PRECISE, BATCHED),)
        state = left
        first, index = first + count, index + tl.where(count > 0, H, 0)
    if final is not None:
        store_blocks(final, n * H + h, K, V, values, state, BK, BLOCKS)


@triton.jit(do_not_specialize=["T"])
def dplr_chunks_back(
    dy, dfinal, q, k, a, b, log_decay, inverses, ak, qk, qb, leaving, dreads, dv, dinitial, cu_seqlens, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BLOCKS: tl.constexpr, BV: tl.constexpr, PER_KEY: tl.constexpr, PRECISE: tl.constexpr, BATCHED: tl.constexpr,
):  # fmt: skip
    NARROW: tl.constexpr = q.dtype.element_ty.primitive_bitwidth == 16
    n, h, _, values, begin, length, slot = place(cu_seqlens, T, H, V, C, BV)
    dstate = load_blocks(dfinal, n * H + h, K, V, values, BK, BLOCKS)
    chunks = tl.cdiv(length, C).to(tl.int32)
    first, index = begin + length, (slot + chunks) * H + h
    for back in range(0, chunks):
        count = rows_left(length, chunks - 1 - back, C)
        first, index = first - count, index - tl.where(count > 0, H, 0)
        store_blocks(leaving, index, K, V, values, dstate, BK, BLOCKS)
        before = tl.where(count > 0, reach(True, True, C), 0.0)
        after = tl.trans(before)
        du, dvalue = tl.zeros([BV, C], tl.float32), tl.zeros([BV, C], tl.float32)
        for block in tl.static_range(BLOCKS):
            keys = block * BK + tl.arange(0, BK)
            logs = load_decays(log_decay, first, count, h, H, K, keys, C, PER_KEY)
            decays = decays_over(after, logs, PRECISE)
            write = load_tile(b, first, count, h, H, K, keys, C) * decays
            du = summed(du, dstate[block], tl.trans(write), PRECISE, BATCHED)
            if dv is not None:
                key = load_tile(k, first, count, h, H, K, keys, C) * decays
                dvalue = summed(dvalue, dstate[block], tl.trans(key), PRECISE, BATCHED)
        out = load_turned(dy, first, count, h, H, V, values, C) * SCALE
        du = summed(du, out, load_pairs(qb, index, lower(C), C), PRECISE, BATCHED)
        # of what u was before the inverse
        du = product(du, load_inverse(inverses, index, C), False, PRECISE, BATCHED)
        store_turned(dreads, first, count, h, H, V, values, du, C)
        if dv is not None:
            dvalue = summed(dvalue, out, load_pairs(qk, index, lower(C), C), PRECISE, BATCHED)
            dvalue = summed(dvalue, du, load_pairs(ak, index, below(C), C), PRECISE, BATCHED)
            store_turned(dv, first, count, h, H, V, values, dvalue, C)
        entered = ()
        for block in tl.static_range(BLOCKS):
            # decays once more, for the sake of registers
            keys = block * BK + tl.arange(0, BK)
            logs = load_decays(log_decay, first, count, h, H, K, keys, C, PER_KEY)
            kept = tl.exp(tl.sum(logs, 0))[None, :] * dstate[block]
            prefix = decays_over(before, logs, PRECISE)
            query = load_tile(q, first, count, h, H, K, keys, C) * tl.exp(logs) * prefix
            kept = updated(kept, out, query, NARROW, PRECISE, BATCHED)
            read = load_tile(a, first, count, h, H, K, keys, C) * prefix
            entered += (updated(kept, du, read, NARROW, PRECISE, BATCHED),)
        dstate = entered
    if dinitial is not None:
        store_blocks(dinitial, n * H + h, K, V, values, dstate, BK, BLOCKS)


@triton.jit
def sums_over_values(
    dy, v, entering, leaving, reads, dreads, index, first, count, h, H, K, V, keys,
    SCALE: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    # All of a chunk, BV values at a time: the gradients [keys, C] of q, k, a and b beside a state, those [C, C] of
    # the products of rows, all but for their decays, and the product of the two states [keys]
    dquery, dkey, dread, dwrite = (tl.zeros([keys.shape[0], C], tl.float32),) * 4
    dAB, dAK, dQK, dQB = (tl.zeros([C, C], tl.float32),) * 4
    dtotal = tl.zeros([keys.shape[0]], tl.float32)
    for block in range(0, tl.cdiv(V, BV)):
        values = block * BV + tl.arange(0, BV)
        state = load_state(entering, index, K, V, keys, values)
        dstate = load_state(leaving, index, K, V, keys, values)
        dtotal += tl.sum(state * dstate, 0)
        value = load_turned(v, first, count, h, H, V, values, C)
        u = load_turned(reads, first, count, h, H, V, values, C)
        out = load_turned(dy, first, count, h, H, V, values, C) * SCALE
        du = load_turned(dreads, first, count, h, H, V, values, C)
        dkey = summed(dkey, tl.trans(dstate), value, PRECISE, False)
        dwrite = summed(dwrite, tl.trans(dstate), u, PRECISE, False)
        dquery = summed(dquery, tl.trans(state), out, PRECISE, False)
        dread = summed(dread, tl.trans(state), du, PRECISE, False)
        dQK = summed(dQK, tl.trans(out), value, PRECISE, False)
        dQB = summed(dQB, tl.trans(out), u, PRECISE, False)
        dAK = summed(dAK, tl.trans(du), value, PRECISE, False)
        dAB = summed(dAB, tl.trans(du), u, PRECISE, False)
    return dquery, dkey, dread, dwrite, dAB, dAK, dQK, dQB, dtotal


@triton.jit
def symmetric(dpairs, C: tl.constexpr):
    # What is below the diagonal, on both sides of it
    found = tl.where(below(C), dpairs, 0.0)
    return found + tl.trans(found)


@triton.jit
def at_borders(reader, writer, dreader, dwriter, dlevel, dpairs, decays, level, C: tl.constexpr, PRECISE: tl.constexpr):
    # What pairs that meet at a border of this level add, dpairs being symmetric: above the border a row is the one that
    # reads, below it the one that writes, and one product has the gradients of both
    rows, columns = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    met = ((rows ^ columns) >> level) == 1
    upper = (columns >> level) & 1 == 1
    scaled = tl.where(upper, reader, writer) * decays
    found = product(scaled, tl.where(met, dpairs, 0.0), False, PRECISE)
    dlevel += scaled * found
    found *= decays
    return dreader + tl.where(upper, found, 0.0), dwriter + tl.where(upper, 0.0, found), dlevel


@triton.jit
def between_rows(
    reader, write, key, dreader, dwrite, dkey, dlogs, dwrites, dkeys, logs, C: tl.constexpr, PRECISE: tl.constexpr
):
    dwrites, dkeys = symmetric(dwrites, C), symmetric(dkeys, C)
    level = 0
    while 1 << level < C:
        rows = halves_reach(level, True, C)
        decays, dlevel = decays_turned(rows, logs, PRECISE), tl.zeros_like(dlogs)
        dreader, dwrite, dlevel = at_borders(reader, write, dreader, dwrite, dlevel, dwrites, decays, level, C, PRECISE)
        dreader, dkey, dlevel = at_borders(reader, key, dreader, dkey, dlevel, dkeys, decays, level, C, PRECISE)
        dlogs += product(dlevel, rows, True, PRECISE)
        level += 1
    return dreader, dwrite, dkey, dlogs


@triton.jit(do_not_specialize=["T", "N"])
def dplr_chunk_gradients(
    dy, q, k, v, a, b, log_decay, entering, leaving, reads, dreads, dq, dk, da, db, dlog_decay, cu_seqlens, T, N,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SCALE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PER_KEY: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    chunk, h = tl.program_id(0) // H, tl.program_id(0) % H
    _, first, count = chunk_rows(cu_seqlens, chunk, T, N, C)
    if count > 0:
        keys = tl.arange(0, BK)
        index = chunk.to(tl.int64) * H + h
        dquery, dkey, dread, dwrite, dAB, dAK, dQK, dQB, dtotal = sums_over_values(
            dy, v, entering, leaving, reads, dreads, index, first, count, h, H, K, V, keys, SCALE, C, BV, PRECISE
        )
        query = load_turned(q, first, count, h, H, K, keys, C)
        key = load_turned(k, first, count, h, H, K, keys, C)
        read = load_turned(a, first, count, h, H, K, keys, C)
        write = load_turned(b, first, count, h, H, K, keys, C)
        logs = tl.trans(load_decays(log_decay, first, count, h, H, K, keys, C, PER_KEY))
        before, after, own = reach(True, True, C), reach(False, False, C), tl.exp(logs)
        prefix, suffix = decays_turned(before, logs, PRECISE), decays_turned(after, logs, PRECISE)
        dquery, dread, dkey, dwrite = dquery * prefix, dread * prefix, dkey * suffix, dwrite * suffix
        # a decay is in all that reaches from before its row to its row or past it
        dlogs = product(dkey * key + dwrite * write, after, True, PRECISE)
        dlogs += (tl.exp(tl.sum(logs, 1)) * dtotal)[:, None]
        of_key, of_write = diagonal_of(dQK, C)[None, :], diagonal_of(dQB, C)[None, :]
        dkey, dwrite = dkey + of_key * query, dwrite + of_write * query
        # from here on with its own decay
        query *= own
        dlogs += product(dquery * query + dread * read, before, True, PRECISE)
        dread, dwrite, dkey, dlogs = between_rows(
            read, write, key, dread, dwrite, dkey, dlogs, dAB, dAK, logs, C, PRECISE
        )
        dquery, dwrite, dkey, dlogs = between_rows(
            query, write, key, dquery, dwrite, dkey, dlogs, dQB, dQK, logs, C, PRECISE
        )
        dlogs += dquery * query
        dquery = dquery * own + of_key * key + of_write * write
        if dq is not None:
            store_turned(dq, first, count, h, H, K, keys, dquery, C)
        if dk is not None:
            store_turned(dk, first, count, h, H, K, keys, dkey, C)
        if da is not None:
            store_turned(da, first, count, h, H, K, keys, dread, C)
        if db is not None:
            store_turned(db, first, count, h, H, K, keys, dwrite, C)
        if dlog_decay is not None:
            if PER_KEY:
                store_turned(dlog_decay, first, count, h, H, K, keys, dlogs, C)
            else:
                store_vector(dlog_decay, first, count, h, H, tl.sum(dlogs, 0), C)
