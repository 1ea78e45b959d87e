"""Attention by torch's fused kernels (those of F.scaled_dot_product_attention), sequence by sequence where packed.

The scores are never held: a problem is cut into pieces that the kernels do well, some queries with a range of keys
each, and pieces that share queries are merged by their log-sum-exp. Masks exist only for windows (one block of queries
wide) and for a few queries (`FEW`) of a batch whose sequences have different keys.

To cut, it reads cu_seqlens, starts and ends back to the host, which a GPU waits for; it does not for a batch without
starts and ends, nor for a few queries. Attention with decays is in forgetting.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import forgetting, fused, naive, spans
from kernels.attention.spans import Segment, Sight
from kernels.problem import Problem, state_dtype

# so many queries are masked in one call rather than taken sequence by sequence
FEW = 16


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    reason = fused.reason(problem.device, problem.dtypes["q"])
    return [*naive.cannot(problem), *([] if reason is None else [reason])]


def configs(problem: Problem) -> Sequence[Mapping[str, int]]:
    """block: queries of one masked piece, where there is a window or a log_decay."""
    window = problem.options["window"]
    if problem.options["log_decay"]:
        return [{"block": 256}, {"block": 128}, {"block": 512}]
    if not window or problem.sizes["T"] == 1:
        return [{"block": 256}]
    near = min(max(1 << (window // 2).bit_length(), 64), 1024)
    return [{"block": near}, {"block": max(near // 2, 32)}, {"block": near * 2}]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    causal: bool,
    window: int,
    scale: float,
    config: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V] and lse [B, T, H]; zeros and -inf for queries that see no key."""
    if log_decay is not None:
        sees = starts, ends, cu_seqlens, window
        return forgetting.Work(q, k, v, log_decay, *sees, scale, config["block"]).forward()
    values = v.shape[3]
    q, k, v = _padded(q, k, v)
    work = _Work(q, k, starts, ends, cu_seqlens, causal, window, config["block"])
    if work.few:
        hide, blind = work.mask_of_few()
        y, lse = fused.forward(q, k, v, hide, False, scale)
        y, lse = y.masked_fill(blind[..., None], 0), lse.masked_fill(blind, -torch.inf)
    elif (alone := work.alone()) is not None:
        y, lse = _one_call(q, k[:, alone.keys], v[:, alone.keys], alone.kind == "causal", scale)
    else:
        y = torch.zeros_like(q, memory_format=torch.contiguous_format)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=state_dtype(q.dtype))
        for b, (rows, keys, kind, again), mask in work:
            y_part, lse_part = fused.forward(q[b, rows], k[b, keys], v[b, keys], mask, kind == "causal", scale)
            if again:
                y_part, lse_part = fused.merge(y[b, rows], lse[b, rows], y_part, lse_part)
            y[b, rows], lse[b, rows] = y_part, lse_part
    return y[..., :values].contiguous(), lse.contiguous()


def backward(
    dy: Tensor | None,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    ends: Tensor | None,
    log_decay: Tensor | None,
    y: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    *,
    causal: bool,
    window: int,
    scale: float,
    needs: tuple[bool, ...],
    config: Mapping[str, int],
) -> tuple[Tensor | None, ...]:
    """dq, dk, dv and dlog_decay, each None where `needs` says so."""
    assert dlse is None, "lse has no gradient"
    dy = torch.zeros_like(y) if dy is None else dy
    if log_decay is not None:
        sees = starts, ends, cu_seqlens, window
        found = forgetting.Work(q, k, v, log_decay, *sees, scale, config["block"]).backward(dy, y, lse)
        *gradients, dlog_decay = (g if needed else None for g, needed in zip(found, (*needs[:3], needs[5])))
        return (*gradients, None, None, dlog_decay)
    widths = q.shape[3], k.shape[3], v.shape[3]
    q, k, v, y, dy = _padded(q, k, v, y, dy)
    work = _Work(q, k, starts, ends, cu_seqlens, causal, window, config["block"])
    if work.few:
        hide, blind = work.mask_of_few()
        # p of a blind query is exp(-inf - lse): not a number unless lse is one
        dq, dk, dv = fused.backward(dy, q, k, v, y, lse.masked_fill(blind, 0), hide, False, scale)
        dq = dq.masked_fill(blind[..., None], 0)
    elif (alone := work.alone()) is not None and alone.keys == slice(0, k.shape[1]):
        dq, dk, dv = fused.backward(dy, q, k, v, y, lse, None, alone.kind == "causal", scale)
    else:
        # pieces that overlap are added up in the state dtype
        dtype = state_dtype(q.dtype) if work.overlaps() else q.dtype
        dq, dk, dv = (torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (q, k, v))
        for b, (rows, keys, kind, _), mask in work:
            of_queries = dy[b, rows], q[b, rows], k[b, keys], v[b, keys], y[b, rows], lse[b, rows]
            parts = fused.backward(*of_queries, mask, kind == "causal", scale)
            for whole, part, where in zip((dq, dk, dv), parts, (rows, keys, keys)):
                whole[b, where] += part
    of_sequences = (g[..., :w].to(q.dtype).contiguous() for g, w in zip((dq, dk, dv), widths))
    return (*(g if needed else None for g, needed in zip(of_sequences, needs)), None, None, None)


class Piece(NamedTuple):
    """Some queries of a sequence with some of its keys. kind: "full", "causal" (square) or "band" (masked).

    again: an earlier piece has the same queries.
    """

    queries: slice
    keys: slice
    kind: str
    again: bool = False

    def shifted(self, queries: int, keys: int) -> Piece:
        rows = slice(self.queries.start + queries, self.queries.stop + queries)
        return Piece(rows, slice(self.keys.start + keys, self.keys.stop + keys), self.kind, self.again)


def pieces(queries: int, keys: int, causal: bool, window: int, block: int) -> list[Piece]:
    """The pieces of a sequence whose queries stand at its last keys; a query that sees no key is in none."""
    before = keys - queries
    if window and not (causal and window >= keys):
        return list(_band(queries, keys, causal, window, block))
    first = max(-before, 0) if causal else 0
    rows = slice(first, queries)
    if first >= queries or keys == 0:
        return []
    if not causal or queries - first == 1:
        return [Piece(rows, slice(0, keys), "full")]
    square = Piece(rows, slice(max(before, 0), keys), "causal", again=before > 0)
    return [Piece(rows, slice(0, before), "full"), square] if before > 0 else [square]


def _band(queries: int, keys: int, causal: bool, window: int, block: int) -> Iterator[Piece]:
    before, ahead = keys - queries, 0 if causal else window - 1
    for start in range(max(-before - ahead, 0), queries, block):
        end = min(start + block, queries)
        first, last = max(before + start - window + 1, 0), min(before + end + ahead, keys)
        if first < last:
            yield Piece(slice(start, end), slice(first, last), "full" if end - start == 1 else "band")


class _Work:
    """A problem's pieces, which it iterates over: (batch, piece, mask)."""

    def __init__(
        self, q: Tensor, k: Tensor, starts: Tensor | None, ends: Tensor | None, cu_seqlens: Tensor | None,
        causal: bool, window: int, block: int,
    ) -> None:  # fmt: skip
        self.q, self.k, self.causal, self.window, self.block = q, k, causal, window, block
        self.spans = starts, ends, cu_seqlens
        self._pieces: dict[tuple[int, int], list[Piece]] = {}
        self._masks: dict[tuple[int, int, int], Tensor] = {}
        given = cu_seqlens is None and (starts is not None or ends is not None)
        maybe = given and q.shape[1] <= FEW
        self.few = maybe and q.device.type != "cpu"
        self.segments = [] if self.few else spans.segments(q, k, starts, ends, cu_seqlens)
        self.few = self.few or (maybe and len(self.segments) > 1)

    def __iter__(self) -> Iterator[tuple[slice, Piece, Tensor | None]]:
        for segment in self.segments:
            for piece in self.pieces(segment):
                mask = self._mask(segment, piece) if piece.kind == "band" else None
                yield segment.batch, piece.shifted(segment.queries.start, segment.keys.start), mask

    def pieces(self, segment: Segment) -> list[Piece]:
        """Their queries and keys counted from the segment's first."""
        sizes = segment.queries.stop - segment.queries.start, segment.keys.stop - segment.keys.start
        if sizes not in self._pieces:
            self._pieces[sizes] = pieces(*sizes, self.causal, self.window, self.block)
        return self._pieces[sizes]

    def alone(self) -> Piece | None:
        """The piece that does everything without a mask, if there is one; its keys are rows of k."""
        found = self.pieces(self.segments[0]) if len(self.segments) == 1 else []
        if len(found) != 1 or found[0].kind == "band" or found[0].queries != slice(0, self.q.shape[1]):
            return None
        return found[0].shifted(0, self.segments[0].keys.start)

    def overlaps(self) -> bool:
        """May two pieces share queries or keys? Sequences with keys of their own do not, if one piece does each."""
        given = self.spans[0] is not None or self.spans[1] is not None
        return (given and self.spans[2] is not None) or any(len(self.pieces(s)) > 1 for s in self.segments)

    def mask_of_few(self) -> tuple[Tensor, Tensor]:
        """[B, 1, T, S] for all queries and keys, and which queries see no key: [B, T, 1]."""
        sight = Sight.of(self.q, self.k, *self.spans, causal=self.causal, window=self.window)
        visible = sight.visible(slice(None), 0, self.k.shape[1])
        return self._additive(~visible[:, None]), ~visible.any(-1)[..., None]

    def _mask(self, segment: Segment, piece: Piece) -> Tensor:
        """[1, 1, queries, keys]. Blocks in the middle of a sequence share one."""
        queries, keys = piece.queries.stop - piece.queries.start, piece.keys.stop - piece.keys.start
        ahead = segment.queries.stop - segment.queries.start - piece.queries.start
        position = segment.keys.stop - segment.keys.start - ahead - piece.keys.start
        if (queries, keys, position) not in self._masks:
            rows = torch.arange(position, position + queries, device=self.q.device)
            distance = rows[:, None] - torch.arange(keys, device=self.q.device)
            hidden = distance.abs() >= self.window
            if self.causal:
                hidden = hidden | (distance < 0)
            self._masks[queries, keys, position] = self._additive(hidden[None, None])
        return self._masks[queries, keys, position]

    def _additive(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden, dtype=self.q.dtype).masked_fill_(hidden, -torch.inf)


def _one_call(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """All in one call. Of one query a sequence, the heads of a group are as good as queries, and keys are read once."""
    groups = k.shape[2]
    if q.shape[1] > 1 or q.shape[2] == groups:
        return fused.forward(q, k, v, None, causal, scale)
    y, lse = fused.forward(q[:, 0].unflatten(1, (groups, -1)).transpose(1, 2), k, v, None, False, scale)
    return y.transpose(1, 2).flatten(1, 2)[:, None], lse.transpose(1, 2).flatten(1, 2)[:, None]


def _padded(*tensors: Tensor) -> tuple[Tensor, ...]:
    """All with heads of one width that the kernels take, by columns of zeros."""
    width = fused.width(max(x.shape[3] for x in tensors), tensors[0].device)
    return tuple(x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3])) for x in tensors)
