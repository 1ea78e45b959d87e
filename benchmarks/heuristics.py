"""What trusting the rule costs against measuring: `python benchmarks/heuristics.py`. Exit code 1 if a limit is missed.

For every op, direction, dtype and length of the benchmarks' grid: what the rule chooses where nothing is measured, and
what the tuner chooses (with a fresh table, in a share of the time). Then the candidates that the tuner had no time for
are checked too, and all that are right are timed again in one interleaved run; the two choices are compared with the
fastest of that run. Not timed again are candidates that were never found right, for want of time or because they
failed, and those of which three calls would not fit in the time: the lines and the end say how many. "Fastest" is of
the others.

On a GPU (`--device cuda`) the rule is the configs that were predicted for one like it, where there are any, and no
candidate is tried in another process first: starting one takes longer than timing all of them.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from sizes import accelerated, sizes_of

import autotune
from autotune.device import synchronizer
from autotune.measure import TRIES, Interleaved
from autotune.record import Candidate, candidate
from autotune.search import GIVE_UP
from kernels.agreement import draw, pose
from kernels.catalogue import OPS
from kernels.op import Op, Plan
from kernels.problem import Problem
from kernels.tuning import tune

LENGTHS, DTYPES = (1, 512, 4096), ("float32", "bfloat16")
# There, lengths that predictions were made for, and one sequence where all of them would take longest to draw
ACCELERATED_LENGTHS, ACCELERATED_DTYPES, LONGEST_BATCH = (512, 4096, 32768), ("bfloat16", "float32"), 4096
ROUNDS = 9
# The shares of a problem's time that the tuner, the check of what it left and the timing afterwards get; the rest is
# for drawing tensors
TUNING, CHECKING, AGAIN = 0.4, 0.25, 0.25
# A call to warm up, and the rounds before a slow one is given up.
CALLS = 1 + TRIES
# Over the fastest: the rule's geometric mean and worst, the tuner's geometric mean
LIMITS = (1.25, 2.0, 1.05)


@dataclass(frozen=True)
class Cost:
    """One problem; rule, tuned: their times over the fastest candidate's, which is `best`, in seconds.

    offered: how many candidates can run it; untimed: how many of them were not timed again; failed: how many of these
    raised or gave something wrong.
    """

    problem: Problem
    rule: float
    tuned: float
    best: float
    names: tuple[str, str, str]
    offered: int
    untimed: int
    failed: int

    def __str__(self) -> str:
        rule, tuned, best = self.names
        what = f"{self.problem.op} {self.problem.direction} {self.problem.dtype_name} T={self.problem.sizes['T']}"
        chosen = f"rule {self.rule:5.2f} × ({rule}), tuned {self.tuned:5.2f} × ({tuned})"
        left = f"; {self.untimed} of {self.offered} not timed" if self.untimed else ""
        return f"{what:45} {chosen} of {1e3 * self.best:.3g} ms ({best}){left}"


def grid(
    ops: Sequence[str], lengths: Sequence[int], dtypes: Sequence[str], device: torch.device
) -> list[tuple[Op, Problem]]:
    """The ops take turns, so that a run that ends early has seen all of them."""
    found = []
    for length, dtype, direction, name in itertools.product(lengths, dtypes, ("forward", "backward"), ops):
        op, sizes = OPS[name], sizes_of(OPS[name], length, device)
        if accelerated(device) and length > LONGEST_BATCH:
            sizes |= {"B": 1, "N": 1}
        found.append((op, pose(op, direction, sizes, dtype=getattr(torch, dtype), device=device)))
    return found


def by_rule(op: Op, problem: Problem) -> Plan:
    """What runs where nothing was measured: what was predicted, else what the op's order says."""
    plan = op.choose(problem)
    if plan.origin in ("predicted", "rule"):
        return plan
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return op.choose(problem)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def cost(op: Op, problem: Problem, seconds: float, store: autotune.Store) -> Cost | None:
    """None where the time was too short for the tuner to learn anything."""
    rule = by_rule(op, problem)
    apart = False if accelerated(problem.device) else None
    tune(op, problem, seconds=TUNING * seconds, store=store, isolate=apart)
    if not _timed(op, problem):
        return None
    tuned = op.choose(problem)
    # continues with what it had no time for
    tune(op, problem, seconds=CHECKING * seconds, store=store, isolate=apart)
    known, offered = _timed(op, problem), op.candidates(problem)
    named = {candidate(plan.backend.name, plan.config): (plan.backend, plan.config) for plan in (rule, tuned)}
    for backend, config in offered:
        name = candidate(backend.name, config)
        if name in known and CALLS * known[name] <= AGAIN * seconds:
            named.setdefault(name, (backend, config))
    inputs = draw(op, problem, by="auto")
    with torch.no_grad():
        calls = [inputs.call(backend, config) for backend, config in named.values()]
        run = Interleaved(calls, give_up=GIVE_UP, synchronize=synchronizer(problem.device))
        run.warm_up()
        run.rounds(ROUNDS, AGAIN * seconds)
    times = {name: timing.median for name, timing in zip(named, run.timings) if timing.rounds}
    best = min(times, key=times.__getitem__, default=None)
    first, second = (candidate(plan.backend.name, plan.config) for plan in (rule, tuned))
    if best is None or first not in times or second not in times:
        return None
    names = tuple(" ".join([name, *(f"{k}={v}" for k, v in config)]) for name, config in (first, second, best))
    failed = {
        record.candidate
        for record, _, _ in autotune.listing(op.key(problem), op.source(problem.device.type))
        if record.failed
    }
    return Cost(
        problem,
        times[first] / times[best],
        times[second] / times[best],
        times[best],
        names,  # type: ignore[arg-type]
        len(offered),
        len(offered) - len(times),
        len(failed - set(times)),
    )


def _timed(op: Op, problem: Problem) -> dict[Candidate, float]:
    """Seconds of every candidate that was found right, by its newest record."""
    oldest_first = reversed(autotune.listing(op.key(problem), op.source(problem.device.type)))
    return {record.candidate: record.times[0] for record, _, _ in oldest_first if record.status == "ok"}


def warm_up(problems: Sequence[tuple[Op, Problem]]) -> None:
    """Compiles what is compiled on first use, which takes as long as it takes."""
    for op, problem in problems:
        short = replace(problem, sizes={name: 2 if name in "TS" else size for name, size in problem.sizes.items()})
        plan = by_rule(op, short)
        with torch.no_grad():
            draw(op, short).call(plan.backend, plan.config)()


def costs(problems: Sequence[tuple[Op, Problem]], seconds: float) -> Iterator[Cost]:
    deadline = time.perf_counter() + seconds
    with tempfile.TemporaryDirectory() as folder, autotune.using(Path(folder) / "tuned.jsonl") as store:
        for number, (op, problem) in enumerate(problems):
            left = deadline - time.perf_counter()
            if left <= 0:
                print(f"the time is over: {len(problems) - number} of {len(problems)} problems were left out")
                return
            found = cost(op, problem, left / (len(problems) - number), store)
            if found is None:
                print(f"{problem}: too little time to learn anything")
            else:
                yield found


def summary(found: Sequence[Cost]) -> list[tuple[str, float, float | None]]:
    """(what, value, limit) for the rule and the tuner."""
    rule, tuned = [each.rule for each in found], [each.tuned for each in found]
    return [
        ("untuned, geometric mean", geometric_mean(rule), LIMITS[0]),
        ("untuned, worst", max(rule), LIMITS[1]),
        ("tuned, geometric mean", geometric_mean(tuned), LIMITS[2]),
        ("tuned, worst", max(tuned), None),
        ("what the rule costs against measuring, geometric mean", geometric_mean(rule) / geometric_mean(tuned), None),
    ]


def geometric_mean(values: Iterable[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.5)
    parser.add_argument("--op", action="append", choices=list(OPS), help="repeat it; by default all")
    parser.add_argument(
        "--length", action="append", type=int, help=f"repeat it; by default {LENGTHS}, on a GPU {ACCELERATED_LENGTHS}"
    )
    parser.add_argument("--dtype", action="append", help=f"repeat it; by default {DTYPES}")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    given = parser.parse_args()
    lengths, dtypes = (ACCELERATED_LENGTHS, ACCELERATED_DTYPES) if accelerated(given.device) else (LENGTHS, DTYPES)
    problems = grid(given.op or list(OPS), given.length or lengths, given.dtype or dtypes, given.device)
    print(f"{autotune.fingerprint(given.device)}, torch {torch.__version__}, {len(problems)} problems")
    warm_up(problems)
    found = []
    for each in costs(problems, 60 * given.minutes):
        found.append(each)
        print(each, flush=True)
    if not found:
        print("nothing was measured; give more --minutes")
        return 1
    offered, untimed, failed = (sum(getattr(each, name) for each in found) for name in ("offered", "untimed", "failed"))
    print(
        f"{offered - untimed} of {offered} candidates were timed again, {failed} raised or gave something wrong, "
        f"and for {untimed - failed} there was no time"
    )
    missed = False
    for what, value, limit in summary(found):
        held = limit is None or value <= limit
        missed |= not held
        verdict = "" if limit is None else f" of {limit:.2f}: {'ok' if held else 'MISSED'}"
        print(f"{what}: {value:.3f} ×{verdict}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
