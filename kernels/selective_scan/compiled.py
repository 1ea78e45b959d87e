"""The selective scan in plain PyTorch under torch.compile, for every device that Inductor knows.

Time is cut into parts of so many rows, one after the other: the decays and inputs [B, rows, D, K] of one part exist at
a time, and its states are `kernels.scan`'s of D K columns. The backward pass keeps the state before every part and
makes the others again. Where there is no compiler, and by default on CPU, the functions run as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import inductor
from kernels.packing import Packing
from kernels.problem import Problem, state_dtype
from kernels.scan import compiled as scan


def configs(problem: Problem) -> Sequence[Mapping[str, int]]:
    """rows: of a part. chunk: the scan's. inductor: whether the functions are compiled."""
    if problem.device.type == "cpu":
        eager = [{"rows": 64, "chunk": 8, "inductor": 0}]
        return eager if inductor.reason("cpu") else [*eager, {"rows": 64, "chunk": 4, "inductor": 1}]
    return [{"rows": 256, "chunk": 16, "inductor": 1}, {"rows": 64, "chunk": 8, "inductor": 1}]


def opened(x: Tensor, delta: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The scan's decays exp(Δ A) and inputs Δ x B of a part, [B, rows, D, K]."""
    return torch.exp(delta[..., None] * A), (delta * x)[..., None] * B[:, :, None]


def closed(h: Tensor, x: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """y [B, rows, D] of a part's states."""
    return (h * C[:, :, None]).sum(-1) + D * x


def gradients(
    dy: Tensor, g: Tensor, da: Tensor, a: Tensor, h: Tensor, x: Tensor, delta: Tensor, B: Tensor, A: Tensor, D: Tensor
) -> tuple[Tensor, ...]:
    """(dx, ddelta, dB, dC, dA, dD) of a part, from the gradients g of the scan's inputs and da of its decays."""
    dinput, dexponent = (g * B[:, :, None]).sum(-1), da * a
    dx, ddelta = delta * dinput + D * dy, x * dinput + (dexponent * A).sum(-1)
    dB, dC = (g * (delta * x)[..., None]).sum(2), (h * dy[..., None]).sum(2)
    return dx, ddelta, dB, dC, (dexponent * delta[..., None]).sum((0, 1)), (x * dy).sum((0, 1))


def forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    config: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    """(y [B, T, D], final_state [N, D, K])"""
    parts = _Parts(x, delta, A, B, C, D, initial_state, cu_seqlens, config)
    final, y = parts.final(), torch.empty_like(x, memory_format=torch.contiguous_format)
    for part, h in parts.states():
        y[:, part.rows] = parts.run(closed, h, part.x, part.of(C), parts.D)
        part.keep_last(final, h)
    return y, parts.packing.unless_empty(final[: parts.packing.sequences], parts.initial).clone()


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    needs: tuple[bool, ...],
    config: Mapping[str, int],
) -> tuple[Tensor | None, ...]:
    """(dx, ddelta, dA, dB, dC, dD, dinitial_state), each None where `needs` says so."""
    parts = _Parts(x, delta, A, B, C, D, initial_state, cu_seqlens, config)
    dfinal = torch.zeros_like(parts.initial) if dfinal_state is None else dfinal_state
    rows = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, delta, B, C)]
    dA, dD, dinitial = torch.zeros_like(A), torch.zeros_like(parts.D), parts.final()
    carried = torch.zeros_like(parts.first) if parts.packed else dfinal
    for part in parts.backwards():
        a, inputs = part.opened()
        h = part.scan(a, inputs)[0]
        given = x.new_zeros(x[:, part.rows].shape) if dy is None else dy[:, part.rows]
        given = given.to(parts.dtype)
        dh = given[..., None] * part.of(C)[:, :, None]
        if part.last is not None:
            # nothing is carried over a border: the gradient of each final state enters with its last row's own
            dh = dh + torch.where(part.last, part.owned(dfinal), 0)
        da, g, carried = part.scan_backward(dh, carried, a, h)
        if part.first is not None:
            da = torch.where(part.first, g * part.owned(parts.initial), da)
            part.keep(dinitial, part.first, a * g)
        found = parts.run(gradients, given, g, da, a, h, part.x, part.delta, part.of(B), parts.A, parts.D)
        for whole, one in zip(rows, found):
            whole[:, part.rows] = one
        dA, dD = dA + found[4], dD + found[5]
    if not parts.packed:
        dinitial = carried
    dstate = parts.packing.unless_empty(dinitial[: parts.packing.sequences], dfinal).clone()
    dx, ddelta, dB, dC = rows
    like = (x, delta, A, B, C, D, initial_state)
    return tuple(
        g if needed and t is not None else None
        for g, t, needed in zip((dx, ddelta, dA, dB, dC, dD, dstate), like, needs)
    )


class _Parts:
    """A problem in the state dtype, part by part."""

    def __init__(
        self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
        initial_state: Tensor | None, cu_seqlens: Tensor | None, config: Mapping[str, int],
    ) -> None:  # fmt: skip
        self.given, self.A, self.config, self.dtype = (x, delta, B), A, config, state_dtype(x.dtype)
        self.D = torch.zeros_like(A[:, 0]) if D is None else D
        self.packing, self.packed = Packing.of(x, cu_seqlens, False), cu_seqlens is not None
        shape = (self.packing.sequences, *A.shape)
        self.initial = x.new_zeros(shape, dtype=self.dtype) if initial_state is None else initial_state
        # what enters the first part; packed sequences bring their states to their first rows
        self.first = torch.zeros_like(self.initial[:1]) if self.packed else self.initial
        self.borders = (self.packing.first_rows(), self.packing.last_rows()) if self.packed else None

    def final(self) -> Tensor:
        """Room for a state a sequence, and for one that nobody looks at."""
        return self.initial.new_zeros((self.packing.sequences + 1, *self.initial.shape[1:]))

    def part(self, start: int, entering: Tensor) -> _Part:
        return _Part(self, slice(start, min(start + self.config["rows"], self.packing.length)), entering)

    def states(self) -> Iterator[tuple[_Part, Tensor]]:
        """The parts in the order of time, with their states [B, rows, D, K]."""
        entering = self.first
        for start in range(0, self.packing.length, self.config["rows"]):
            part = self.part(start, entering)
            h, entering = part.scan(*part.opened())
            yield part, h

    def backwards(self) -> Iterator[_Part]:
        """The parts against time."""
        kept = [self.first]
        starts = range(0, self.packing.length, self.config["rows"])
        for start in starts[:-1]:
            part = self.part(start, kept[-1])
            kept.append(part.scan(*part.opened())[1])
        return (self.part(start, entering) for start, entering in zip(starts[::-1], kept[::-1]))

    def run(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        return inductor.compiled(function, *tensors) if self.config["inductor"] else function(*tensors)


class _Part:
    """Some rows of a problem, and the state [B, D, K] that enters them."""

    def __init__(self, parts: _Parts, rows: slice, entering: Tensor) -> None:
        self.parts, self.rows, self.entering = parts, rows, entering
        x, delta, _ = parts.given
        self.x, self.delta = self.of(x), self.of(delta)
        self.first = self.last = self.forgets = None
        if parts.borders is not None:
            self.first, self.last = (border[rows].view(1, -1, 1, 1) for border in parts.borders)
            self.forgets = self.first.flatten(2)

    def of(self, sequence: Tensor) -> Tensor:
        return sequence[:, self.rows].to(self.parts.dtype)

    def owned(self, state: Tensor) -> Tensor:
        """[1, rows, D, K]: of each row's sequence."""
        assert self.parts.packing.owner is not None
        return state[self.parts.packing.owner[self.rows]][None]

    def opened(self) -> tuple[Tensor, Tensor]:
        """The scan's decays and inputs; a sequence's first row, which forgets what came before, brings its own."""
        parts = self.parts
        a, inputs = parts.run(opened, self.x, self.delta, self.of(parts.given[2]), parts.A)
        if self.first is None:
            return a, inputs
        return a, inputs + torch.where(self.first, a * self.owned(parts.initial), 0)

    def scan(self, a: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The states [B, rows, D, K] and the one that leaves."""
        h, leaving = scan.chunked(
            a.flatten(2), inputs.flatten(2), self.entering.flatten(1), False, False, self.parts.config, self.forgets
        )
        return h.reshape(a.shape), leaving.reshape(self.entering.shape)

    def scan_backward(self, dh: Tensor, dleaving: Tensor, a: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the scan's decays, inputs and entering state."""
        da, g, dentering = scan.chunked_backward(
            a.flatten(2), dh.flatten(2), h.flatten(2), self.entering.flatten(1), dleaving.flatten(1), False, False,
            self.parts.config, self.forgets,
        )  # fmt: skip
        return da.reshape(a.shape), g.reshape(a.shape), dentering.reshape(self.entering.shape)

    def keep(self, states: Tensor, where: Tensor, rows: Tensor) -> None:
        """Writes states [N + 1, D, K]: what `rows` hold at these borders, to their sequences."""
        owner, nobody = self.parts.packing.owner, states.shape[0] - 1
        assert owner is not None
        states[torch.where(where.flatten(), owner[self.rows], nobody)] = rows[0]

    def keep_last(self, final: Tensor, h: Tensor) -> None:
        """Writes the states of the sequences that end in these rows."""
        if self.last is not None:
            self.keep(final, self.last, h)
        elif self.rows.stop == self.parts.packing.length:
            final[:-1] = h[:, -1]
