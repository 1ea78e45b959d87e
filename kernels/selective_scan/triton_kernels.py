"""The Triton kernels of the selective scan: channels [BD] and their states [BD, BK], of one sequence, in registers.

As in kernels/triton_matrix.py, with channels in the place of values. Forward a program walks down the rows. Backward
such a walk keeps the state before every R-th row; then, tile of R rows by tile against time, a program reads its rows
[R, BD] once and goes through the keys, for each of which the states before the rows and the gradients after them are
two associative scans of [R, BD] on the chip. Rows that a sequence does not have are zeros: Δ = 0 leaves a state alone.

Sums over all channels (dB, dC) are left as one part for each block of them, sums over sequences (dA, dD) as one for
each sequence; triton_sums.py adds them. docs/derivations/selective_scan.md has the scans, the bytes, and why programs
may run in any order.
"""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_matrix import first_state, load_row, load_state, place, store_row, store_state


@triton.jit
def load_present(tensor, row, present, W, columns, STATE: tl.constexpr):
    return tl.load(tensor + row * W + columns, (columns < W) & present, other=0.0).to(STATE)


@triton.jit(do_not_specialize=["T"])
def selective_scan_forward(
    x, delta, A, B, C, D_, initial, y, final, kept, cu_seqlens, T, D, K,
    STATE: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    n, _, _, channels, first, length, chunk = place(cu_seqlens, T, 1, D, R, BD)
    keys = tl.arange(0, BK)
    exponents = load_state(A, 0, D, K, channels, keys, STATE)
    state = first_state(initial, n, D, K, channels, keys, STATE)
    if y is not None and D_ is not None:
        skip = load_row(D_, 0, D, channels, STATE)
    for t in range(0, length, AHEAD):
        if kept is not None and t % R == 0:
            store_state(kept, chunk + t // R, D, K, channels, keys, state)
        # the reads of several rows are under way at once
        steps = ()
        numbers = ()
        reads = ()
        writes = ()
        for s in tl.static_range(AHEAD):
            row, present = first + t + s, t + s < length
            steps += (load_present(delta, row, present, D, channels, STATE),)
            numbers += (load_present(x, row, present, D, channels, STATE),)
            reads += (load_present(B, row, present, K, keys, STATE),)
            if y is not None:
                writes += (load_present(C, row, present, K, keys, STATE),)
        for s in tl.static_range(AHEAD):
            # exp(Δ A) h + Δ x B
            decay = tl.exp(steps[s][:, None] * exponents)
            state = decay * state + (steps[s] * numbers[s])[:, None] * reads[s][None, :]
            if y is not None:
                out = tl.sum(state * writes[s][None, :], 1)
                if D_ is not None:
                    out += skip * numbers[s]
                inside = (channels < D) & (t + s < length)
                tl.store(y + (first + t + s) * D + channels, out.to(y.dtype.element_ty), inside)
    if final is not None:
        store_state(final, n, D, K, channels, keys, state)


@triton.jit
def along(decay, state, left, decay2, state2, left2):
    # Of rows and later rows: the product of decays, the state after them, and that less the last row's input
    return decay * decay2, decay2 * state + state2, decay2 * state + left2


@triton.jit
def against(passed, gradient, decay, passed2, gradient2, decay2):
    # Of rows and earlier rows: the product of all decays but the first row's, the gradient of the state after the first
    # row, and the first row's decay
    return passed2 * decay * passed, gradient2 + passed2 * (decay * gradient), decay2


@triton.jit(do_not_specialize=["T", "ROWS"])
def selective_scan_backward(
    dy, dfinal, x, delta, A, B, C, D_, kept, dx, ddelta, dA, dB, dC, dD_, dinitial, cu_seqlens, T, ROWS, D, K,
    STATE: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    n, _, block, channels, first, length, chunk = place(cu_seqlens, T, 1, D, R, BD)
    keys, rows, inside = tl.arange(0, BK), tl.arange(0, R), channels < D
    first_row, last_row = (rows == 0)[:, None], (rows == R - 1)[:, None]
    # where this block of channels puts its part of sums over all channels
    part = block.to(tl.int64) * ROWS * K
    dstate = first_state(dfinal, n, D, K, channels, keys, STATE)
    # read once, not for every tile
    exponents = load_state(A, 0, D, K, channels, keys, STATE)
    dexponents = tl.zeros([BD, BK], STATE)
    dskip = tl.zeros([BD], STATE)
    chunks = tl.cdiv(length, R)
    for c in tl.range(0, chunks, disable_licm=True):
        start = (chunks - 1 - c) * R
        here = start + rows < length
        present = here[:, None] & inside[None, :]
        cells = (first + start) * D + rows.to(tl.int64)[:, None] * D + channels[None, :]
        number = tl.load(x + cells, present, other=0.0).to(STATE)
        step = tl.load(delta + cells, present, other=0.0).to(STATE)
        if dy is None:
            out = tl.zeros([R, BD], STATE)
        else:
            out = tl.load(dy + cells, present, other=0.0).to(STATE)
        dinput = tl.zeros([R, BD], STATE)
        dstep = tl.zeros([R, BD], STATE)
        befores = kept + (chunk + chunks - 1 - c) * D * K
        # what does not depend on the key is made again for each, not kept in registers, nor from tile to tile
        for k in tl.range(0, K, disable_licm=True):
            this = (keys == k)[None, :]
            # No place is larger anyway; so that the compiler keeps none in each tensor in registers from key to key
            line = tl.minimum(first + start, ROWS) * K + rows * K + k
            cell = tl.minimum(channels * K + k, D * K - 1)
            exponent = tl.sum(tl.where(this, exponents, 0.0), 1)[None, :]
            read = tl.load(B + line, here, other=0.0).to(STATE)[:, None]
            write = tl.load(C + line, here, other=0.0).to(STATE)[:, None]
            decay = tl.exp(step * exponent)
            # gradients of the states, from what comes after the last row
            after = tl.sum(tl.where(this, dstate, 0.0), 1)[None, :]
            own = out * write + tl.where(last_row, after, 0.0)
            ones = tl.full([R, BD], 1.0, STATE)
            gradient = tl.associative_scan((ones, own, decay), 0, against, reverse=True)[1]
            if dB is not None:
                tl.store(dB + part + line, tl.sum(gradient * step * number, 1).to(dB.dtype.element_ty), here)
            dinput += gradient * read
            decayed = tl.sum(tl.where(first_row, gradient * decay, 0.0), 0)
            dstate = tl.where(this, decayed[:, None], dstate)
            # states, from what comes before the first row
            left = tl.where(first_row, decay * tl.load(befores + cell, inside, other=0.0)[None, :], 0.0)
            states = tl.associative_scan((decay, left + number * read * step, left), 0, along)
            state, left = states[1], states[2]
            if dC is not None:
                tl.store(dC + part + line, tl.sum(state * out, 1).to(dC.dtype.element_ty), here)
            # of Δ A
            dexponent = gradient * left
            dstep += dexponent * exponent
            dexponents += tl.where(this, tl.sum(dexponent * step, 0)[:, None], 0.0)
        # the same places once more, so that the compiler does not keep them in registers over all keys
        cells = tl.minimum(first + start, ROWS) * D + rows.to(tl.int64)[:, None] * D + channels[None, :]
        if ddelta is not None:
            tl.store(ddelta + cells, (number * dinput + dstep).to(ddelta.dtype.element_ty), present)
        if dx is not None:
            dnumber = step * dinput
            if D_ is not None:
                dnumber += load_row(D_, 0, D, channels, STATE)[None, :] * out
            tl.store(dx + cells, dnumber.to(dx.dtype.element_ty), present)
        dskip += tl.sum(out * number, 0)
    if dinitial is not None:
        store_state(dinitial, n, D, K, channels, keys, dstate)
    if dA is not None:
        store_state(dA, n, D, K, channels, keys, dexponents)
    if dD_ is not None:
        store_row(dD_, n, D, channels, dskip)
