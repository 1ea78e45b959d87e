"""Gated linear attention in chunks of plain torch: the algebra of chunk.py, and the states between chunks.

    S_c = diag(total_c) S_{c-1} + X_c   over chunks c, and for the gradient the same against time

On CPU a few chunks at a time are worked on, so that what they need stays in the cache, and everything runs as it is.
Elsewhere all chunks are worked on at once and the states between them are a scan of log T steps, which may be code that
Inductor generates (kernels/scan/compiled.py): one graph for all lengths. The algebra inside a chunk stays as it is. Its
halves of halves, written in place, make a graph for every number of chunks, and over a minute of compilation each.
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
from kernels.scan import compiled as scan


def configs(problem: Problem) -> Sequence[Mapping[str, int]]:
    """chunk: rows of a chunk. rows: how many, over all sequences and heads, are worked on at a time; 0: all. inductor:
    whether the scan over the states between chunks is generated code."""
    if problem.device.type == "cpu":
        return [{"chunk": 32, "rows": 8192}, {"chunk": 64, "rows": 8192}, {"chunk": 16, "rows": 0}]
    eager = [{"chunk": 64, "rows": 0}, {"chunk": 32, "rows": 0}]
    return [*eager, *({**config, "inductor": 1} for config in eager)]


@dataclass
class Rows:
    """Rows [B, T, H, ...] in chunks of C; packed sequences are cut into chunks of their own, one batch of them all.

    index [n C]: the row that each row of the chunks is, `real` whether it is one; back [T]: the inverse. first [n]:
    does a sequence begin with the chunk? owner [n]: which; starts, last [N]: the first and the last chunk of each.
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
    starts: Tensor | None = None
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
        starts = starts.clamp(max=count - 1)
        return Rows(
            batch, heads, length, chunk, count, packing, index, real.flatten(), back, first, owner, starts, last
        )

    def cut(self, x: Tensor) -> Tensor:
        """Sequences as [B, T, H, ...] whose chunks belong to one sequence each."""
        if self.index is None or self.real is None:
            return x
        return torch.where(self.packing.spread(self.real, x), x[:, self.index], 0)

    def joined(self, x: Tensor) -> Tensor:
        """The inverse."""
        return x if self.back is None else x[:, self.back]

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

    def __init__(self, rows: Rows, given: Tensor, reverse: bool, config: Mapping[str, int]) -> None:
        self.rows, self.given, self.reverse, self.at_once = rows, given, reverse, not config["rows"]
        self.config = {"chunk": 16, "inductor": config.get("inductor", 0)}
        self.found = given.clone()
        # of packed sequences the first chunk in time replaces it
        self.running = given.flatten(0, 1) if rows.index is None else given[0]
        if rows.owner is not None and rows.first is not None and rows.last is not None:
            last = torch.arange(rows.count, device=given.device) == rows.last[rows.owner]
            self.enters, self.leaves = (last, rows.first) if reverse else (rows.first, last)
            if not self.at_once:
                self.marks = list(zip(rows.owner.tolist(), self.enters.tolist(), self.leaves.tolist()))

    def step(self, a: Tensor, b: Tensor, total: Tensor | None, start: int, stop: int) -> Tensor:
        """[G, K, V] for chunks `start` to `stop` which do S -> diag(total) S + aᵀ b; a, b [G, C, ...], total [G, J]."""
        if self.at_once:
            return self._scan(torch.bmm(a.transpose(1, 2), b), total)
        count = stop - start
        at, b = a.transpose(1, 2).unflatten(0, (count, -1)), b.unflatten(0, (count, -1))
        total = None if total is None else total.unflatten(0, (count, -1))[..., None]
        packed = self.rows.index is not None
        entering = a.new_empty((count, *self.running.shape))
        # the state that leaves a chunk is written where the one that enters the next will be
        entering[-1 if self.reverse else 0] = self.running
        for c in range(count)[:: -1 if self.reverse else 1]:
            owner, enters, leaves = self.marks[start + c] if packed else (0, False, False)
            state, following = entering[c], c - 1 if self.reverse else c + 1
            if enters:
                state.copy_(self.given[owner])
            after = entering[following] if 0 <= following < count else torch.empty_like(state)
            if total is None:
                torch.baddbmm(state, at[c], b[c], out=after)
            else:
                torch.mul(total[c], state, out=after)
                after.baddbmm_(at[c], b[c])
            self.running = after
            if leaves:
                self.found[owner] = after
        if not packed:
            self.found = self.running.view(self.given.shape)
        return entering.flatten(0, 1)

    def _scan(self, X: Tensor, total: Tensor | None) -> Tensor:
        """All chunks at once: a scan over the chunks, without a loop that grows with T."""
        rows, given = self.rows, self.given
        X = X.unflatten(0, (rows.count, -1))
        A = torch.ones_like(X) if total is None else total.view(*X.shape[:2], -1, 1).expand_as(X).contiguous()
        inputs, first = X, None
        if rows.owner is not None:
            # a sequence's first chunk forgets what came before and remembers what was given to it instead
            enters, at_start = self.enters[:, None, None, None], given[rows.owner]
            inputs, first = torch.where(enters, A * at_start + X, X), self.enters[None, :, None]
        entering, last = scan.states(
            A.flatten(1)[None], inputs.flatten(1)[None], self.running.flatten()[None], False, self.reverse,
            self.config, first,
        )  # fmt: skip
        entering = entering[0].view(X.shape)
        if rows.owner is None or rows.last is None:
            self.found = last.view(given.shape)
            return entering.flatten(0, 1)
        entering = torch.where(enters, at_start, entering)
        leaving = A * entering + X
        index = rows.starts if self.reverse else rows.last
        self.found = rows.packing.unless_empty(leaving[index], given)
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
    if q.shape[1] == 1 and cu_seqlens is None:
        initial = _given(initial_state, q, v, q.shape[0])
        decay = None if log_decay is None else log_decay[:, 0]
        final_state, row = naive.step(initial, q[:, 0].to(dtype), k[:, 0].to(dtype), v[:, 0].to(dtype), decay, bonus)
        return (scale * row[:, None]).to(v.dtype).contiguous(), final_state
    problem = _Problem(q, k, v, log_decay, bonus, cu_seqlens, config)
    rows = problem.rows
    v, initial = problem.v, _given(initial_state, q, v, rows.packing.sequences)
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    states = States(rows, initial, False, config)
    for start, stop in problem.parts():
        q_, k_, v_ = (rows.read(x, start, stop, dtype) for x in (problem.q, problem.k, v))
        chunks = problem.chunks(q_, k_, start, stop, False)
        S = states.step(chunks.k_after, v_, chunks.total, start, stop)
        rows.write(y, torch.bmm(chunks.A, v_).baddbmm_(chunks.q_before, S), start, stop, scale)
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
    problem = _Problem(q, k, v, log_decay, bonus, cu_seqlens, config)
    rows = problem.rows
    initial = _given(initial_state, q, v, rows.packing.sequences)
    dy = rows.cut(torch.zeros_like(v) if dy is None else dy)
    q, k, v, log_decay = problem.q, problem.k, problem.v, problem.log_decay
    out = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need and x is not None else None
        for x, need in zip((q, k, v, log_decay), needs)
    ]
    states, entered = States(rows, initial, False, config), {}
    for start, stop in problem.parts():
        k_, v_ = rows.read(k, start, stop, dtype), rows.read(v, start, stop, dtype)
        entered[start] = states.step(*problem.summary(k_, start, stop, v_), start, stop)
    dstates = States(rows, torch.zeros_like(initial) if dfinal_state is None else dfinal_state, True, config)
    dbonus = None
    for start, stop in reversed(problem.parts()):
        dy_, q_, k_, v_ = (rows.read(x, start, stop, dtype) for x in (dy, q, k, v))
        dy_.mul_(scale)
        chunks = problem.chunks(q_, k_, start, stop, True)
        dS = dstates.step(chunks.q_before, dy_, chunks.total, start, stop)
        repeated = problem.bonuses(start, stop)
        *found, db = algebra.gradients(dy_, q_, k_, v_, repeated, chunks, entered.pop(start), dS)
        for x, gradient in zip(out, found):
            if x is not None and gradient is not None:
                rows.write(x, gradient, start, stop)
        if db is not None and needs[5]:
            db = db.sum(1).unflatten(0, (-1, rows.heads)).sum(0)
            dbonus = db if dbonus is None else dbonus + db
    dinitial = dstates.found if needs[4] and initial_state is not None else None
    return (*[None if x is None else rows.joined(x) for x in out], dinitial, dbonus)


class _Problem:
    """The inputs, cut into chunks."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, bonus: Tensor | None,
        cu_seqlens: Tensor | None, config: Mapping[str, int],
    ) -> None:  # fmt: skip
        self.rows = rows = Rows.of(q, cu_seqlens, config["chunk"])
        self.q, self.k, self.v, self.bonus, self.config = rows.cut(q), rows.cut(k), rows.cut(v), bonus, config
        self.log_decay = None if log_decay is None else rows.cut(log_decay)
        self.factors: algebra.Factors | None = None
        if self.log_decay is not None and self.log_decay.shape[3] == 1:
            # so few numbers that they are made for all chunks at once
            read = rows.read(self.log_decay, 0, rows.count, self.log_decay.dtype)
            self.factors = algebra.Factors.of(read, bonus is not None)

    def parts(self) -> list[tuple[int, int]]:
        """The chunks that are worked on at a time."""
        rows, number = self.rows, self.rows.count
        if self.config["rows"]:
            number = max(1, self.config["rows"] // (rows.chunk * rows.batch * rows.heads))
        return [(start, min(start + number, rows.count)) for start in range(0, rows.count, number)]

    def bonuses(self, start: int, stop: int) -> Tensor | None:
        """[H, K] as [G, 1, K]"""
        return None if self.bonus is None else self.bonus.repeat((stop - start) * self.rows.batch, 1)[:, None]

    def _factors(self, start: int, stop: int) -> algebra.Factors | None:
        each = self.rows.batch * self.rows.heads
        return None if self.factors is None else self.factors.part(start * each, stop * each)

    def chunks(self, q: Tensor, k: Tensor, start: int, stop: int, keep: bool) -> algebra.Chunks:
        bonus = self.bonuses(start, stop)
        if self.log_decay is None or self.factors is not None:
            return algebra.shared(q, k, self._factors(start, stop), bonus)
        return algebra.per_key(q, k, self.rows.read(self.log_decay, start, stop, q.dtype), bonus, keep)

    def summary(self, k: Tensor, start: int, stop: int, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """k ∘ after, v and total: what the chunks do to the state."""
        factors = self._factors(start, stop)
        if self.log_decay is None:
            return k, v, None
        if factors is not None:
            return k * factors.after, v, factors.total
        k, total = algebra.summary(k, self.rows.read(self.log_decay, start, stop, k.dtype))
        return k, v, total


def _given(state: Tensor | None, q: Tensor, v: Tensor, sequences: int) -> Tensor:
    shape = (sequences, q.shape[2], q.shape[3], v.shape[3])
    return q.new_zeros(shape, dtype=state_dtype(q.dtype)) if state is None else state
