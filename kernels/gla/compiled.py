"""Gated linear attention in chunks of plain torch: the algebra of chunk.py, and the states between chunks.

    S_c = diag(total_c) S_{c-1} + X_c   over chunks c, and for the gradient the same against time

On CPU a few chunks at a time are worked on, so that what they need stays in the cache, and everything runs as it is.
Elsewhere all chunks are worked on at once and the states between them are a scan of log T steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.gla import chunk as algebra
from kernels.gla import naive
from kernels.packing import Packing
from kernels.problem import Problem, state_dtype


def configs(problem: Problem) -> Sequence[Mapping[str, int]]:
    """chunk: rows of a chunk. rows: how many, over all sequences and heads, are worked on at a time; 0: all."""
    if problem.device.type == "cpu":
        return [{"chunk": 64, "rows": 4096}, {"chunk": 32, "rows": 4096}]
    return [{"chunk": 64, "rows": 0}, {"chunk": 32, "rows": 0}]


@dataclass
class Rows:
    """Rows [B, T, H, ...] in chunks of C; packed sequences are cut into chunks of their own, one batch of them all.

    index [n C]: the row that each row of the chunks is, `real` whether it is one; back [T]: the inverse. first [n]:
    does a sequence begin with the chunk? owner [n]: which; last [N]: the last chunk of each.
    """

    batch: int
    heads: int
    length: int
    chunk: int
    count: int
    packing: Packing
    index: Tensor | None = None
    real: Tensor | None = None
    back: Tensor | None = None
    first: Tensor | None = None
    owner: Tensor | None = None
    last: Tensor | None = None

    @staticmethod
    def of(x: Tensor, cu_seqlens: Tensor | None, chunk: int) -> Rows:
        batch, length, heads = x.shape[:3]
        packing = Packing.of(x, cu_seqlens, False)
        longest = length if cu_seqlens is None else -(-length // packing.sequences)
        chunk = min(chunk, 1 << (longest - 1).bit_length())
        if packing.cu_seqlens is None or packing.owner is None:
            return Rows(batch, heads, length, chunk, -(-length // chunk), packing)
        # of no use to read how many chunks there are: as many as there could be, the rest is empty
        count, bounds = length // chunk + packing.sequences, packing.cu_seqlens
        ends = ((bounds.diff() + chunk - 1) // chunk).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        number = torch.arange(count, device=x.device)
        owner = torch.searchsorted(ends, number, right=True).clamp(max=packing.sequences - 1)
        row = (bounds[owner] + (number - starts[owner]) * chunk)[:, None] + torch.arange(chunk, device=x.device)
        real = row < bounds[owner + 1][:, None]
        step = torch.arange(length, device=x.device) - bounds[packing.owner]
        back = starts[packing.owner] * chunk + step
        index = row.clamp(max=length - 1).flatten()
        first, last = (number == starts[owner]) & (number < ends[-1]), (ends - 1).clamp(min=0)
        return Rows(batch, heads, length, chunk, count, packing, index, real.flatten(), back, first, owner, last)

    def cut(self, x: Tensor) -> Tensor:
        """Sequences as [B, T, H, ...] whose chunks belong to one sequence each."""
        if self.index is None or self.real is None:
            return x
        return torch.where(self.packing.spread(self.real, x), x[:, self.index], 0)

    def joined(self, x: Tensor) -> Tensor:
        """The inverse."""
        return x if self.back is None else x[:, self.back]

    def empty(self, like: Tensor) -> Tensor:
        length = self.length if self.index is None else self.index.shape[0]
        return like.new_empty((like.shape[0], length, *like.shape[2:]))

    def read(self, x: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """[G, C, ...] of chunks `start` to `stop`, zeros after the last row."""
        rows = x[:, start * self.chunk : stop * self.chunk]
        shape = (stop - start, self.batch, self.heads, self.chunk, x.shape[3])
        if rows.shape[1] == (stop - start) * self.chunk:
            out = x.new_empty(shape, dtype=dtype)
            out.copy_(rows.unflatten(1, (stop - start, self.chunk)).permute(1, 0, 3, 2, 4))
        else:
            out = x.new_zeros(shape, dtype=dtype)
            whole = rows.shape[1] // self.chunk
            body, tail = rows[:, : whole * self.chunk], rows[:, whole * self.chunk :]
            out[:whole].copy_(body.unflatten(1, (whole, self.chunk)).permute(1, 0, 3, 2, 4))
            out[whole, :, :, : tail.shape[1]].copy_(tail.transpose(1, 2))
        return out.flatten(0, 2)

    def write(self, x: Tensor, chunks: Tensor, start: int, stop: int, scale: float = 1.0) -> None:
        """The inverse: into the rows of x, times a number."""
        rows = x[:, start * self.chunk : stop * self.chunk]
        values = chunks.view(stop - start, self.batch, self.heads, self.chunk, -1)
        whole = rows.shape[1] // self.chunk
        body = rows[:, : whole * self.chunk].unflatten(1, (whole, self.chunk)).permute(1, 0, 3, 2, 4)
        torch.mul(values[:whole], scale, out=body)
        if whole < stop - start:
            tail = rows[:, whole * self.chunk :].transpose(1, 2)
            torch.mul(values[whole, :, :, : tail.shape[2]], scale, out=tail)


class States:
    """The state that enters each chunk, along or against time.

    given [N, H, K, V]: those that enter the sequences (against time the gradients of the final ones); found: those that
    leave them. An empty sequence keeps what was given.
    """

    def __init__(self, rows: Rows, given: Tensor, reverse: bool) -> None:
        self.rows, self.given, self.reverse = rows, given, reverse
        self.found = given.clone()
        # of packed sequences the first chunk in time replaces it
        self.running = given.flatten(0, 1) if rows.index is None else given[0]
        if rows.owner is not None and rows.first is not None and rows.last is not None:
            self.enters, self.leaves = (
                rows.first,
                torch.arange(rows.count, device=given.device) == rows.last[rows.owner],
            )
            if reverse:
                self.enters, self.leaves = self.leaves, self.enters
            if given.device.type == "cpu":
                self.marks = list(zip(rows.owner.tolist(), self.enters.tolist(), self.leaves.tolist()))

    def step(self, total: Tensor | None, X: Tensor, start: int, stop: int) -> Tensor:
        """[G, K, V] for chunks `start` to `stop` with total [G, J] and X [G, K, V]."""
        X = X.unflatten(0, (stop - start, -1))
        total = None if total is None else total.unflatten(0, (stop - start, -1))[..., None]
        entering, state, packed = torch.empty_like(X), self.running, self.rows.index is not None
        for c in range(stop - start)[:: -1 if self.reverse else 1]:
            owner, enters, leaves = self.marks[start + c] if packed else (0, False, False)
            entering[c] = self.given[owner] if enters else state
            state = X[c].add_(entering[c] if total is None else total[c] * entering[c])
            if leaves:
                self.found[owner] = state
        self.running = state
        if not packed:
            self.found = state.view(self.given.shape)
        return entering.flatten(0, 1)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    config: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V], final_state [N, H, K, V])"""
    dtype = state_dtype(q.dtype)
    rows = Rows.of(q, cu_seqlens, config["chunk"])
    initial = _given(initial_state, q, v, rows)
    if rows.length == 1 and cu_seqlens is None:
        decay = None if log_decay is None else log_decay[:, 0]
        final_state, y = naive.step(initial, q[:, 0].to(dtype), k[:, 0].to(dtype), v[:, 0].to(dtype), decay, bonus)
        return (scale * y[:, None]).to(v.dtype), final_state
    q, k, v, log_decay = rows.cut(q), rows.cut(k), rows.cut(v), None if log_decay is None else rows.cut(log_decay)
    y, states = torch.empty_like(v, memory_format=torch.contiguous_format), States(rows, initial, False)
    for start, stop in _parts(rows, config):
        q_, k_, v_ = (rows.read(x, start, stop, dtype) for x in (q, k, v))
        decay = None if log_decay is None else rows.read(log_decay, start, stop, dtype)
        bonuses = None if bonus is None else _per_chunk(bonus, rows, start, stop)
        chunks = algebra.pairs(q_, k_, decay, bonuses, False)
        k_after, q_before = algebra.times(k_, chunks.after), algebra.times(q_, chunks.before)
        S = states.step(chunks.total, torch.bmm(k_after.transpose(1, 2), v_), start, stop)
        rows.write(y, torch.bmm(chunks.A, v_).baddbmm_(q_before, S), start, stop, scale)
    return rows.joined(y), states.found


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    needs: tuple[bool, ...],
    config: Mapping[str, int],
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dlog_decay, dinitial_state, dbonus), each None where `needs` says so."""
    dtype = state_dtype(q.dtype)
    rows = Rows.of(q, cu_seqlens, config["chunk"])
    initial = _given(initial_state, q, v, rows)
    dfinal = torch.zeros_like(initial) if dfinal_state is None else dfinal_state
    dy = torch.zeros_like(v) if dy is None else dy
    q, k, v, dy = (rows.cut(x) for x in (q, k, v, dy))
    log_decay = None if log_decay is None else rows.cut(log_decay)
    like = (q, k, v, log_decay)
    out = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else None
        for x, need in zip(like, needs)
    ]
    states, entered = States(rows, initial, False), {}
    for start, stop in _parts(rows, config):
        k_, v_ = rows.read(k, start, stop, dtype), rows.read(v, start, stop, dtype)
        decay = None if log_decay is None else rows.read(log_decay, start, stop, dtype)
        X, total = algebra.summary(k_, v_, decay)
        entered[start] = states.step(total, X, start, stop)
    dstates, dbonus = States(rows, dfinal, True), None
    for start, stop in reversed(_parts(rows, config)):
        dy_, q_, k_, v_ = (rows.read(x, start, stop, dtype) for x in (dy, q, k, v))
        decay = None if log_decay is None else rows.read(log_decay, start, stop, dtype)
        bonuses = None if bonus is None else _per_chunk(bonus, rows, start, stop)
        dy_.mul_(scale)
        chunks = algebra.pairs(q_, k_, decay, bonuses, True)
        X = torch.bmm(algebra.times(q_, chunks.before).transpose(1, 2), dy_)
        dS = dstates.step(chunks.total, X, start, stop)
        *found, db = algebra.gradients(dy_, q_, k_, v_, decay, bonuses, chunks, entered.pop(start), dS)
        for x, gradient in zip(out, found):
            if x is not None and gradient is not None:
                rows.write(x, gradient, start, stop)
        if db is not None and needs[5]:
            db = db.sum(1).unflatten(0, (-1, rows.heads)).sum(0)
            dbonus = db if dbonus is None else dbonus + db
    dinitial = dstates.found if needs[4] and initial_state is not None else None
    return (*[None if x is None else rows.joined(x) for x in out], dinitial, dbonus)


def _given(state: Tensor | None, q: Tensor, v: Tensor, rows: Rows) -> Tensor:
    shape = (rows.packing.sequences, q.shape[2], q.shape[3], v.shape[3])
    return q.new_zeros(shape, dtype=state_dtype(q.dtype)) if state is None else state


def _parts(rows: Rows, config: Mapping[str, int]) -> list[tuple[int, int]]:
    """The chunks that are worked on at a time."""
    number = max(1, config["rows"] // (rows.chunk * rows.batch * rows.heads)) if config["rows"] else rows.count
    return [(start, min(start + number, rows.count)) for start in range(0, rows.count, number)]


def _per_chunk(bonus: Tensor, rows: Rows, start: int, stop: int) -> Tensor:
    """[H, K] as [G, 1, K]"""
    return bonus.repeat((stop - start) * rows.batch, 1)[:, None]
