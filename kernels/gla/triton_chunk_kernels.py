"""The Triton kernels of gated linear attention in chunks: docs/derivations/chunks.md in tl.dot.

Three of them. A walk over the chunks leaves the state before each (and, against time, the gradient of the state after
each); outputs and gradients then need nothing from other chunks, and all chunks are worked on at once. DECAYS is 0
where nothing decays, 1 for decays that all keys share, 2 for a decay of each key. WHOLE is the precision of dots that
keep float32's digits, OUTPUT that of dots whose result is only rounded to the sequences' dtype.
"""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_chunks import (
    add_up,
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
    shared_decays,
    store_tile,
    store_vector,
    sums,
)
from kernels.triton_matrix import first_state, load_row, load_state, store_state
from kernels.triton_rows import sequence_of


@triton.jit
def walk(
    program, k, v, log_decay, initial, kept, final, cu_seqlens, T, H, K, V,
    SCALE: tl.constexpr, DECAYS: tl.constexpr, EXCLUSIVE: tl.constexpr, AGAINST: tl.constexpr, WHOLE: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # One sequence and head, BK keys and BV values of the state
    key_blocks, value_blocks = tl.cdiv(K, BK), tl.cdiv(V, BV)
    block = program % (key_blocks * value_blocks)
    head = program // (key_blocks * value_blocks)
    n, h = (head // H).to(tl.int64), head % H
    first_key = block // value_blocks * BK
    keys = first_key + tl.arange(0, BK)
    values = block % value_blocks * BV + tl.arange(0, BV)
    if cu_seqlens is None:
        first, length, chunk = n * T, n * 0 + T, n * tl.cdiv(T, C)
    else:
        first, length = sequence_of(cu_seqlens, n, T)
        chunk = first // C + n
    state = first_state(initial, n * H + h, K, V, keys, values, tl.float32)
    chunks = tl.cdiv(length, C)
    for i in tl.range(0, chunks, num_stages=STAGES):
        c = chunks - 1 - i if AGAINST else i
        start = first + c * C
        count = tl.minimum(length - c * C, C).to(tl.int32)
        if kept is not None:
            store_state(kept, (chunk + c) * H + h, K, V, keys, values, state)
        if DECAYS > 0:
            # a row's own decay is not after it, and before it unless it is EXCLUSIVE. The same for all chunks, but a
            # product's copy of it would be in registers through the whole loop
            rows = tl.where(i < chunks, reach(AGAINST, EXCLUSIVE, C), 0.0)
        if DECAYS == 2:
            logs = load_logs(log_decay, start, count, h, H, K, keys, C)
            decays = decays_over(rows, logs, WHOLE)
            state *= tl.exp(tl.sum(logs, 0))[:, None]
        elif DECAYS == 1:
            logs = load_shared_logs(log_decay, start, count, h, H, C)
            decays = tl.exp(sums(rows, logs))[:, None]
            state *= tl.exp(tl.sum(logs, 0))
        if v is not None:
            key = load_tile(k, start, count, h, H, K, keys, C)
            if DECAYS > 0:
                key *= decays
            value = load_tile(v, start, count, h, H, V, values, C) * SCALE
            state = tl.dot(tl.trans(key), value, state, input_precision=WHOLE)
    if final is not None:
        # Its rows are keys. Their places in 64 bits, as store_state has them, would be in registers through the whole
        # loop: in float32 on A100 one too many
        store_tile(final, (n * H + h) * K + first_key, K - first_key, 0, 1, V, values, state, BK)


@triton.jit(do_not_specialize=["T"])
def gla_states(
    q, k, v, dy, log_decay, initial, dfinal, kept, dkept, final, dinitial, cu_seqlens, T, H, K, V,
    SCALE: tl.constexpr, DECAYS: tl.constexpr, EXCLUSIVE: tl.constexpr, WHOLE: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # The states before all chunks, where there is `kept` or `final`, and their gradients after them, where there is
    # `dkept`: against time, with q and dy in place of k and v. Every other program does the one where both are wanted
    program = tl.program_id(0)
    if dkept is None:
        walk(
            program, k, v, log_decay, initial, kept, final, cu_seqlens, T, H, K, V,
            1.0, DECAYS, EXCLUSIVE, False, WHOLE, C, BK, BV, STAGES,
        )  # fmt: skip
    elif kept is None:
        walk(
            program, q, dy, log_decay, dfinal, dkept, dinitial, cu_seqlens, T, H, K, V,
            SCALE, DECAYS, EXCLUSIVE, True, WHOLE, C, BK, BV, STAGES,
        )  # fmt: skip
    elif program % 2 == 0:
        walk(
            program // 2, k, v, log_decay, initial, kept, final, cu_seqlens, T, H, K, V,
            1.0, DECAYS, EXCLUSIVE, False, WHOLE, C, BK, BV, STAGES,
        )  # fmt: skip
    else:
        walk(
            program // 2, q, dy, log_decay, dfinal, dkept, dinitial, cu_seqlens, T, H, K, V,
            SCALE, DECAYS, EXCLUSIVE, True, WHOLE, C, BK, BV, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "N"])
def gla_outputs(
    q, k, v, log_decay, bonus, kept, y, cu_seqlens, T, N, H, K, V,
    SCALE: tl.constexpr, DECAYS: tl.constexpr, AGAINST: tl.constexpr, WHOLE: tl.constexpr, OUTPUT: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    # One chunk and head, BV values. AGAINST time q is k, k is q, v is dy, kept are gradients, and y is dv
    EXCLUSIVE: tl.constexpr = bonus is not None
    value_blocks = tl.cdiv(V, BV)
    values = tl.program_id(0) % value_blocks * BV + tl.arange(0, BV)
    h, chunk = tl.program_id(0) // value_blocks % H, tl.program_id(0) // value_blocks // H
    _, first, count = chunk_rows(cu_seqlens, chunk, T, N, C)
    if count > 0:
        index = chunk.to(tl.int64) * H + h
        A, out = tl.zeros([C, C], tl.float32), tl.zeros([C, BV], tl.float32)
        diagonal = tl.zeros([C], tl.float32)
        for start in range(0, K, BK):
            keys = start + tl.arange(0, BK)
            query = load_tile(q, first, count, h, H, K, keys, C)
            key = load_tile(k, first, count, h, H, K, keys, C)
            state = load_state(kept, index, K, V, keys, values, tl.float32)
            if DECAYS == 2:
                logs = load_logs(log_decay, first, count, h, H, K, keys, C)
                rows = reach(False, False, C) if AGAINST else reach(True, EXCLUSIVE, C)
                # the same rows for all keys, but a product's copy of them would be in registers through the whole loop
                rows = tl.where(start < K, rows, 0.0)
                out = tl.dot(query * decays_over(rows, logs, WHOLE), state, out, input_precision=OUTPUT)
                level = 0
                while 1 << level < C:
                    decays = decays_over(halves_reach(level, EXCLUSIVE, C), logs, WHOLE)
                    pairs = tl.dot(query * decays, tl.trans(key * decays), input_precision=OUTPUT)
                    A += tl.where(meets(level, AGAINST, C), pairs, 0.0)
                    level += 1
            else:
                out = tl.dot(query, state, out, input_precision=OUTPUT)
                A = tl.dot(query, tl.trans(key), A, input_precision=OUTPUT)
            if bonus is not None:
                key *= load_row(bonus, h, K, keys, tl.float32)[None, :]
            diagonal += tl.sum(query * key, 1)
        if DECAYS == 1:
            logs = load_shared_logs(log_decay, first, count, h, H, C)
            out *= tl.exp(sums(reach(False, False, C) if AGAINST else reach(True, EXCLUSIVE, C), logs))[:, None]
            D = shared_decays(logs, EXCLUSIVE, C, WHOLE)
            A *= tl.trans(D) if AGAINST else D
        elif DECAYS == 0:
            A *= reach(not AGAINST, True, C)
        if DECAYS != 1 or EXCLUSIVE:
            A += on_diagonal(diagonal, C)
        if AGAINST:
            A *= SCALE
        if v is not None:
            value = load_tile(v, first, count, h, H, V, values, C)
            out = tl.dot(A, value, out, input_precision=OUTPUT)
        store_tile(y, first, count, h, H, V, values, out if AGAINST else out * SCALE, C)


@triton.jit(do_not_specialize=["T", "N"])
def gla_gradients(
    dy, q, k, v, log_decay, bonus, kept, dkept, dq, dk, dlog_decay, dbonus, cu_seqlens, T, N, ROWS, H, K, V,
    SCALE: tl.constexpr, DECAYS: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr,
    C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    # One chunk and head, BK keys. EXACT: the precision of dots of what sequences have in memory
    EXCLUSIVE: tl.constexpr = bonus is not None
    key_blocks = tl.cdiv(K, BK)
    block = tl.program_id(0) % key_blocks
    keys = block * BK + tl.arange(0, BK)
    h, chunk = tl.program_id(0) // key_blocks % H, tl.program_id(0) // key_blocks // H
    _, first, count = chunk_rows(cu_seqlens, chunk, T, N, C)
    index = chunk.to(tl.int64) * H + h
    if count > 0:
        if DECAYS == 1:
            # first of all: beside dq and dk registers have no room for it
            query = load_tile(q, first, count, h, H, K, keys, C)
            key = load_tile(k, first, count, h, H, K, keys, C)
            products = tl.dot(query, tl.trans(key), input_precision=EXACT)
        dA = tl.zeros([C, C], tl.float32)
        dquery, dkey = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        both = tl.zeros([BK], tl.float32)
        for start in range(0, V, BV):
            values = start + tl.arange(0, BV)
            state = load_state(kept, index, K, V, keys, values, tl.float32)
            dstate = load_state(dkept, index, K, V, keys, values, tl.float32)
            both += tl.sum(state * dstate, 1)
            value = load_tile(v, first, count, h, H, V, values, C)
            dkey = tl.dot(value, tl.trans(dstate), dkey, input_precision=WHOLE)
            if dy is not None:
                out = load_tile(dy, first, count, h, H, V, values, C)
                dA = tl.dot(out, tl.trans(value), dA, input_precision=EXACT)
                dquery = tl.dot(out, tl.trans(state), dquery, input_precision=WHOLE)
        dA *= SCALE
        dquery *= SCALE
        if DECAYS != 1:
            query = load_tile(q, first, count, h, H, K, keys, C)
            key = load_tile(k, first, count, h, H, K, keys, C)
        if DECAYS == 2:
            logs = load_logs(log_decay, first, count, h, H, K, keys, C)
            before, after = reach(True, EXCLUSIVE, C), reach(False, False, C)
            dquery *= decays_over(before, logs, WHOLE)
            dkey *= decays_over(after, logs, WHOLE)
            dlogs = tl.zeros([C, BK], tl.float32) + (tl.exp(tl.sum(logs, 0)) * both)[None, :]
            dlogs = add_up(tl.trans(before), query * dquery, dlogs, WHOLE)
            dlogs = add_up(tl.trans(after), key * dkey, dlogs, WHOLE)
            level = 0
            while 1 << level < C:
                rows = halves_reach(level, EXCLUSIVE, C)
                decays, dpairs = decays_over(rows, logs, WHOLE), tl.where(meets(level, False, C), dA, 0.0)
                # of the factors of the upper and of the lower rows; either is 0 in the other rows
                dhigh = decays * tl.dot(dpairs, key * decays, input_precision=WHOLE)
                dlow = decays * tl.dot(tl.trans(dpairs), query * decays, input_precision=WHOLE)
                dquery += dhigh
                dkey += dlow
                dlogs = add_up(tl.trans(rows), query * dhigh + key * dlow, dlogs, WHOLE)
                level += 1
            if dlog_decay is not None:
                store_tile(dlog_decay, first, count, h, H, K, keys, dlogs, C)
        elif DECAYS == 1:
            logs = load_shared_logs(log_decay, first, count, h, H, C)
            before, after = reach(True, EXCLUSIVE, C), reach(False, False, C)
            dquery *= tl.exp(sums(before, logs))[:, None]
            dkey *= tl.exp(sums(after, logs))[:, None]
            dpairs = dA * shared_decays(logs, EXCLUSIVE, C, WHOLE)
            if dlog_decay is not None:
                dlogs = tl.exp(tl.sum(logs, 0)) * tl.sum(both, 0)
                dlogs += sums(tl.trans(before), tl.sum(query * dquery, 1))
                dlogs += sums(tl.trans(after), tl.sum(key * dkey, 1))
                # pairs over i from t on, then over j before t
                pairs = add_up(tl.trans(before), dpairs * products, tl.zeros([C, C], tl.float32), WHOLE)
                dlogs += tl.sum(tl.where(tl.trans(after) > 0, pairs, 0.0), 1)
                store_vector(dlog_decay + block.to(tl.int64) * ROWS * H, first, count, h, H, dlogs, C)
        else:
            dpairs = dA * reach(True, True, C)
        if DECAYS < 2:
            dquery = tl.dot(dpairs, key, dquery, input_precision=WHOLE)
            dkey = tl.dot(tl.trans(dpairs), query, dkey, input_precision=WHOLE)
        if DECAYS != 1 or EXCLUSIVE:
            diagonal = diagonal_of(dA, C)[:, None]
            if bonus is not None:
                if dbonus is not None:
                    tl.store(dbonus + index * K + keys, tl.sum(diagonal * query * key, 0), keys < K)
                diagonal = diagonal * load_row(bonus, h, K, keys, tl.float32)[None, :]
            dquery += diagonal * key
            dkey += diagonal * query
        if dq is not None:
            store_tile(dq, first, count, h, H, K, keys, dquery, C)
        if dk is not None:
            store_tile(dk, first, count, h, H, K, keys, dkey, C)
    elif dbonus is not None:
        tl.store(dbonus + index * K + keys, tl.zeros([BK], tl.float32), keys < K)
