"""What Triton kernels of matrix states in chunks share: tiles of rows, and the decays between the rows of a chunk.

A chunk is C rows of one sequence and head, a power of two and at least 16, which is the least that tl.dot multiplies.
Chunks are numbered over all sequences; with cu_seqlens, sequence n has those from cu_seqlens[n] // C + n on, so that
nobody needs to know how many there are: some are empty. Rows past the end of a sequence are zeros and do not decay.

A decay between two rows is the exponential of a sum of logarithms, all at most 0, and nothing is divided or subtracted
(docs/derivations/chunks.md). A sum over some rows m for every row t is a product with `reach` [C, C], which is 1 where
t's sum has m in it; the gradient of the logarithms is a product with its transpose.

Everything is float32. PRECISION is that of dots, which each kernel is given. Tensors are contiguous.
"""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton_rows import chunk_of

# exp of it is 0 in float32, as of everything below; unlike -inf it has a product with 0
LEAST: tl.constexpr = tl.constexpr(-150.0)


@triton.jit
def chunk_rows(cu_seqlens, chunk, T, N, C: tl.constexpr):
    # The sequence that a chunk is of, its first row, and how many rows it has
    n, first, length, begin = chunk_of(cu_seqlens, chunk, T, N, C)
    if cu_seqlens is None:
        first = n * T
    return n, first + begin, tl.maximum(tl.minimum(length - begin, C), 0)


@triton.jit
def load_tile(tensor, first, count, h, H, W, columns, C: tl.constexpr):
    # [C, columns] of [..., H, W]; zeros past `count` rows
    rows = tl.arange(0, C)
    inside = (rows < count)[:, None] & (columns < W)[None, :]
    places = ((first + rows) * H + h)[:, None] * W + columns[None, :]
    return tl.load(tensor + places, inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(tensor, first, count, h, H, W, columns, numbers, C: tl.constexpr):
    rows = tl.arange(0, C)
    inside = (rows < count)[:, None] & (columns < W)[None, :]
    places = ((first + rows) * H + h)[:, None] * W + columns[None, :]
    tl.store(tensor + places, numbers.to(tensor.dtype.element_ty), inside)


@triton.jit
def load_vector(tensor, first, count, h, H, C: tl.constexpr):
    # [C] of [..., H]: one number a row
    rows = tl.arange(0, C)
    return tl.load(tensor + (first + rows) * H + h, rows < count, other=0.0).to(tl.float32)


@triton.jit
def store_vector(tensor, first, count, h, H, numbers, C: tl.constexpr):
    rows = tl.arange(0, C)
    tl.store(tensor + (first + rows) * H + h, numbers.to(tensor.dtype.element_ty), rows < count)


@triton.jit
def load_logs(log_decay, first, count, h, H, K, keys, C: tl.constexpr):
    # Log decays [C, keys], finite
    logs = load_tile(log_decay, first, count, h, H, K, keys, C)
    return tl.maximum(logs, LEAST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_shared_logs(log_decay, first, count, h, H, C: tl.constexpr):
    # [C]: of decays that all keys share
    logs = load_vector(log_decay, first, count, h, H, C)
    return tl.maximum(logs, LEAST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def reach(size, BEFORE: tl.constexpr, EXCLUSIVE: tl.constexpr, C: tl.constexpr):
    # [t, m]: in blocks of `size` rows, is m before t or t itself (EXCLUSIVE: not itself)? Or is it after t?
    t, m = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if not BEFORE:
        ordered = m > t
    elif EXCLUSIVE:
        ordered = m < t
    else:
        ordered = m <= t
    return ((t // size == m // size) & ordered).to(tl.float32)


@triton.jit
def halves_reach(h, EXCLUSIVE: tl.constexpr, C: tl.constexpr):
    # The same for rows as they meet at the borders of blocks of h: in upper blocks before, in lower blocks after
    upper = (tl.arange(0, C) // h % 2 == 1)[:, None]
    return tl.where(upper, reach(h, True, EXCLUSIVE, C), reach(h, False, EXCLUSIVE, C))


@triton.jit
def meets(h, C: tl.constexpr):
    # [i, j]: i in the upper, j in the lower of two neighbouring blocks of h rows
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    return (i // h % 2 == 1) & (i // h == j // h + 1)


@triton.jit
def sums(matrix, vector):
    # [C, C] @ [C], number by number
    return tl.sum(matrix * vector[None, :], 1)


@triton.jit
def shared_decays(logs, EXCLUSIVE: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr):
    # [i, j]: the decays m of j < m <= i (EXCLUSIVE: m < i) where all keys share them; 0 where i does not see j
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    # the logarithm of row m for every j before it
    later = tl.where(i > j, logs[:, None], 0.0)
    between = tl.dot(reach(C, True, EXCLUSIVE, C), later, input_precision=PRECISION)
    return tl.where(i > j if EXCLUSIVE else i >= j, tl.exp(between), 0.0)


@triton.jit
def on_diagonal(numbers, C: tl.constexpr):
    # [C, C]
    return tl.where(tl.arange(0, C)[:, None] == tl.arange(0, C)[None, :], numbers[:, None], 0.0)


@triton.jit
def diagonal_of(matrix, C: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, C)[:, None] == tl.arange(0, C)[None, :], matrix, 0.0), 1)
