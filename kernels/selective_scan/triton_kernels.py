"""The Triton kernels of the selective scan: its loop over time, with the states of a block of channels in registers.

As in kernels/triton_matrix.py, with channels [BD] and their states [BD, BK] in the place of keys and values: a program
has one sequence and one block of channels. Sums over all channels (dB, dC) are left as one part for each block of them,
sums over sequences (dA, dD) as one for each sequence.
"""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_matrix import first_state, load_row, load_state, place, store_row, store_state


@triton.jit
def after(state, exponents, x, delta, B, row, D, K, channels, keys, STATE: tl.constexpr):
    # exp(Δ A) h + Δ x B
    step, number = load_row(delta, row, D, channels, STATE), load_row(x, row, D, channels, STATE)
    added = (step * number)[:, None] * load_row(B, row, K, keys, STATE)[None, :]
    return tl.exp(step[:, None] * exponents) * state + added


@triton.jit(do_not_specialize=["T"])
def selective_scan_forward(
    x, delta, A, B, C, D_, initial, y, final, kept, cu_seqlens, T, D, K,
    STATE: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n, _, _, channels, first, length, chunk = place(cu_seqlens, T, 1, D, R, BD)
    keys = tl.arange(0, BK)
    exponents = load_state(A, 0, D, K, channels, keys, STATE)
    state = first_state(initial, n, D, K, channels, keys, STATE)
    for t in range(0, length):
        if kept is not None and t % R == 0:
            store_state(kept, chunk + t // R, D, K, channels, keys, state)
        row = first + t
        state = after(state, exponents, x, delta, B, row, D, K, channels, keys, STATE)
        if y is not None:
            out = tl.sum(state * load_row(C, row, K, keys, STATE)[None, :], 1)
            if D_ is not None:
                out += load_row(D_, 0, D, channels, STATE) * load_row(x, row, D, channels, STATE)
            store_row(y, row, D, channels, out)
    if final is not None:
        store_state(final, n, D, K, channels, keys, state)


@triton.jit(do_not_specialize=["T", "ROWS"])
def selective_scan_backward(
    dy, dfinal, x, delta, A, B, C, D_, kept, scratch, dx, ddelta, dA, dB, dC, dD_, dinitial, cu_seqlens, T, ROWS, D, K,
    STATE: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n, _, block, channels, first, length, chunk = place(cu_seqlens, T, 1, D, R, BD)
    keys = tl.arange(0, BK)
    # where this block of channels puts its part of sums over all channels
    part = block.to(tl.int64) * ROWS
    # No row is larger anyway; so that the compiler keeps no place in each tensor in registers from row to row
    last = ROWS - 1
    own = scratch + tl.program_id(0).to(tl.int64) * (R * BD * BK)
    cells = tl.arange(0, BD)[:, None] * BK + tl.arange(0, BK)[None, :]
    exponents = load_state(A, 0, D, K, channels, keys, STATE)
    dstate = first_state(dfinal, n, D, K, channels, keys, STATE)
    dexponents = tl.zeros([BD, BK], STATE)
    dskip = tl.zeros([BD], STATE)
    chunks = tl.cdiv(length, R)
    for c in range(0, chunks):
        start = (chunks - 1 - c) * R
        count = tl.minimum(length - start, R)
        state = load_state(kept, chunk + chunks - 1 - c, D, K, channels, keys, STATE)
        for r in range(0, count):
            tl.store(own + r * (BD * BK) + cells, state)
            row = tl.minimum(first + start + r, last)
            state = after(state, exponents, x, delta, B, row, D, K, channels, keys, STATE)
        tl.debug_barrier()
        for i in range(0, count):
            r = count - 1 - i
            row = tl.minimum(first + start + r, last)
            before = tl.load(own + r * (BD * BK) + cells)
            step, number = load_row(delta, row, D, channels, STATE), load_row(x, row, D, channels, STATE)
            read = load_row(B, row, K, keys, STATE)
            left = tl.exp(step[:, None] * exponents) * before
            dnumber = tl.zeros([BD], STATE)
            if dy is not None:
                out = load_row(dy, row, D, channels, STATE)
                seen = left + (step * number)[:, None] * read[None, :]
                if dC is not None:
                    store_row(dC, part + row, K, keys, tl.sum(seen * out[:, None], 0))
                dstate += out[:, None] * load_row(C, row, K, keys, STATE)[None, :]
                dskip += number * out
                if D_ is not None:
                    dnumber = load_row(D_, 0, D, channels, STATE) * out
            elif dC is not None:
                store_row(dC, part + row, K, keys, tl.zeros([BK], STATE))
            dinput = tl.sum(dstate * read[None, :], 1)
            if dB is not None:
                store_row(dB, part + row, K, keys, tl.sum(dstate * (step * number)[:, None], 0))
            # of Δ A
            dexponent = dstate * left
            if dx is not None:
                store_row(dx, row, D, channels, dnumber + step * dinput)
            if ddelta is not None:
                store_row(ddelta, row, D, channels, number * dinput + tl.sum(dexponent * exponents, 1))
            dexponents += dexponent * step[:, None]
            dstate = tl.exp(step[:, None] * exponents) * dstate
        tl.debug_barrier()
    if dinitial is not None:
        store_state(dinitial, n, D, K, channels, keys, dstate)
    if dA is not None:
        store_state(dA, n, D, K, channels, keys, dexponents)
    if dD_ is not None:
        store_row(dD_, n, D, channels, dskip)
