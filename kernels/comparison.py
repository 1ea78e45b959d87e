"""The comparison that a candidate has to pass: tensors of its problem, and the loop's results beside its own."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from autotune.check import Prepared
from kernels.agreement import Expected, Inputs, draw
from kernels.op import Backend, Config, Op
from kernels.problem import Problem, size_of, state_dtype

# What the loop may cost in a check: so many bytes and flops of the perfect implementation in float64. Its own memory is
# about ten times those bytes, or a number for every eight flops.
LOOP_BYTES = 2**29
LOOP_FLOPS = 2**33
# The loop's seconds per step are measured on this many.
TRIAL_STEPS = 64
# Shorter checks end in the middle of a chunk of any size: their length is 37 above a multiple of 64.
TAIL, MULTIPLE, SHORTEST = 37, 64, 101
# Beside a comparison at the problem's own length, one at up to this length with such a tail.
LONGEST_TAILED = 4 * MULTIPLE + TAIL


@dataclass(frozen=True)
class Reference:
    """What the loop gives at the shorter length, and at the problem's own for all of its rows, or for the last ones."""

    short: Expected | None
    whole: Expected | None
    last: Expected | None


class Comparison:
    """The tensors of one problem, made when first asked for, and what is compared on them.

    A candidate runs at two lengths. Where the loop can run the problem at its own length, that is one of them; the
    other is shorter and ends in the middle of a chunk of any size, for lengths in between go by the same record. Where
    the loop would take too long or too much memory, the shorter one is as long as it may be, and at the problem's own
    length the results must be finite, and right in the last rows for a problem in which nothing happens before them.

    seconds: how long the loop may take, see `checked_length`; or length: of the longest comparison with it. by: the
    backend that gives a backward pass of the problem's own length its residuals where the loop cannot.
    """

    def __init__(
        self, op: Op, problem: Problem, *, seconds: float = 0.0, length: int | None = None, by: str = "auto"
    ) -> None:
        self.op, self.problem, self.seconds, self.by = op, problem, seconds, by
        self._length = length

    @cached_property
    def length(self) -> int:
        """The longest length of a comparison with the loop."""
        return self._length or checked_length(self.op, self.problem, self.seconds)

    @property
    def whole(self) -> bool:
        """Whether that is the problem's own."""
        return self.length == self.problem.sizes["T"]

    @cached_property
    def timed(self) -> Inputs:
        return draw(self.op, self.problem, by=None if self.whole else self.by)

    @cached_property
    def short(self) -> Inputs | None:
        length = tailed(self.length - 1) if self.whole else self.length
        return draw(self.op, shortened(self.problem, length)) if length else None

    @cached_property
    def last(self) -> tuple[Inputs, Inputs] | None:
        """Some rows, and a problem of the full length that ends in them."""
        if self.whole or not paddable(self.op):
            return None
        rows = from_nothing(self.op, shortened(self.problem, SHORTEST))
        return rows, padded(rows, self.problem)

    def reference(self) -> Reference:
        """Runs the loop."""
        return Reference(
            short=Expected.of(self.short) if self.short else None,
            whole=Expected.of(self.timed) if self.whole else None,
            last=expected_last(self.last[0]) if self.last else None,
        )

    def prepare(self, backend: Backend, config: Config) -> Prepared:
        """The call to be timed, and the results of the shorter problem and of the last rows."""
        run = self.timed.call(backend, config)
        short = self.short and self.short.call(backend, config)()
        last = self.last and last_rows(self.last[1], self.last[1].call(backend, config)())
        return Prepared(run, (short, last))

    def agree(self, whole: Any, others: Any, expected: Reference) -> str | None:
        """None, or what differs."""
        short, last = others
        if expected.whole is not None:
            wrong = expected.whole.difference(whole)
        else:
            args = zip(self.timed.results, whole)
            broken = [arg.name for arg, t in args if t is not None and not bool(t.isfinite().all())]
            wrong = f"{broken[0]} is not finite" if broken else None
        if wrong is None and self.short is not None and expected.short is not None:
            wrong = expected.short.difference(short)
            if wrong is not None and self.whole:
                return f"{wrong} at T = {self.short.problem.sizes['T']}"
        if wrong is None and expected.last is not None:
            wrong = expected.last.difference(last)
            if wrong is not None:
                return f"{wrong} in the last {SHORTEST} of {self.problem.sizes['T']} rows"
        return wrong


def paddable(op: Op) -> bool:
    """Whether rows of nothing before a sequence change nothing: a state of zeros stays one. Keys of zeros are attended
    to."""
    return any(arg.name == "initial_state" for arg in op.inputs)


def from_nothing(op: Op, problem: Problem) -> Inputs:
    """Tensors that pose the problem, with an initial state of zeros where it has one."""
    bare = replace(problem, options={**problem.options, "initial_state": False})
    drawn, tensors = draw(op, bare), []
    for name, tensor in zip(op.names(problem.direction), drawn.tensors):
        if name == "initial_state" and problem.options["initial_state"]:
            arg = next(arg for arg in op.inputs if arg.name == name)
            shape = [size_of(letter, problem.sizes) for letter in arg.letters]
            dtype = state_dtype(drawn.dtype) if arg.role == "state" else drawn.dtype
            tensor = torch.zeros(shape + [2] * problem.options.get("pairs", False), dtype=dtype, device=problem.device)
        tensors.append(tensor)
    return Inputs(op, problem, tuple(tensors), drawn.cu_seqlens)


def padded(inputs: Inputs, problem: Problem) -> Inputs:
    """The inputs as the last rows that the recurrence of a longer problem comes to. Before them the sequences are
    nothing, and the decays are theirs, again and again."""
    op, reverse = inputs.op, problem.options.get("reverse", False)
    short, more = inputs.problem.sizes["T"], problem.sizes["T"] - inputs.problem.sizes["T"]
    args = {arg.name: arg for arg in (*op.inputs, *op.outputs)}
    args |= {f"d{arg.name}": arg for arg in op.outputs}

    def pad(name: str, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or "T" not in args[name].letters:
            return tensor
        before = tensor.new_full((tensor.shape[0], more, *tensor.shape[2:]), args[name].nothing)
        if args[name].role != "sequence":
            before = tensor.repeat(1, -(-more // short), *[1] * (tensor.ndim - 2))[:, :more]
        return torch.cat((tensor, before) if reverse else (before, tensor), 1)

    cu_seqlens = inputs.cu_seqlens
    if cu_seqlens is not None:
        # the first sequence that the recurrence comes to is longer
        cu_seqlens = cu_seqlens.clone()
        cu_seqlens[-1 if reverse else slice(1, None)] += more
    tensors = tuple(pad(*pair) for pair in zip(op.names(problem.direction), inputs.tensors))
    return Inputs(op, problem, tensors, cu_seqlens)


def last_rows(inputs: Inputs, results: Any) -> Any:
    """Of a problem's results the last SHORTEST rows that its recurrence comes to, and what belongs to no row.

    The gradient of the initial state has come through all rows and is left out.
    """
    args = inputs.results
    if not isinstance(results, (tuple, list)) or len(results) != len(args):
        return results
    rows = slice(SHORTEST) if inputs.problem.options.get("reverse") else slice(-SHORTEST, None)
    # copies: a view would keep all rows
    cut = [t[:, rows].clone() if isinstance(t, Tensor) and "T" in arg.letters else t for arg, t in zip(args, results)]
    return tuple(None if arg.name == "dinitial_state" else tensor for arg, tensor in zip(args, cut))


def expected_last(rows: Inputs) -> Expected:
    """What `last_rows` must give."""
    found = Expected.of(rows)
    known = [None if arg.name == "dinitial_state" else exact for arg, exact in zip(found.results, found.exact)]
    return replace(found, exact=tuple(known))


def checked_length(op: Op, problem: Problem, seconds: float) -> int:
    """The longest length, up to the problem's own, at which the loop in float64 and in the problem's dtypes fits."""
    whole = problem.sizes["T"]
    wide = replace(problem, dtypes=dict.fromkeys(problem.dtypes, torch.float64))
    longest = whole
    while longest > SHORTEST and not fits(op, shortened(wide, longest)):
        longest //= 2
    if whole > 2 * SHORTEST:
        inputs = draw(op, shortened(problem, TRIAL_STEPS))
        start = time.perf_counter()
        Expected.of(inputs)
        # backward's residuals come from one more run of the loop
        steps = TRIAL_STEPS * seconds / (time.perf_counter() - start) / (1 if problem.direction == "forward" else 1.5)
        longest = min(longest, int(steps))
    if longest >= whole:
        return whole
    return max((longest - TAIL) // MULTIPLE * MULTIPLE + TAIL, SHORTEST)


def tailed(length: int) -> int:
    """The longest length for a check with a tail, up to `length` and LONGEST_TAILED; 0 if there is none."""
    longest = min(length, LONGEST_TAILED)
    return max((longest - TAIL) // MULTIPLE * MULTIPLE + TAIL, min(longest, TAIL))


def fits(op: Op, problem: Problem) -> bool:
    """Whether the loop may run the problem: it keeps what it computes at every step."""
    cost = op.cost(problem)
    return cost.bytes <= LOOP_BYTES and cost.flops <= LOOP_FLOPS


def shortened(problem: Problem, length: int) -> Problem:
    """The problem at another length T; where there are more rows S of keys than T, as many more."""
    sizes = {**problem.sizes, "T": length}
    if "S" in sizes:
        sizes["S"] += length - problem.sizes["T"]
    return replace(problem, sizes=sizes)
