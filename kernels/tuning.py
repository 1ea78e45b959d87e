"""Tunes ops: draws the tensors of a problem, checks and times every candidate, and keeps the records.

    with recording() as met:
        model(x)[0].sum().backward()
    tune_problems(met, seconds=10)

From then on, `backend="auto"` goes by what was measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch

import autotune
from autotune.search import Candidate, search
from kernels.agreement import Expected, Inputs, draw
from kernels.catalogue import OPS
from kernels.op import Backend, Config, Op
from kernels.problem import Problem

# Called with what is done and what there is to do, in problems, and what comes next.
Progress = Callable[[float, int, str], None]
# Likewise within one problem, in steps.
Steps = Callable[[int, int, str], None]

# What the loop may cost in a check: this share of the seconds, and so many bytes and flops of the perfect
# implementation in float64. Its own memory is about ten times those bytes, or a number for every eight flops.
LOOP_SHARE = 0.3
LOOP_BYTES = 2**29
LOOP_FLOPS = 2**33
# What getting a candidate ready (generating code) may cost.
STARTUP_SHARE = 0.5
# What torch.compile takes to generate and build code for a CPU.
INDUCTOR_SECONDS = 40.0
# The loop's seconds per step are measured on this many.
TRIAL_STEPS = 64
# Shorter checks end in the middle of a chunk of any size: their length is 37 above a multiple of 64.
TAIL, MULTIPLE, SHORTEST = 37, 64, 101


def tune(
    op: Op,
    problem: Problem,
    *,
    seconds: float = 10.0,
    store: autotune.Store | None = None,
    progress: Steps | None = None,
    retime: bool = False,
    defaults: bool = False,
) -> list[autotune.Record]:
    """Checks and times the op's candidates for a problem, and returns the new records; see `autotune.search.search`.

    A candidate is timed only if its results agree with the loop in float64 (see `kernels.agreement`). Where the loop
    would take too long or too much memory at the problem's length, both run at a shorter one with a tail for the
    comparison; the records' messages say so.

    seconds: about how long it may take; candidates that say that they need longer to get ready (a backend module's
    `startup(problem, config)`, in seconds) are left for a longer search. store: where records go, by default the user's
    table. retime: measure again what is on record. defaults: only the first config of each backend.
    """
    start = time.perf_counter()
    trial = _Trial(op, problem, LOOP_SHARE * seconds)
    store = store or autotune.user_store(op.key(problem).device)
    candidates = [
        Candidate(backend.name, config, partial(trial.prepare, backend, config))
        for backend, config in op.candidates(problem)
        if startup(backend, problem, config) <= STARTUP_SHARE * seconds
        and (config == backend.configs(problem)[0] or not defaults)
    ]
    with torch.no_grad():
        made = search(
            op.key(problem),
            candidates,
            trial.reference,
            trial.agree,
            source=op.source,
            seconds=max(seconds - (time.perf_counter() - start), 0.0),
            store=_NotingStore(store, trial.note),
            progress=progress,
            retime=retime,
        )
    return [replace(record, message=trial.note(record)) for record in made]


def tune_problems(
    problems: Iterable[Problem],
    *,
    seconds: float = 60.0,
    store: autotune.Store | None = None,
    progress: Progress | None = None,
    retime: bool = False,
) -> dict[Problem, list[autotune.Record]]:
    """Tunes several problems, the most expensive first, each with an equal share of the seconds that are left: first
    the default config of every backend for all of them, then, in the time that is left, the other configs.

    Problems that share a key (see `Op.key`: lengths are rounded up to powers of two) are tuned once, at the longest.
    Each problem's records are saved as they are made: interrupted and called again, it continues.
    """
    deadline = time.perf_counter() + seconds
    todo: dict[autotune.Key, Problem] = {}
    for problem in sorted(problems, key=_expense, reverse=True):
        todo.setdefault(OPS[problem.op].key(problem), problem)
    made: dict[Problem, list[autotune.Record]] = {problem: [] for problem in todo.values()}
    # what is measured again is measured once
    passes = (False,) if retime else (True, False)
    steps = len(passes) * len(todo)
    for number, (defaults, problem) in enumerate((d, p) for d in passes for p in made):
        left = max(deadline - time.perf_counter(), 0.0) / (steps - number)
        made[problem] += tune(
            OPS[problem.op],
            problem,
            seconds=left,
            store=store,
            progress=_part(progress, number / len(passes), len(made), len(passes), problem),
            retime=retime,
            defaults=defaults,
        )
    if progress:
        progress(len(made), len(made), "done")
    return made


def startup(backend: Backend, problem: Problem, config: Config) -> float:
    """Seconds until the first call returns, as the backend estimates them: the time to generate code."""
    estimate = getattr(backend.loaded, "startup", None)
    if estimate is not None:
        return estimate(problem, config)
    return INDUCTOR_SECONDS if config.get("inductor") and problem.device.type == "cpu" else 0.0


def _expense(problem: Problem) -> tuple[int, int]:
    cost = OPS[problem.op].cost(problem)
    return cost.bytes, cost.flops


def _part(progress: Progress | None, before: float, count: int, passes: int, problem: Problem) -> Steps | None:
    if progress is None:
        return None
    what = f"{problem.op} {problem.direction}"
    return lambda done, total, step: progress(before + done / total / passes, count, f"{what}: {step}")


class _Trial:
    """The tensors of one problem, made when first asked for, and the comparison with the loop."""

    def __init__(self, op: Op, problem: Problem, loop_seconds: float) -> None:
        self.op, self.problem, self.loop_seconds = op, problem, loop_seconds

    @cached_property
    def length(self) -> int:
        """The length of the comparison."""
        return checked_length(self.op, self.problem, self.loop_seconds)

    @cached_property
    def checked(self) -> Inputs:
        return draw(self.op, _shortened(self.problem, self.length))

    @cached_property
    def timed(self) -> Inputs:
        whole = self.length == self.problem.sizes["T"]
        return self.checked if whole else draw(self.op, self.problem, by="auto")

    def reference(self) -> Expected:
        return Expected.of(self.checked)

    def prepare(self, backend: Backend, config: Config) -> Callable[[], Any]:
        run = self.timed.call(backend, config)
        if self.checked is self.timed:
            return run
        short = self.checked.call(backend, config)()
        return lambda: (short, run())

    def agree(self, outputs: Any, expected: Expected) -> str | None:
        if self.checked is self.timed:
            return expected.difference(outputs)
        short, whole = outputs
        wrong = expected.difference(short)
        if wrong is None:
            for arg, tensor in zip(expected.results, whole):
                if tensor is not None and not bool(tensor.isfinite().all()):
                    return f"{arg.name} is not finite"
        return wrong

    def note(self, record: autotune.Record) -> str:
        if self.length == self.problem.sizes["T"]:
            return record.message
        return f"{record.message}{'; ' if record.message else ''}compared with the loop at T = {self.length}"


class _NotingStore(autotune.Store):
    """A store that adds to every record's message what the trial has to say."""

    def __init__(self, store: autotune.Store, note: Callable[[autotune.Record], str]) -> None:
        super().__init__(store.path)
        self.note = note

    def append(self, record: autotune.Record) -> None:
        super().append(replace(record, message=self.note(record)))


def checked_length(op: Op, problem: Problem, seconds: float) -> int:
    """The longest length, up to the problem's own, at which the loop in float64 and in the problem's dtypes fits."""
    whole = problem.sizes["T"]
    wide = replace(problem, dtypes=dict.fromkeys(problem.dtypes, torch.float64))
    longest = whole
    while longest > SHORTEST and not fits(op, _shortened(wide, longest)):
        longest //= 2
    if whole > 2 * SHORTEST:
        inputs = draw(op, _shortened(problem, TRIAL_STEPS))
        start = time.perf_counter()
        Expected.of(inputs)
        # backward's residuals come from one more run of the loop
        steps = TRIAL_STEPS * seconds / (time.perf_counter() - start) / (1 if problem.direction == "forward" else 1.5)
        longest = min(longest, int(steps))
    if longest >= whole:
        return whole
    return max((longest - TAIL) // MULTIPLE * MULTIPLE + TAIL, SHORTEST)


def fits(op: Op, problem: Problem) -> bool:
    """Whether the loop may run the problem: it keeps what it computes at every step."""
    cost = op.cost(problem)
    return cost.bytes <= LOOP_BYTES and cost.flops <= LOOP_FLOPS


def _shortened(problem: Problem, length: int) -> Problem:
    """The problem at another length T; where there are more rows S of keys than T, as many more."""
    sizes = {**problem.sizes, "T": length}
    if "S" in sizes:
        sizes["S"] += length - problem.sizes["T"]
    return replace(problem, sizes=sizes)
