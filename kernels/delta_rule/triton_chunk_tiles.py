"""What the Triton kernels of the delta rule in chunks of C rows share: products, tiles, states, pairs of rows.

Tiles are turned so that a product has many rows, 16 to a warp: states are [values, keys], rows of values [values, C].
Rows past the end of a sequence are zeros, which do nothing. Everything is computed in float32. PRECISE is what products
of any numbers are computed with; a factor that is an input is NARROW where it has 16 bits, whose digits TF32 has.
"""
# The language is Triton's, whose types mypy does not know
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def high_part(x):
    # The digits that TF32 has, to nearest: the rest is twice as small, and that of two factors is left out
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, sums, BATCHED: tl.constexpr, PRECISE: tl.constexpr):
    # sums + a @ b; BATCHED: 16 rows at a time, of which each warp has its own. Groups of rows may have each their own b
    if BATCHED:
        G: tl.constexpr = a.shape[0] // 16
        groups: tl.constexpr = b.shape[0] if len(b.shape) == 3 else 1
        n: tl.constexpr = b.shape[-2]
        m: tl.constexpr = b.shape[-1]
        if len(b.shape) == 3:
            every = tl.reshape(tl.broadcast_to(b[:, None, :, :], [groups, G // groups, n, m]), [G, n, m])
        else:
            every = tl.broadcast_to(b[None, :, :], [G, n, m])
        found = tl.reshape(sums, [G, 16, m])
        found = tl.dot(tl.reshape(a, [G, 16, n]), every, found, input_precision=PRECISE)
        return tl.reshape(found, [a.shape[0], m])
    else:
        return tl.dot(a, b, sums, input_precision=PRECISE)


@triton.jit
def product(a, b, NARROW: tl.constexpr, PRECISE: tl.constexpr, BATCHED: tl.constexpr = False):
    # a @ b; NARROW: b has few digits. What is small comes first; Triton's own tf32x3 takes more registers
    if PRECISE == "tf32x3":
        high, found = high_part(a), tl.zeros([a.shape[0], b.shape[-1]], tl.float32)
        if not NARROW:
            rest = b - high_part(b)
            b = high_part(b)
            found = dot(high, rest, found, BATCHED, "tf32")
        found = dot(a - high, b, found, BATCHED, "tf32")
        return dot(high, b, found, BATCHED, "tf32")
    else:
        return dot(a, b, tl.zeros([a.shape[0], b.shape[-1]], tl.float32), BATCHED, PRECISE)


@triton.jit
def added(sums, a, b, NARROW: tl.constexpr, PRECISE: tl.constexpr, BATCHED: tl.constexpr):
    # sums + a @ b, in the registers of the sums where they are many
    if NARROW and PRECISE == "tf32x3":
        high = high_part(a)
        return dot(a - high, b, dot(high, b, sums, BATCHED, "tf32"), BATCHED, "tf32")
    else:
        return sums + product(a, b, NARROW, PRECISE, BATCHED)


@triton.jit
def summed(sums, a, b, PRECISE: tl.constexpr, BATCHED: tl.constexpr):
    # sums + a @ b, in the registers of the sums: what is left to add, the compiler leaves beside all that comes after
    if PRECISE == "tf32x3":
        high, found = high_part(a), high_part(b)
        sums = dot(high, b - found, sums, BATCHED, "tf32")
        sums = dot(a - high, found, sums, BATCHED, "tf32")
        return dot(high, found, sums, BATCHED, "tf32")
    else:
        return dot(a, b, sums, BATCHED, PRECISE)


@triton.jit
def updated(state, a, b, NARROW: tl.constexpr, PRECISE: tl.constexpr, BATCHED: tl.constexpr):
    # state + a @ b; NARROW: of inputs of 16 bits. Sums of products round towards zero, and a state is one of all chunks
    return summed(state, a, b, PRECISE, BATCHED) if NARROW else state + product(a, b, False, PRECISE, BATCHED)


@triton.jit
def rows_left(length, c, C: tl.constexpr):
    # of chunk c, in 32 bits: numbers of 64 are two registers
    return tl.minimum(length - c * C, C).to(tl.int32)


@triton.jit
def load_keys(tensor, first, count, h, H, K, b, BK: tl.constexpr, C: tl.constexpr, AHEAD: tl.constexpr = 0):
    # [C, keys] of tile b. Tiles differ in where they begin and share all places after it: those of each take registers.
    # [2, C, keys] of two groups, the second AHEAD keys after the first
    begin = tensor + ((first * H + h) * K + b * BK)
    rows, keys = tl.arange(0, C), tl.arange(0, BK)
    if AHEAD:
        keys = tl.arange(0, 2)[:, None, None] * AHEAD + keys[None, None, :]
        inside = (rows < count)[None, :, None] & (keys < K - b * BK)
        return tl.load(begin + (rows[None, :, None] * (H * K) + keys), inside, other=0.0).to(tl.float32)
    else:
        inside = (rows < count)[:, None] & (keys < K - b * BK)[None, :]
        return tl.load(begin + (rows[:, None] * (H * K) + keys[None, :]), inside, other=0.0).to(tl.float32)


@triton.jit
def turned(x):
    # Of each group
    return tl.trans(x, 0, 2, 1) if len(x.shape) == 3 else tl.trans(x)


@triton.jit
def over_groups(parts, AHEAD: tl.constexpr):
    # [values, C]: sums over the keys of all groups
    if AHEAD:
        return tl.sum(tl.reshape(parts, [2, parts.shape[0] // 2, parts.shape[1]]), 0)
    else:
        return parts


@triton.jit
def to_groups(x, AHEAD: tl.constexpr):
    # The same to both groups of keys
    if AHEAD:
        return tl.reshape(tl.broadcast_to(x[None, :, :], [2, x.shape[0], x.shape[1]]), [2 * x.shape[0], x.shape[1]])
    else:
        return x


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
def load_blocks(states, index, K, V, values, BK: tl.constexpr, BLOCKS: tl.constexpr, AHEAD: tl.constexpr = 0):
    # The same, BK keys to each tile of a tuple
    blocks = ()
    for b in tl.static_range(BLOCKS):
        if AHEAD:
            blocks += (load_groups(states, index, K, V, values, b, BK, AHEAD),)
        else:
            blocks += (load_state(states, index, K, V, b * BK + tl.arange(0, BK), values),)
    return blocks


@triton.jit
def in_groups(K, V, values, b, BK: tl.constexpr, AHEAD: tl.constexpr):
    # Places in a state from tile b on, and which there are: [2 values, keys]
    BV: tl.constexpr = values.shape[0]
    keys = tl.arange(0, 2)[:, None, None] * AHEAD + tl.arange(0, BK)[None, None, :]
    inside = (values < V)[None, :, None] & (keys < K - b * BK)
    places = keys * V + values[None, :, None]
    return tl.reshape(places, [2 * BV, BK]), tl.reshape(inside, [2 * BV, BK])


@triton.jit
def load_groups(states, index, K, V, values, b, BK: tl.constexpr, AHEAD: tl.constexpr):
    if states is None:
        return tl.zeros([2 * values.shape[0], BK], tl.float32)
    else:
        places, inside = in_groups(K, V, values, b, BK, AHEAD)
        return tl.load(states + (index * K + b * BK) * V + places, inside, other=0.0)


@triton.jit
def store_block(states, index, K, V, values, b, block, BK: tl.constexpr, AHEAD: tl.constexpr = 0):
    # Tile b of a state; of places, see load_keys
    begin = states + (index * K + b * BK) * V
    if AHEAD:
        places, inside = in_groups(K, V, values, b, BK, AHEAD)
        tl.store(begin + places, block, inside)
    else:
        keys = tl.arange(0, BK)
        inside = (values < V)[:, None] & (keys < K - b * BK)[None, :]
        tl.store(begin + (keys[None, :] * V + values[:, None]), block, inside)


@triton.jit
def store_blocks(states, index, K, V, values, blocks, BK: tl.constexpr, BLOCKS: tl.constexpr, AHEAD: tl.constexpr = 0):
    for b in tl.static_range(BLOCKS):
        store_block(states, index, K, V, values, b, blocks[b], BK, AHEAD)


@triton.jit
def below(C: tl.constexpr):
    return tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :]


@triton.jit
def lower(C: tl.constexpr):
    return tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]


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


@triton.jit
def gradients_of_values(
    dy, entering, leaving, errors, dvalues, dv, index, first, count, h, H, K, V, keys,
    SCALE: tl.constexpr, C: tl.constexpr, BV: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    # All sums over a chunk's values, BV of them at a time: the gradients [keys, C] of what reads the entering state, by
    # queries and by keys, and of what is written to the leaving one but for its strength, those [C, C] of the products
    # of rows but for their decays and strengths, and the product of the two states [keys]. Writes those of the values
    dquery, dread, dwrite = (tl.zeros([keys.shape[0], C], tl.float32),) * 3
    dM, dA = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    dtotal = tl.zeros([keys.shape[0]], tl.float32)
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
    return dquery, dread, dwrite, dM, dA, dtotal
