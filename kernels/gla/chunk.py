"""The chunked algebra of gated linear attention, forward and backward, in plain torch; see docs/derivations/chunks.md.

Time is cut into chunks of C rows, a power of two. Inside a chunk everything is matrix products:

    y = A v + (q ∘ before) S,   S' = diag(total) S + (k ∘ after)ᵀ v,   A[i, j] = Σ_k q[i] k[j] Π_{j < m <= i} decay[m]

before, after, total: products of the decays up to a row, after it, and of all rows. A pair (i, j) meets at one border
as the chunk is halved again and again: i in the upper, j in the lower of two neighbouring blocks of h rows, and its
decays are before[i] in the upper block times after[j] in the lower. So nothing is ever divided or subtracted, all
factors lie in [0, 1], and every decay is safe, 0 included. With a bonus u a row does not decay its own past (m < i), and
the diagonal of A is Σ_k q u k.

The gradient of a log decay at row t is the sum over all pairs with j < t <= i. It is made of the same halves, again
without a difference: of the upper blocks the rows from t on, of the lower blocks the rows before t.

Shapes: q, k [G, C, K], v [G, C, V] for G chunks, each of one sequence and head; log_decay [G, C, J] with J = 1 or K, or
None; bonus [G, 1, K] or None; states [G, K, V]. All in the state dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Chunks:
    """What the rows of chunks do to one another: A, and for the backward pass what it is made of.

    D [G, C, C]: the decays between two rows, where all keys share them. levels: for h = 1, 2, 4, ... the factors
    (before, after) [G, C/2h, h, J] of the rows in the upper and in the lower blocks. before, after [G, C, J] and total
    [G, J]: of the whole chunk.
    """

    A: Tensor
    D: Tensor | None = None
    levels: list[tuple[Tensor, Tensor]] | None = None
    before: Tensor | None = None
    after: Tensor | None = None
    total: Tensor | None = None


def halves(rows: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """The lower and the upper blocks [G, C/2h, h, ...] at the borders of blocks of h rows [G, C, ...], as views."""
    low, high = rows.unflatten(1, (-1, 2, h)).unbind(2)
    return low, high


def crossing(pairs: Tensor, h: int) -> Tensor:
    """Of a matrix [G, C, C] the blocks [G, C/2h, h, h] of pairs that meet at the borders of blocks of h, as a view."""
    blocks = pairs.unflatten(2, (-1, 2, h)).unflatten(1, (-1, 2, h))
    return blocks[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).movedim(-1, 1)


def start(log_decay: Tensor, exclusive: bool) -> tuple[Tensor, Tensor, Tensor]:
    """before, after and total [G, C, J] of blocks of one row. exclusive: before leaves the row itself out."""
    total = log_decay.exp()
    ones = torch.ones_like(total)
    return ones.clone() if exclusive else total.clone(), ones, total


def grow(before: Tensor | None, after: Tensor, total: Tensor, h: int) -> Tensor:
    """Makes before and after those of blocks of 2h rows, and returns their totals [G, C/2h, J]."""
    low, high = halves(total, 1)
    if before is not None:
        halves(before, h)[1].mul_(low)
    halves(after, h)[0].mul_(high)
    return (low * high).squeeze(2)


def times(a: Tensor, factor: Tensor | None) -> Tensor:
    return a if factor is None else a * factor


def pairs(q: Tensor, k: Tensor, log_decay: Tensor | None, bonus: Tensor | None, keep: bool) -> Chunks:
    """keep: for the backward pass."""
    chunk, exclusive = q.shape[1], bonus is not None
    if log_decay is None:
        found = Chunks(torch.bmm(q, k.transpose(1, 2)).tril_())
    else:
        per_key, levels = log_decay.shape[2] > 1, []
        before, after, total = start(log_decay, exclusive)
        A = q.new_zeros(q.shape[0], chunk, chunk)
        h = 1
        while h < chunk:
            upper, lower = halves(before, h)[1], halves(after, h)[0]
            if per_key:
                block = (halves(q, h)[1] * upper) @ (halves(k, h)[0] * lower).transpose(2, 3)
            else:
                block = upper * lower.transpose(2, 3)
            crossing(A, h).copy_(block)
            if keep:
                levels.append((upper.clone(), lower.clone()))
            total = grow(before, after, total, h)
            h *= 2
        D = None
        if not per_key:
            A.diagonal(dim1=1, dim2=2).fill_(1.0)
            D, A = A, torch.bmm(q, k.transpose(1, 2))
            A.mul_(D)
        found = Chunks(A, D, levels, before, after, total[:, 0])
        exclusive = exclusive or per_key
    if exclusive:
        found.A.diagonal(dim1=1, dim2=2).copy_((q * times(k, bonus)).sum(2))
    return found


def summary(k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What a chunk does to the state that enters it: X [G, K, V] and total [G, J] of S' = diag(total) S + X."""
    if log_decay is None:
        return torch.bmm(k.transpose(1, 2), v), None
    _, after, total = start(log_decay, False)
    h = 1
    while h < k.shape[1]:
        total = grow(None, after, total, h)
        h *= 2
    return torch.bmm((k * after).transpose(1, 2), v), total[:, 0]


def gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, bonus: Tensor | None, chunks: Chunks,
    S: Tensor, dS: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dq, dk, dv, dlog_decay and dbonus [G, C, K] from dy, the state S that enters and the gradient dS of that which
    leaves."""
    dv = torch.bmm(chunks.A.transpose(1, 2), dy).baddbmm_(times(k, chunks.after), dS)
    dA = torch.bmm(dy, v.transpose(1, 2))
    dq, dk = torch.bmm(dy, S.transpose(1, 2)), torch.bmm(v, dS.transpose(1, 2))
    diagonal = (dy * v).sum(2, keepdim=True)
    dlog_decay = dbonus = None
    per_key = log_decay is not None and log_decay.shape[2] > 1
    if log_decay is not None:
        assert chunks.before is not None
        assert chunks.after is not None
        assert chunks.total is not None
        dq.mul_(chunks.before)
        dk.mul_(chunks.after)
        through = chunks.total[:, :, None] * S * dS
        through = through.sum(2) if per_key else through.sum((1, 2))[:, None]
        flows = Flows(q * dq, k * dk, through[:, None], per_key)
        dlog_decay = _between(dq, dk, q, k, dA, chunks, flows).done(bonus is not None)
    if not per_key:
        dA = dA.tril_() if chunks.D is None else dA.mul_(chunks.D)
        if bonus is not None:
            dA.diagonal(dim1=1, dim2=2).zero_()
        dq.baddbmm_(dA, k)
        dk.baddbmm_(dA.transpose(1, 2), q)
    if per_key or bonus is not None:
        dq.addcmul_(diagonal, times(k, bonus))
        dk.addcmul_(diagonal, times(q, bonus))
    if bonus is not None:
        dbonus = diagonal * q * k
    return dq, dk, dv, dlog_decay, dbonus


def _between(
    dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, dA: Tensor, chunks: Chunks, flows: Flows
) -> Flows:  # fmt: skip
    """Adds the flows of all pairs, and with decays per key dq and dk."""
    assert chunks.levels is not None
    per_key = chunks.D is None
    P = dA if per_key else dA * chunks.A
    for level in reversed(range(len(chunks.levels))):
        h, (before, after) = 2**level, chunks.levels[level]
        block = crossing(P, h)
        flows.split(h)
        if not per_key:
            flows.add(h, block.sum(3)[..., None], block.sum(2)[..., None])
            continue
        block, (k_low, q_high) = block.contiguous(), (halves(k, h)[0], halves(q, h)[1])
        dq_high = (block @ (k_low * after)).mul_(before)
        dk_low = (block.transpose(2, 3) @ (q_high * before)).mul_(after)
        halves(dq, h)[1].add_(dq_high)
        halves(dk, h)[0].add_(dk_low)
        flows.add(h, dq_high.mul_(q_high), dk_low.mul_(k_low))
    return flows


class Flows:
    """Sums over pairs j < t <= i. In blocks of rows that are halved again and again, row t has of its own block the
    pairs whose i comes from t on (`into`, by their i), those whose j comes before it (`out`, by their j), and `through`
    [G, blocks, J] those that span the block."""

    def __init__(self, into: Tensor, out: Tensor, through: Tensor, per_key: bool) -> None:
        self.into = into if per_key else into.sum(2, keepdim=True)
        self.out = out if per_key else out.sum(2, keepdim=True)
        self.through = through

    def split(self, h: int) -> None:
        """Blocks of 2h rows become blocks of h."""
        into, out = halves(self.into, h)[1].sum(2), halves(self.out, h)[0].sum(2)
        self.through = torch.stack((self.through + into, self.through + out), 2).flatten(1, 2)

    def add(self, h: int, into: Tensor, out: Tensor) -> None:
        """The pairs that meet at the borders of blocks of h."""
        halves(self.into, h)[1].add_(into)
        halves(self.out, h)[0].add_(out)

    def done(self, exclusive: bool) -> Tensor:
        return self.through if exclusive else self.through + self.into
