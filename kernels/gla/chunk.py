"""The chunked algebra of gated linear attention, forward and backward, in plain torch; see docs/derivations/chunks.md.

Time is cut into chunks of C rows, a power of two. Inside a chunk everything is matrix products:

    y = A v + (q ∘ before) S,   S' = diag(total) S + (k ∘ after)ᵀ v,   A[i, j] = Σ_k q[i] k[j] Π_{j < m <= i} decay[m]

before, after, total: products of the decays up to a row, after it, and of all rows. A pair (i, j) meets at one border
as the chunk is halved again and again: i in the upper, j in the lower of two neighbouring blocks of h rows, and its
decays are before[i] in the upper block times after[j] in the lower. So nothing is ever divided or subtracted, all
factors lie in [0, 1], and every decay is safe, 0 included. With a bonus u a row does not decay its own past (m < i),
and the diagonal of A is Σ_k q u k.

The gradient of a log decay at row t is the sum over all pairs with j < t <= i. It is made of the same halves, again
without a difference: of the upper blocks the rows from t on, of the lower blocks the rows before t.

Shapes: q, k [G, C, K], v [G, C, V] for G chunks, each of one sequence and head; log_decay [G, C, J] with J = 1 or K;
bonus [G, 1, K] or None; states [G, K, V]. All in the state dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Factors:
    """Decays that all keys of a head share.

    levels: for h = 1, 2, 4, ... before [G, C/2h, h, 1] of the rows in the upper blocks and after of those in the lower;
    before, after [G, C, 1] and total [G, 1] are the chunk's.
    """

    levels: list[tuple[Tensor, Tensor]]
    before: Tensor
    after: Tensor
    total: Tensor

    @staticmethod
    def of(log_decay: Tensor, exclusive: bool) -> Factors:
        """exclusive: before leaves the row itself out."""
        total, levels = log_decay.exp(), []
        after = torch.ones_like(total)
        before = after.clone() if exclusive else total.clone()
        for h in sizes(log_decay.shape[1]):
            levels.append((halves(before, h)[1].clone(), halves(after, h)[0].clone()))
            total = grow(before, after, total, h)
        return Factors(levels, before, after, total[:, 0])

    def part(self, start: int, stop: int) -> Factors:
        levels = [(before[start:stop], after[start:stop]) for before, after in self.levels]
        return Factors(levels, self.before[start:stop], self.after[start:stop], self.total[start:stop])


@dataclass
class Chunks:
    """What a chunk's rows do to one another, A [G, C, C], and what its state and they do: q ∘ before, k ∘ after, total.

    For the backward pass: D [G, C, C], the decays between two rows where all keys share them; or per key the decay of
    each row and for every h the upper half of q ∘ before, the lower half of k ∘ after, and the lower and upper totals.
    """

    A: Tensor
    q_before: Tensor
    k_after: Tensor
    total: Tensor | None = None
    D: Tensor | None = None
    factors: Factors | None = None
    decay: Tensor | None = None
    levels: list[tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)


def sizes(chunk: int) -> list[int]:
    """1, 2, 4, ..., C/2"""
    return [1 << n for n in range(chunk.bit_length() - 1)]


def halves(rows: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """The lower and the upper blocks [G, C/2h, h, ...] at the borders of blocks of h rows [G, C, ...], as views."""
    low, high = rows.unflatten(1, (-1, 2, h)).unbind(2)
    return low, high


def crossing(pairs: Tensor, h: int) -> Tensor:
    """Of a matrix [G, C, C] the blocks [G, C/2h, h, h] of pairs that meet at the borders of blocks of h, as a view."""
    blocks = pairs.unflatten(2, (-1, 2, h)).unflatten(1, (-1, 2, h))
    return blocks[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).movedim(-1, 1)


def product(a: Tensor, b: Tensor) -> Tensor:
    """[G, n, x, y] @ [G, n, y, z]; a single row or column by its sum."""
    return (a * b.transpose(2, 3)).sum(3, keepdim=True) if a.shape[2] == b.shape[3] == 1 else a @ b


def grow(before: Tensor | None, after: Tensor, total: Tensor, h: int) -> Tensor:
    """Multiplies before and after by the decays of the neighbouring block, and returns the totals [G, C/2h, J]."""
    low, high = halves(total, 1)
    if before is not None:
        halves(before, h)[1].mul_(low)
    halves(after, h)[0].mul_(high)
    return (low * high).squeeze(2)


def times(a: Tensor, factor: Tensor | None) -> Tensor:
    return a if factor is None else a * factor


def shared(q: Tensor, k: Tensor, factors: Factors | None, bonus: Tensor | None) -> Chunks:
    """Decays shared by the keys of a head, or none."""
    A = torch.bmm(q, k.transpose(1, 2))
    if factors is None:
        found = Chunks(A.tril_(), q, k)
    else:
        D = torch.zeros_like(A)
        D.diagonal(dim1=1, dim2=2).fill_(1.0)
        for h, (before, after) in zip(sizes(q.shape[1]), factors.levels):
            torch.mul(before, after.transpose(2, 3), out=crossing(D, h))
        found = Chunks(A.mul_(D), q * factors.before, k * factors.after, factors.total, D, factors)
    if bonus is not None:
        A.diagonal(dim1=1, dim2=2).copy_((q * bonus * k).sum(2))
    return found


def per_key(q: Tensor, k: Tensor, log_decay: Tensor, bonus: Tensor | None, keep: bool) -> Chunks:
    """A decay for each key. keep: for the backward pass."""
    decay = log_decay.exp()
    q_before, k_after, total = q * decay if bonus is None else q.clone(), k.clone(), decay
    found = Chunks(q.new_zeros(q.shape[0], q.shape[1], q.shape[1]), q_before, k_after, None, None, None, decay)
    found.A.diagonal(dim1=1, dim2=2).copy_((times(q, bonus) * k).sum(2))
    for h in sizes(q.shape[1]):
        q_high, k_low = halves(q_before, h)[1], halves(k_after, h)[0]
        crossing(found.A, h).copy_(product(q_high, k_low.transpose(2, 3)))
        if keep:
            found.levels.append((q_high.clone(), k_low.clone(), *halves(total, 1)))
        total = grow(q_before, k_after, total, h)
    found.total = total[:, 0]
    return found


def summary(k: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """k ∘ after [G, C, K] and total [G, K] for decays per key."""
    after, total = k.clone(), log_decay.exp()
    for h in sizes(k.shape[1]):
        total = grow(None, after, total, h)
    return after, total[:, 0]


def gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, bonus: Tensor | None, chunks: Chunks, S: Tensor, dS: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, dlog_decay and dbonus [G, C, K] from dy, the state S that enters and the gradient dS of the one that
    leaves."""
    dv = torch.bmm(chunks.A.transpose(1, 2), dy).baddbmm_(chunks.k_after, dS)
    dA = torch.bmm(dy, v.transpose(1, 2))
    # of q ∘ before and of k ∘ after
    dq, dk = torch.bmm(dy, S.transpose(1, 2)), torch.bmm(v, dS.transpose(1, 2))
    dlog_decay = dbonus = None
    diagonal = (dy * v).sum(2, keepdim=True)
    if chunks.decay is not None:
        dlog_decay = _per_key(q, dq, dk, dA, chunks, S, dS, bonus is not None)
    else:
        if chunks.D is not None:
            dlog_decay = _shared(dq, dk, dA, chunks, S, dS, bonus is not None)
            dA.mul_(chunks.D)
        else:
            dA.tril_()
        if bonus is not None:
            dA.diagonal(dim1=1, dim2=2).zero_()
        dq.baddbmm_(dA, k)
        dk.baddbmm_(dA.transpose(1, 2), q)
    if chunks.decay is not None or bonus is not None:
        dq.addcmul_(diagonal, times(k, bonus))
        dk.addcmul_(diagonal, times(q, bonus))
    if bonus is not None:
        dbonus = diagonal * q * k
    return dq, dk, dv, dlog_decay, dbonus


def _shared(dq: Tensor, dk: Tensor, dA: Tensor, chunks: Chunks, S: Tensor, dS: Tensor, exclusive: bool) -> Tensor:
    """dlog_decay [G, C, 1]; makes dq and dk those of q and k as far as the state goes.

    through: for blocks that are halved again and again, the pairs with j before and i after the block. into, out: by
    row, the pairs whose other row is before or after its block.
    """
    factors = chunks.factors
    assert factors is not None
    into = (chunks.q_before * dq).sum(2, keepdim=True)
    out = (chunks.k_after * dk).sum(2, keepdim=True)
    dq.mul_(factors.before)
    dk.mul_(factors.after)
    through = (factors.total * (S * dS).sum((1, 2))[:, None])[:, None]
    P = dA * chunks.A
    for h in reversed(sizes(dq.shape[1])):
        pairs, high, low = crossing(P, h), halves(into, h)[1], halves(out, h)[0]
        through = torch.stack((through + high.sum(2), through + low.sum(2)), 2).flatten(1, 2)
        high.add_(pairs.sum(3, keepdim=True))
        low.add_(pairs.sum(2)[..., None])
    return through if exclusive else through + into


def _per_key(
    q: Tensor, dq: Tensor, dk: Tensor, dA: Tensor, chunks: Chunks, S: Tensor, dS: Tensor, exclusive: bool
) -> Tensor:
    """dlog_decay [G, C, K]; makes dq and dk those of q and k, but for the diagonal.

    As in `_shared`, but into is q ∘ before times its gradient and out k ∘ after times its, which are here anyway.
    """
    assert chunks.total is not None
    assert chunks.decay is not None
    through = (chunks.total * (S * dS).sum(2))[:, None]
    for h, (q_high, k_low, low, high) in reversed(list(zip(sizes(dq.shape[1]), chunks.levels))):
        dq_high, dk_low = halves(dq, h)[1].mul_(low), halves(dk, h)[0].mul_(high)
        into, out = (dq_high * q_high).sum(2), (dk_low * k_low).sum(2)
        through = torch.stack((through + into, through + out), 2).flatten(1, 2)
        block = crossing(dA, h).contiguous()
        dq_high.add_(block @ k_low)
        dk_low.add_(block.transpose(2, 3) @ q_high)
    if exclusive:
        return through
    dq.mul_(chunks.decay)
    return through.addcmul_(q, dq)
