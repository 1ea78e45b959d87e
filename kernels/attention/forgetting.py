"""Attention with decays by torch's fused kernels, in blocks of queries.

The bias of a query t for a key s is split at the first row p of the block that t is in:

    keys before p:  what lies between p and t, plus what lies between s and p. Neither is a difference of larger
                    numbers, and both enter as a column of q or k beside a column of ones in the other: no mask.
    the others:     a mask, one block of queries wide and high; and with a window where its border runs.

Pieces that share queries are merged by their log-sum-exp. A key that decays leave less than 1e-19 of a query's weight
(1e-154 in float64), whatever its score could be, is left out: a block of queries has no more keys than it remembers,
and the kernels meet few denormal numbers, with which processors are slow.

The column of ones in q makes the sum of the scores' gradients over the queries, one number for each key, a column of
dk; what is added up over the keys before a row is the gradient of that row's log_decay. (Over the keys of a query the
scores' gradients add up to zero.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import decay, fused, spans
from kernels.attention.decay import Sums
from kernels.attention.spans import Segment, Sight

# so many queries are done in one masked call, whatever their keys
FEW = 16
# A finite score that vanishes beside any other: a query may see no key of a piece.
HIDDEN = -1e30


class Piece(NamedTuple):
    """Some queries, the rows that they stand at, and some of their keys. again: an earlier piece has the same queries.

    far: the keys all come before the queries, and every query sees all of them.
    """

    queries: slice
    positions: slice
    keys: slice
    far: bool
    again: bool


def pieces(segment: Segment, window: int, block: int) -> Iterator[Piece]:
    """The pieces of a sequence whose queries stand at its last keys; a query that sees no key is in none."""
    (start, end), keys = (segment.queries.start, segment.queries.stop), segment.keys
    ahead = keys.stop - end
    for first in range(max(start, keys.start - ahead), end, block):
        queries = slice(first, min(first + block, end))
        at = slice(queries.start + ahead, queries.stop + ahead)
        least = max(keys.start, at.start - window + 1) if window else keys.start
        # from here on every query sees the keys before the block
        inside = min(max(least, at.stop - window), at.start) if window else least
        if at.start - inside < block or at.stop - at.start <= FEW:
            yield Piece(queries, at, slice(least, at.stop), False, False)
            continue
        if least < inside:
            yield Piece(queries, at, slice(least, inside), False, False)
        yield Piece(queries, at, slice(inside, at.start), True, least < inside)
        yield Piece(queries, at, slice(at.start, at.stop), False, True)


class Work:
    """A problem, computed in the state dtype."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, starts: Tensor | None, ends: Tensor | None,
        cu_seqlens: Tensor | None, window: int, scale: float, block: int,
    ) -> None:  # fmt: skip
        self.given, self.spans = (q, k, v, log_decay), (starts, ends, cu_seqlens)
        self.window, self.scale, self.block = window, scale, block
        self.times = q.shape[2] // k.shape[2]
        self.sums = Sums.of(log_decay)
        # [B, 1, H]: of the longest key, or a little more where it was rounded
        longest = k.norm(dim=-1).amax(1, keepdim=True).to(log_decay.dtype) * (1 + 2 * torch.finfo(k.dtype).eps)
        self.longest = longest.repeat_interleave(self.times, 2)
        self.few = cu_seqlens is None and q.shape[1] <= FEW

    def forward(self) -> tuple[Tensor, Tensor]:
        q, k, v, log_decay = self.given
        if self.few:
            # as they are, for a step of decoding is over sooner than a copy of its cache would be made; on CPU the
            # mask may be wider than they
            width = fused.width(max(k.shape[3], v.shape[3]), q.device)
            if q.device.type != "cpu":
                q, k, v = (x.to(log_decay.dtype) for x in (q, k, v))
            q, k, v = (x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3])) for x in (q, k, v))
            mask, blind, _ = self._mask_of_few()
            y, lse = fused.forward(q, k, v, mask, False, self.scale)
            y, lse = y.masked_fill(blind[..., None], 0), lse.masked_fill(blind, -torch.inf)
        else:
            self._open()
            y, lse = self._attend()
        return y[..., : self.given[2].shape[3]].to(self.given[0].dtype).contiguous(), lse.contiguous()

    def _attend(self) -> tuple[Tensor, Tensor]:
        """y [B, T, H, width] in the state dtype, and lse."""
        y, lse = torch.zeros_like(self.q), self.q.new_full(self.q.shape[:3], -torch.inf)
        for segment in self._segments():
            for b, (rows, _, keys, _, again), hide in self._pieces(segment):
                operands = self.q[b, rows], self.k[b, keys], self.v[b, keys]
                y_part, lse_part = fused.forward(*operands, hide, False, 1.0)
                if again:
                    y_part, lse_part = fused.merge(y[b, rows], lse[b, rows], y_part, lse_part)
                y[b, rows], lse[b, rows] = y_part, lse_part
        return y, lse

    def _open(self) -> None:
        """q scaled, a head of k and v for every head of q, all with two columns more."""
        q, k, v, log_decay = self.given
        self.width = fused.width(max(k.shape[3] + 2, v.shape[3]), q.device)
        self.q = self._padded(q.to(log_decay.dtype) * self.scale)
        self.k, self.v = (self._padded(x if self.times == 1 else x.repeat_interleave(self.times, 2)) for x in (k, v))
        # between a query's row and its block's first beside ones, and ones beside what is between that and a key
        self.q[..., -1] = 1
        self.k[..., -2] = 1

    def backward(self, dy: Tensor, y: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        """dq, dk, dv, dlog_decay."""
        q, k, v, log_decay = self.given
        self._open()
        dy, y = self._padded(dy), self._padded(y)
        # The scores' gradients are made from y, and dlog_decay is a sum of them that cancels: a rounded y will not do.
        narrow = q.dtype != log_decay.dtype
        if self.few:
            mask, blind, at = self._mask_of_few()
            if narrow:
                y = fused.forward(self.q, self.k, self.v, mask, False, 1.0)[0].masked_fill(blind[..., None], 0)
            # p of a blind query is exp(hidden - lse)
            rest = y, lse.masked_fill(blind, 0), mask, False, 1.0
            dq, dk, dv = fused.backward(dy, self.q, self.k, self.v, *rest)
            dq = dq.masked_fill(blind[..., None], 0)
            ends = self.spans[1]
            of_rows = torch.zeros_like(dk[..., -1]).scatter_add_(1, at[..., None].expand_as(dq[..., -2]), dq[..., -2])
            dlog_decay = before(dk[..., -1], of_rows)
            if ends is not None:
                outside = torch.arange(k.shape[1], device=k.device) >= ends[:, None]
                dlog_decay = dlog_decay.masked_fill(outside[..., None], 0)
        else:
            dq, dk, dv = (torch.zeros_like(x) for x in (self.q, self.k, self.v))
            dlog_decay = torch.zeros_like(log_decay, dtype=self.sums.sums.dtype)
            y = self._attend()[0] if narrow else y
            for segment in self._segments():
                of_keys = dk[segment.batch, segment.keys, :, -1]
                # several sequences may have the same keys
                of_keys.zero_()
                for b, (rows, _, keys, _, _), hide in self._pieces(segment):
                    operands = self.q[b, rows], self.k[b, keys], self.v[b, keys]
                    parts = fused.backward(dy[b, rows], *operands, y[b, rows], lse[b, rows], hide, False, 1.0)
                    for whole, part, where in zip((dq, dk, dv), parts, (rows, keys, keys)):
                        whole[b, where] += part
                of_rows, queries = torch.zeros_like(of_keys), dq[segment.batch, segment.queries, :, -2]
                # the last queries stand at the last keys
                last = min(queries.shape[1], of_keys.shape[1])
                of_rows[:, of_keys.shape[1] - last :] = queries[:, queries.shape[1] - last :]
                dlog_decay[segment.batch, segment.keys] += before(of_keys, of_rows)
        groups = k.shape[2]
        dq = (dq[..., : q.shape[3]] * self.scale).to(q.dtype)
        dk, dv = (
            (g if g.shape[2] == groups else g.unflatten(2, (groups, -1)).sum(3))[..., : x.shape[3]].to(x.dtype)
            for g, x in ((dk, k), (dv, v))
        )
        return dq.contiguous(), dk.contiguous(), dv.contiguous(), dlog_decay.to(log_decay.dtype).contiguous()

    def _padded(self, x: Tensor) -> Tensor:
        """With columns of zeros, in fresh memory."""
        return F.pad(x.to(self.given[3].dtype), (0, self.width - x.shape[3])).contiguous()

    def _segments(self) -> list[Segment]:
        return spans.segments(self.given[0], self.given[1], *self.spans)

    def _pieces(self, segment: Segment) -> Iterator[tuple[slice, Piece, Tensor | None]]:
        """Each with its mask; the two columns are written for the piece at hand."""
        b = segment.batch
        for piece in pieces(segment, self.window, self.block):
            of, to = self.sums.part(b, piece.positions), self.sums.part(b, piece.keys)
            K = self.given[1].shape[3]
            of_block = self.q[b, piece.queries, :, :K], self.k[b, piece.positions, :, :K]
            least = _least(*of_block, self.longest[b])
            if not piece.far:
                mask = decay.bias(of, to, piece.keys.start, HIDDEN, self.q.dtype)
                unseen = self._unseen(piece, mask.device) | (mask < least.transpose(1, 2)[..., None])
                self.q[b, piece.queries, :, -2], self.k[b, piece.keys, :, -1] = 0, 0
                yield b, piece, mask.masked_fill_(unseen, HIDDEN)
                continue
            base = piece.positions.start
            first = self.sums.part(b, slice(base, base + 1))
            of_queries, of_keys = of.sums - first.sums, first.sums - to.sums
            forgotten = of_keys < least.amin(1, keepdim=True)
            if of.last is not None and first.last is not None:
                rows = torch.arange(piece.keys.start, piece.keys.stop, device=of_keys.device)
                of_queries = of_queries.masked_fill(of.last > base, HIDDEN)
                forgotten = forgotten | (first.last > rows[:, None])
            of_keys = of_keys.masked_fill(forgotten, HIDDEN)
            if of_keys.device.type == "cpu":
                # on a GPU this would have to be read back
                known = (~forgotten).any(0).any(1).nonzero()
                if not len(known):
                    continue
                begin = int(known[0])
                of_keys = of_keys[:, begin:]
                piece = piece._replace(keys=slice(piece.keys.start + begin, piece.keys.stop))
            self.q[b, piece.queries, :, -2], self.k[b, piece.keys, :, -1] = of_queries, of_keys
            yield b, piece, None

    def _unseen(self, piece: Piece, device: torch.device) -> Tensor:
        """[queries, keys]"""
        positions = torch.arange(piece.positions.start, piece.positions.stop, device=device)
        distance = positions[:, None] - torch.arange(piece.keys.start, piece.keys.stop, device=device)
        return (distance < 0) | (distance >= self.window) if self.window else distance < 0

    def _mask_of_few(self) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, T, S] for all queries and keys; which queries see no key [B, T, 1]; the key each stands at [B, T]."""
        q, k, _, log_decay = self.given
        sight = Sight.of(q, k, *self.spans, causal=True, window=self.window)
        visible = sight.visible(slice(None), 0, k.shape[1])
        at, dtype = sight.position.clamp(0, k.shape[1] - 1), log_decay.dtype
        own = k.gather(1, at[..., None, None].expand(q.shape[0], -1, *k.shape[2:])).to(dtype)
        least = _least(q.to(dtype) * self.scale, own.repeat_interleave(self.times, 2), self.longest)
        mask = decay.bias(self.sums.at(at), self.sums, 0, HIDDEN, dtype)
        forgotten = mask < least.transpose(1, 2)[..., None]
        return mask.masked_fill_(~visible[:, None] | forgotten, HIDDEN), ~visible.any(-1)[..., None], at


def _least(q: Tensor, own: Tensor, longest: Tensor) -> Tensor:
    """[B, T, H]: a bias below this leaves nothing of a key's weight beside that of the key the query stands at."""
    # no score is above the first product, and the sum of the weights is no less than that of the own key
    ahead = q.norm(dim=-1) * longest - (q * own).sum(-1)
    return math.log(torch.finfo(q.dtype).tiny) / 2 - ahead


def before(of_keys: Tensor, of_rows: Tensor | None = None) -> Tensor:
    """[B, S, H]: the sums of the scores' gradients over all keys before each, less those of the queries before it.

    The latter add up to nothing but rounding errors, which are in the former too: most of the error of a small sum.
    """
    sums = of_keys.double() if of_rows is None else of_keys.double() - of_rows.double()
    return F.pad(sums[:, :-1].cumsum(1), (0, 0, 1, 0))
