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
    return n, first + begin, tl.maximum(tl.minimum(length - begin, C), 0).to(tl.int32)


@triton.jit
def load_tile(tensor, first, count, h, H, W, columns, C: tl.constexpr):
    # [C, columns] of [..., H, W]; zeros past `count` rows. Within a chunk, places are counted in 32 bits
    rows = tl.arange(0, C)
    inside = (rows < count)[:, None] & (columns < W)[None, :]
    places = rows[:, None] * (H * W) + columns[None, :]
    return tl.load(tensor + (first * H + h) * W + places, inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(tensor, first, count, h, H, W, columns, numbers, C: tl.constexpr):
    rows = tl.arange(0, C)
    inside = (rows < count)[:, None] & (columns < W)[None, :]
    places = rows[:, None] * (H * W) + columns[None, :]
    tl.store(tensor + (first * H + h) * W + places, numbers.to(tensor.dtype.element_ty), inside)


@triton.jit
def load_vector(tensor, first, count, h, H, C: tl.constexpr):
    # [C] of [..., H]: one number a row
    rows = tl.arange(0, C)
    return tl.load(tensor + first * H + h + rows * H, rows < count, other=0.0).to(tl.float32)


@triton.jit
def store_vector(tensor, first, count, h, H, numbers, C: tl.constexpr):
    rows = tl.arange(0, C)
    tl.store(tensor + first * H + h + rows * H, numbers.to(tensor.dtype.element_ty), rows < count)


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
def reach(BEFORE: tl.constexpr, EXCLUSIVE: tl.constexpr, C: tl.constexpr):
    # [t, m]: is m before t or t itself (EXCLUSIVE: not itself)? Or is it after t?
    t, m = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if not BEFORE:
        ordered = m > t
    elif EXCLUSIVE:
        ordered = m < t
    else:
        ordered = m <= t
    return ordered.to(tl.float32)


@triton.jit
def halves_reach(n, EXCLUSIVE: tl.constexpr, C: tl.constexpr):
    # The same within blocks of 2^n rows that meet at borders: before t in the upper ones, after it in the lower
    t, m = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    last = t - 1 if EXCLUSIVE else t
    ordered = tl.where((t >> n) & 1 == 1, m <= last, m > t)
    return (ordered & (t >> n == m >> n)).to(tl.float32)


@triton.jit
def meets(n, TRANSPOSED: tl.constexpr, C: tl.constexpr):
    # [i, j], or TRANSPOSED [j, i]: i in the upper, j in the lower of two neighbouring blocks of 2^n rows
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    if TRANSPOSED:
        i, j = j, i
    return ((i >> n) & 1 == 1) & (i >> n == (j >> n) + 1)


@triton.jit
def add_up(matrix, numbers, acc, PRECISION: tl.constexpr):
    # matrix @ numbers + acc, where the matrix is of zeros and ones, which need no second TF32 part beside them
    if PRECISION == "tf32x3":
        high = (numbers.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        acc = tl.dot(matrix, high, acc, input_precision="tf32")
        return tl.dot(matrix, numbers - high, acc, input_precision="tf32")
    else:
        return tl.dot(matrix, numbers, acc, input_precision=PRECISION)


@triton.jit
def decays_over(matrix, logs, PRECISION: tl.constexpr):
    # For every row the decays of the rows that the matrix has for it
    return tl.exp(add_up(matrix, logs, tl.zeros_like(logs), PRECISION))


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
    decays = decays_over(reach(True, EXCLUSIVE, C), later, PRECISION)
    return tl.where(i > j if EXCLUSIVE else i >= j, decays, 0.0)


@triton.jit
def on_diagonal(numbers, C: tl.constexpr):
    # [C, C]
    return tl.where(tl.arange(0, C)[:, None] == tl.arange(0, C)[None, :], numbers[:, None], 0.0)


@triton.jit
def diagonal_of(matrix, C: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, C)[:, None] == tl.arange(0, C)[None, :], matrix, 0.0), 1)
