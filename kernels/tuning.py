"""Tunes ops: draws the tensors of a problem, checks and times every candidate, and keeps the records.

    with recording() as met:
        model(x)[0].sum().backward()
    tune_problems(met, seconds=10)

From then on, `backend="auto"` goes by what was measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch

import autotune
from autotune.check import Failure
from autotune.record import candidate as recorded_as
from autotune.search import Candidate, search, trusted
from kernels import ahead
from kernels.catalogue import OPS
from kernels.comparison import Comparison
from kernels.op import Backend, Config, Op
from kernels.problem import Problem
from kernels.trial import Trials

# Called with what is done and what there is to do, in problems, and what comes next.
Progress = Callable[[float, int, str], None]
# Likewise within one problem, in steps.
Steps = Callable[[int, int, str], None]

# What the loop may take of the seconds, to find out at which length it is compared with.
LOOP_SHARE = 0.3
# What getting a candidate ready (generating code) may cost.
STARTUP_SHARE = 0.5
# What compiling kernels for a GPU side by side may take of all problems' seconds, before anything is measured.
AHEAD_SHARE = 0.5
# What torch.compile takes to generate and build code for a CPU.
INDUCTOR_SECONDS = 40.0


def tune(
    op: Op,
    problem: Problem,
    *,
    seconds: float = 10.0,
    store: autotune.Store | None = None,
    progress: Steps | None = None,
    retime: bool = False,
    defaults: bool = False,
    isolate: bool | None = None,
    memory: int | None = None,
) -> list[autotune.Record]:
    """Checks and times the op's candidates for a problem, and returns the new records; see `autotune.search.search`.

    A candidate is timed only if its results agree with the loop in float64 (see `kernels.agreement`). Where the loop
    would take too long or too much memory at the problem's length, both run at a shorter one for the comparison, and
    the records' messages say so; see `kernels.comparison`.

    seconds: about how long it may take; candidates that say that they need longer to get ready (a backend module's
    `startup(problem, config)`, in seconds) are left for a longer search. store: where records go, by default the user's
    table. retime: measure again what is on record. defaults: only the first config of each backend. isolate: whether
    candidates that could take this process down are tried in another one first, see `kernels.trial`. memory: bytes that
    a candidate may allocate there, by default most of what the device has. To start that process comes on top of the
    seconds.
    """
    with Trials(isolate, memory) as trials:
        return _tune(op, problem, seconds, store, progress, retime, defaults, trials)


def _tune(
    op: Op,
    problem: Problem,
    seconds: float,
    store: autotune.Store | None,
    progress: Steps | None,
    retime: bool,
    defaults: bool,
    trials: Trials,
) -> list[autotune.Record]:
    start = time.perf_counter()
    key, offered, source = op.key(problem), op.candidates(problem), op.source(problem.device.type)
    comparison = Comparison(op, problem, seconds=LOOP_SHARE * seconds, by=trials.safe(op, problem))
    note = partial(_noted, comparison=comparison)
    candidates = [
        Candidate(backend.name, config, partial(comparison.prepare, backend, config))
        for backend, config in offered
        if startup(backend, problem, config) <= STARTUP_SHARE * seconds
        and (config == backend.configs(problem)[0] or not defaults)
    ]

    apart = {backend.name: backend for backend, _ in offered if trials.needed(op, backend, problem)}
    known = trusted(key, source, store) if apart else set()

    def trial(candidate: Candidate, left: float) -> Failure | None:
        backend = apart.get(candidate.backend)
        if backend is None or candidate.name in known:
            return None
        return trials.run(comparison, backend, candidate.config, left, startup(backend, problem, candidate.config))

    with torch.no_grad():
        made = search(
            key,
            candidates,
            comparison.reference,
            comparison.agree,
            source=source,
            seconds=max(seconds - (time.perf_counter() - start), 0.0),
            store=_NotingStore(store or autotune.user_store(key.device), note),
            progress=progress,
            retime=retime,
            trial=trial,
            device=problem.device,
            # a process that is started once for all problems is not what this one's seconds are for
            clock=lambda: time.perf_counter() - trials.starting,
        )
    return [replace(record, message=note(record)) for record in made]


def tune_problems(
    problems: Iterable[Problem],
    *,
    seconds: float = 60.0,
    store: autotune.Store | None = None,
    progress: Progress | None = None,
    retime: bool = False,
    isolate: bool | None = None,
    memory: int | None = None,
) -> dict[Problem, list[autotune.Record]]:
    """Tunes several problems, the most expensive first, each with an equal share of the seconds that are left: first
    the default config of every backend for all of them, then, in the time that is left, the other configs.

    Problems that share a key (see `Op.key`: lengths are rounded up to powers of two) are tuned once, at the longest.
    Each problem's records are saved as they are made: interrupted and called again, it continues. isolate, memory: see
    `tune`.

    On a GPU the candidates' Triton kernels are compiled first, in as many processes as there are cores (see
    `kernels.ahead`): in up to half of the seconds, of which they are a part. What is not ready by then, and everything
    where that would be less than 10 seconds, is compiled when it is checked.
    """
    deadline = time.perf_counter() + seconds
    todo: dict[autotune.Key, Problem] = {}
    for problem in sorted(problems, key=_expense, reverse=True):
        todo.setdefault(OPS[problem.op].key(problem), problem)
    made: dict[Problem, list[autotune.Record]] = {problem: [] for problem in todo.values()}
    # what is measured again is measured once
    passes = (False,) if retime else (True, False)
    steps = len(passes) * len(todo)
    _compile_ahead(list(made), AHEAD_SHARE * seconds, store, progress, retime)
    with Trials(isolate, memory) as trials:
        for number, (defaults, problem) in enumerate((d, p) for d in passes for p in made):
            left = max(deadline + trials.starting - time.perf_counter(), 0.0) / (steps - number)
            told = _part(progress, number / len(passes), len(made), len(passes), problem)
            made[problem] += _tune(OPS[problem.op], problem, left, store, told, retime, defaults, trials)
    if progress:
        progress(len(made), len(made), "done")
    return made


def _compile_ahead(
    problems: Sequence[Problem], seconds: float, store: autotune.Store | None, progress: Progress | None, retime: bool
) -> None:
    """Compiles what the problems' candidates launch that are to be measured."""
    on_gpu = [problem for problem in problems if problem.device.type == "cuda"]
    if not on_gpu or seconds < ahead.LEAST:
        return
    device = OPS[on_gpu[0].op].key(on_gpu[0]).device
    rows = [] if retime else (store or autotune.user_store(device)).read()
    work = []
    for problem in on_gpu:
        op = OPS[problem.op]
        key = op.key(problem)
        known = {row.candidate for row in rows if row.key == key and row.source == op.source(problem.device.type)}
        # only ours: others' kernels are launched in ways of their own
        todo = [(b, config) for b, config in op.candidates(problem) if hasattr(b.loaded, "compile_for")]
        todo = [(b, config) for b, config in todo if recorded_as(b.name, config) not in known]
        first = {b.name: b.configs(problem)[0] for b, _ in todo}
        todo.sort(key=lambda each: each[1] != first[each[0].name])
        if todo:
            configs = tuple((b.name, config) for b, config in todo)
            work.append(ahead.Candidates(problem, ahead.target_of(problem.device), configs))

    def told(done: int, count: int) -> None:
        if progress is not None:
            progress(0.0, len(problems), f"compiling kernels: {done} of {count}")

    # one candidate is as soon compiled here
    if sum(len(each.configs) for each in work) > 1:
        ahead.compile_ahead(work, seconds=seconds, progress=told)


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


def _noted(record: autotune.Record, comparison: Comparison) -> str:
    """The record's message, with the length of the comparison where that is not the problem's."""
    if comparison.whole:
        return record.message
    return "; ".join(filter(None, [record.message, f"compared with the loop at T = {comparison.length}"]))


class _NotingStore(autotune.Store):
    """A store that adds to every record's message what there is to note."""

    def __init__(self, store: autotune.Store, note: Callable[[autotune.Record], str]) -> None:
        super().__init__(store.path)
        self.note = note

    def append(self, record: autotune.Record) -> None:
        super().append(replace(record, message=self.note(record)))
