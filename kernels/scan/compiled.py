"""The scan in chunks of plain PyTorch under torch.compile, for every device that Inductor knows.

Time is cut into chunks of C rows. Two small functions do everything, each one generated kernel:

    summary   what a chunk does to the state that enters it:  state -> A state + X
    outputs   the rows of every chunk, given the state that enters it

and the states between chunks are the scan of the summaries (A, X): the same problem, C times shorter. So there are
2 log_C(T) launches, all of them parallel over chunks, and 5/3 of the least bytes. Both functions are compiled once for
all lengths. Where there is no compiler, and by default on CPU, where generating the code takes Inductor longer than
most programs would gain, they run as they are.

`first` [1, T, 1, ...] marks the rows that forget the state before them, if any do: by a choice, not by a decay of zero,
so that what is not finite in one packed sequence does not reach the next. Of chunks, those that have such a row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import inductor
from kernels.packing import Packing
from kernels.problem import Problem, state_dtype
from kernels.scan.pairs import conjugate, multiply, ones


def configs(problem: Problem) -> Sequence[Mapping[str, int]]:
    if problem.device.type == "cpu":
        eager = [{"chunk": 16, "inductor": 0}]
        return eager if inductor.reason("cpu") else [*eager, {"chunk": 4, "inductor": 1}]
    return [{"chunk": 16, "inductor": 1}, {"chunk": 8, "inductor": 1}, {"chunk": 32, "inductor": 1}]


def unless(first: Tensor | None, carried: Tensor) -> Tensor:
    """What some rows [B, n, D] have of the state before them: `carried`, which is overwritten."""
    return carried if first is None else carried.masked_fill_(first, 0)


def marks_of(first: Tensor | None, chunk: int) -> Sequence[Tensor | None]:
    """`first` [1, n, C, ...] row by row."""
    return [None] * chunk if first is None else first.unbind(2)


def summary(a: Tensor, x: Tensor, first: Tensor | None = None, *, pairs: bool, reverse: bool) -> tuple[Tensor, Tensor]:
    """A, X [B, n, D] of chunks a, x [B, n, C, D]: A = product of a, X = the chunk's last state from zero."""
    order = range(a.shape[2])[:: -1 if reverse else 1]
    dtype = state_dtype(x.dtype)
    a_rows, x_rows = [row.to(dtype) for row in a.unbind(2)], [row.to(dtype) for row in x.unbind(2)]
    marks = marks_of(first, a.shape[2])
    A, X = a_rows[order[0]], x_rows[order[0]]
    for c in order[1:]:
        A, X = multiply(a_rows[c], A, pairs), unless(marks[c], multiply(a_rows[c], X, pairs)) + x_rows[c]
    return A, X


def outputs(
    a: Tensor, x: Tensor, entering: Tensor, first: Tensor | None = None, *, pairs: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """h [B, n, C, D] in x's dtype, and the state [B, n, D] that leaves each chunk."""
    order = range(a.shape[2])[:: -1 if reverse else 1]
    a_rows, x_rows, marks = a.unbind(2), x.unbind(2), marks_of(first, a.shape[2])
    h, state, dtype = [], entering, entering.dtype
    for c in order:
        state = unless(marks[c], multiply(a_rows[c].to(dtype), state, pairs)) + x_rows[c].to(dtype)
        h.append(state.to(x.dtype))
    return torch.stack(h[:: order.step], 2), state


def summary_backward(
    a: Tensor, dh: Tensor, first: Tensor | None = None, *, pairs: bool, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The summary of c[t] = conj(a[t]) (dh[t] + c[t+1]), which runs against time."""
    dtype = state_dtype(dh.dtype)
    a_rows, dh_rows, marks = a.unbind(2), dh.unbind(2), marks_of(first, a.shape[2])
    A, X = None, None
    for c in range(a.shape[2])[:: 1 if reverse else -1]:
        decay, gradient = conjugate(a_rows[c].to(dtype), pairs), dh_rows[c].to(dtype)
        A = decay if A is None else multiply(decay, A, pairs)
        X = unless(marks[c], multiply(decay, gradient if X is None else gradient + X, pairs))
    assert A is not None
    assert X is not None
    return A, X


def outputs_backward(
    a: Tensor, dh: Tensor, h: Tensor, before: Tensor, entering: Tensor, first: Tensor | None = None, *,
    pairs: bool, reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """da, dx [B, n, C, D] and c [B, n, D] leaving each chunk; `before`: h before each chunk's first row in time."""
    chunk, dtype = a.shape[2], entering.dtype
    order = range(chunk)[:: 1 if reverse else -1]
    a_rows, dh_rows, h_rows, marks = a.unbind(2), dh.unbind(2), h.unbind(2), marks_of(first, a.shape[2])
    das, dxs, carried, step = [], [], entering, -order.step
    for c in order:
        g = dh_rows[c].to(dtype) + carried
        previous = h_rows[c - step].to(dtype) if 0 <= c - step < chunk else before.to(dtype)
        das.append(multiply(g, conjugate(previous, pairs), pairs).to(a.dtype))
        dxs.append(g.to(h.dtype))
        carried = unless(marks[c], multiply(conjugate(a_rows[c].to(dtype), pairs), g, pairs))
    return torch.stack(das[:: order.step], 2), torch.stack(dxs[:: order.step], 2), carried


def chunks(rows: Tensor, chunk: int, fill: Tensor | float = 0.0) -> Tensor:
    """[B, T, ...] as [B, n, C, ...]; past the end with `fill`, which leaves a state as it is."""
    missing = -rows.shape[1] % chunk
    if missing:
        tail = torch.zeros_like(rows[:, :1]) + fill
        rows = torch.cat([rows, tail.expand(-1, missing, *rows.shape[2:])], 1)
    return rows.unflatten(1, (-1, chunk))


def states(
    A: Tensor, X: Tensor, initial: Tensor, pairs: bool, reverse: bool, config: Mapping[str, int],
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The state that enters each of the chunks with summaries A, X [B, n, D], and the one that leaves the last."""
    n = A.shape[1]
    if n == 1:
        return initial[:, None], (unless(first, multiply(A, initial[:, None], pairs)) + X)[:, 0]
    leaving, final = chunked(A, X, initial, pairs, reverse, config, first)
    if reverse:
        return torch.cat([leaving[:, 1:], initial[:, None]], 1), final
    return torch.cat([initial[:, None], leaving[:, :-1]], 1), final


def chunked(
    a: Tensor, x: Tensor, initial: Tensor, pairs: bool, reverse: bool, config: Mapping[str, int],
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h [B, T, D] in x's dtype and the final state [B, D]."""
    length, chunk = x.shape[1], config["chunk"]
    a, x = chunks(a, chunk, ones(a[:, :1], pairs)), chunks(x, chunk)
    marks = [] if first is None else [chunks(first, chunk, False)]
    entering, final = initial[:, None], None
    if a.shape[1] > 1:
        A, X = _run(summary, config, a, x, *marks, pairs=pairs, reverse=reverse)
        entering, final = states(A, X, initial, pairs, reverse, config, *(mark.any(2) for mark in marks))
    h, leaving = _run(outputs, config, a, x, entering, *marks, pairs=pairs, reverse=reverse)
    return h.flatten(1, 2)[:, :length], leaving[:, 0] if final is None else final


def chunked_backward(
    a: Tensor, dh: Tensor, h: Tensor, initial: Tensor, dfinal: Tensor, pairs: bool, reverse: bool,
    config: Mapping[str, int], first: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """da, dx [B, T, D] and the gradient [B, D] of the initial state. da of marked rows is as if they did not forget."""
    length, chunk, dtype = h.shape[1], config["chunk"], dfinal.dtype
    if first is not None or (reverse and length % chunk):
        # rows before the first are the initial state, which is not rounded to the dtype of sequences; and the gradients
        # of packed sequences' first rows are made from dx
        h = h.to(dtype)
    a_chunks, dh_chunks = chunks(a, chunk, ones(a[:, :1], pairs)), chunks(dh, chunk)
    h_chunks = chunks(h, chunk, initial[:, None].to(h.dtype))
    marks = [] if first is None else [chunks(first, chunk, False)]
    if h_chunks.shape[1] == 1:
        carried = dfinal[:, None]
    else:
        A, X = _run(summary_backward, config, a_chunks, dh_chunks, *marks, pairs=pairs, reverse=reverse)
        carried, _ = states(A, X, dfinal, pairs, not reverse, config, *(mark.any(2) for mark in marks))
    if reverse:
        before = torch.cat([h_chunks[:, 1:, 0].to(initial.dtype), initial[:, None]], 1)
    else:
        before = torch.cat([initial[:, None], h_chunks[:, :-1, -1].to(initial.dtype)], 1)
    da, dx, c = _run(
        outputs_backward, config, a_chunks, dh_chunks, h_chunks, before, carried, *marks, pairs=pairs, reverse=reverse
    )
    return da.flatten(1, 2)[:, :length], dx.flatten(1, 2)[:, :length], c[:, -1 if reverse else 0]


def _run(function: Callable[..., Any], config: Mapping[str, int], *tensors: Tensor, **flags: bool) -> Any:
    return inductor.compiled(function, *tensors, **flags) if config["inductor"] else function(*tensors, **flags)


def forward(
    a: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    reverse: bool,
    config: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    pairs, packing = x.ndim == 4, Packing.of(x, cu_seqlens, reverse)
    initial = packing.given(initial_state, x)
    if cu_seqlens is None:
        h, final = chunked(a, x, initial, pairs, reverse, config)
        return h.contiguous(), final.clone()
    # a sequence's first row forgets what came before and remembers its own initial state instead
    first, dtype = packing.spread(packing.first_rows(), x), initial.dtype
    entering = multiply(a.to(dtype), packing.of_each_row(initial), pairs)
    rows = torch.where(first, x.to(dtype) + entering, x.to(dtype))
    h, _ = chunked(a, rows, torch.zeros_like(initial[:1]), pairs, reverse, config, first)
    return h.to(x.dtype).contiguous(), packing.unless_empty(packing.at_last_rows(h), initial).clone()


def backward(
    dh: Tensor | None,
    dfinal_state: Tensor | None,
    a: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    reverse: bool,
    needs: tuple[bool, ...],
    config: Mapping[str, int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    pairs, packing, dtype = h.ndim == 4, Packing.of(h, cu_seqlens, reverse), h.dtype
    initial, dfinal = packing.given(initial_state, h), packing.given(dfinal_state, h)
    dh = torch.zeros_like(h) if dh is None else dh
    if cu_seqlens is None:
        da, dx, dinitial = chunked_backward(a, dh, h, initial, dfinal, pairs, reverse, config)
    else:
        # nothing is carried over a border: the gradient of each final state enters with its last row's own
        first, last = packing.spread(packing.first_rows(), h), packing.spread(packing.last_rows(), h)
        dh = torch.where(last, dh.to(dfinal.dtype) + packing.of_each_row(dfinal), dh.to(dfinal.dtype))
        nothing = torch.zeros_like(dfinal[:1])
        da, dx, _ = chunked_backward(a, dh, h, nothing, nothing, pairs, reverse, config, first)
        starts = packing.of_each_row(initial)
        da = torch.where(first, multiply(dx, conjugate(starts, pairs), pairs).to(da.dtype), da)
        dinitial = packing.at_first_rows(multiply(conjugate(a.to(dx.dtype), pairs), dx, pairs))
        dinitial = packing.unless_empty(dinitial, dfinal)
    return (
        da.contiguous() if needs[0] else None,
        dx.to(dtype).contiguous() if needs[1] else None,
        dinitial.clone() if needs[2] and initial_state is not None else None,
    )
