"""Puts the configs of compiled kernels in order for a GPU that is not there: compiled, pruned, and sorted by a rule.

    records = predict(problems, "sm_90", folder)

A config is left out if a kernel of it spills registers or does not fit a multiprocessor, or does not compile. Of the
rest the first is the one that, in this order,

1. needs the fewest launches, where sequences are too short to be worth more than one (see LONG);
2. needs the least time, summed over its launches: to move its bytes over the share of the multiprocessors that have a
   program, as half a card moves half as much, and no less than for the steps that wait for a load one after the other;
3. needs the least time to move its bytes, where those steps take longer;
4. needs the fewest launches;
5. is simplest: it comes first in the backend's own list.

No constant in it is fitted to a measurement, and nobody has measured whether it is right: such a record has the status
"predicted", and counts for a problem only where nothing was measured.
"""

from __future__ import annotations

import functools
import importlib.util
import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import autotune
from kernels.cards import LATENCY, LONG, Card, card
from kernels.catalogue import OPS
from kernels.op import Config, Op
from kernels.problem import Problem

if TYPE_CHECKING:
    from kernels.triton_aot import Compiled

# Called with what is compiled and what there is to compile
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Estimate:
    """One config of one backend for one problem on one card. error: why it does not compile, else ""."""

    backend: str
    config: Config
    kernels: tuple[Compiled, ...]
    error: str = ""

    @property
    def fault(self) -> str:
        """Why it is left out, or ""."""
        for kernel in self.kernels:
            if kernel.spills:
                return f"{kernel.kernel} spills {kernel.spills} bytes a thread"
            if not kernel.occupancy:
                return f"{kernel.kernel} needs {kernel.shared} bytes of shared memory, which does not fit"
        return self.error

    @property
    def launches(self) -> int:
        return len(self.kernels)

    @property
    def bytes(self) -> int:
        """Of all tensors that its launches are given; what several programs read, the cache has."""
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def programs(self) -> int:
        """Of the launch that moves most."""
        return max(self.kernels, key=lambda kernel: kernel.bytes).programs

    def seconds(self, card: Card) -> float:
        """No launch is faster than the share of the card that has a program moves its bytes, or than its steps."""
        return sum(max(s, LATENCY * kernel.steps) for s, kernel in zip(self.moving(card), self.kernels))

    def moving(self, card: Card) -> list[float]:
        """Seconds in which the share of the card that has a program moves a launch's bytes."""
        shares = [min(1.0, max(kernel.programs, 1) / card.multiprocessors) for kernel in self.kernels]
        return [kernel.bytes / (share * card.bandwidth) for kernel, share in zip(self.kernels, shares)]

    def __str__(self) -> str:
        return " ".join([self.backend, *(f"{name}={value}" for name, value in self.config.items())])


def order(estimates: Sequence[Estimate], card: Card, length: int) -> list[Estimate]:
    """Those that are not left out, the first by the rule first; length: of a sequence."""

    def place(estimate: Estimate) -> tuple[float, ...]:
        first = estimate.launches if length < LONG else 0
        return first, estimate.seconds(card), sum(estimate.moving(card)), estimate.launches

    return sorted((estimate for estimate in estimates if not estimate.fault), key=place)


def estimates(op: Op, problem: Problem, target: str) -> list[Estimate]:
    """Every config of every backend of the op that compiles for a target, simplest first."""
    found = []
    for backend in op.backends:
        compile_for = getattr(backend.loaded, "compile_for", None)
        if compile_for is None or backend.cannot(problem):
            continue
        for config in backend.configs(problem):
            try:
                found.append(Estimate(backend.name, config, tuple(compile_for(target, problem, config))))
            except Exception as error:
                found.append(Estimate(backend.name, config, (), f"does not compile: {type(error).__name__}: {error}"))
    return found


def predict(
    problems: Iterable[Problem], target: str, folder: Path, *, processes: int = 1, progress: Progress | None = None
) -> list[autotune.Record]:
    """A record for each problem of which any config is left; problems that share a key are one.

    folder: for what was compiled, which is not compiled again while the kernels' sources are the same: interrupted and
    called again, it continues. processes: that compile side by side.

    Raises:
        ValueError: no such target. RuntimeError: Triton is not installed.
    """
    where, known = card(target), on_gpu(problems)
    compile_all(known, target, folder, processes=processes, progress=progress)
    made: dict[autotune.Key, autotune.Record] = {}
    with autotune.pretend("cuda", where.fingerprint), _aot().remembering(folder):
        for problem in known:
            op = OPS[problem.op]
            key = op.key(problem)
            if key not in made and (record := _record(op, problem, key, where)) is not None:
                made[key] = record
    return list(made.values())


def on_gpu(problems: Iterable[Problem]) -> list[Problem]:
    """The same problems on a GPU, without repetitions."""
    return list(dict.fromkeys(replace(problem, device=torch.device("cuda")) for problem in problems))


def _record(op: Op, problem: Problem, key: autotune.Key, card: Card) -> autotune.Record | None:
    found = estimates(op, problem, card.target)
    length = problem.sizes["B"] * problem.sizes["T"] // problem.sizes.get("N", problem.sizes["B"])
    kept = order(found, card, length)
    if not kept:
        return None
    first = kept[0]
    # The driver's version and torch's are nobody's here
    return replace(
        autotune.Record.made_here(
            key, first.backend, first.config, "predicted", "cpu", message=_message(found, kept, card)
        ),
        source=op.compiled_source,
        torch="",
        threads=0,
        predicted={
            "programs": first.programs,
            "launches": first.launches,
            "bytes": first.bytes,
            "least": op.cost(problem).bytes,
        },
    )


def _message(found: Sequence[Estimate], kept: Sequence[Estimate], card: Card) -> str:
    first = kept[0]
    launches = "1 launch" if first.launches == 1 else f"{first.launches} launches"
    said = f"{first.programs:,} programs on {card.multiprocessors} multiprocessors, {first.bytes:,} bytes, {launches}"
    if len(kept) > 1:
        said += f"; then {', '.join(str(other) for other in kept[1:])}"
    left = [f"{estimate} ({estimate.fault})" for estimate in found if estimate.fault]
    return f"{said}; left out: {', '.join(left)}" if left else said


def compile_all(
    problems: Sequence[Problem], target: str, folder: Path, *, processes: int = 1, progress: Progress | None = None
) -> None:
    """Compiles, side by side, what the problems launch: one problem for each kind of kernel. In processes of their own,
    which a compiler that crashes takes with it."""
    card(target)
    _aot()
    one_each = list({_kind(problem): problem for problem in reversed(problems)}.values())
    if processes <= 1:
        for done, problem in enumerate(one_each):
            _tell(progress, done, len(one_each))
            _compile(target, folder, problem)
    else:
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
            work = [pool.submit(_compile, target, folder, problem) for problem in one_each]
            for done, each in enumerate(as_completed(work)):
                each.result()
                _tell(progress, done, len(one_each))
    _tell(progress, len(one_each), len(one_each))


def _kind(problem: Problem) -> tuple[Any, ...]:
    """Problems of one kind launch the same kernels: sizes only matter by what divides them, and where they are few."""
    kinds = {
        name: size if size < 512 and name != "H" else 1 if size == 1 else 16 if size % 16 == 0 else 0
        for name, size in problem.sizes.items()
        if name not in ("B", "N", "T")
    }
    options = tuple(sorted((name, str(value)) for name, value in problem.options.items()))
    offered = [
        (backend.name, tuple(config.items()))
        for backend in OPS[problem.op].backends
        if hasattr(backend.loaded, "compile_for") and not backend.cannot(problem)
        for config in backend.configs(problem)
    ]
    return problem.op, problem.direction, problem.dtype_name, tuple(kinds.items()), options, tuple(sorted(offered))


def _compile(target: str, folder: Path, problem: Problem) -> None:
    with _aot().remembering(folder):
        estimates(OPS[problem.op], problem, target)


def _tell(progress: Progress | None, done: int, count: int) -> None:
    if progress is not None:
        progress(done, count)


@functools.cache
def _aot() -> Any:
    """Triton's compiler, imported when it is needed."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("compiling for a GPU that is not here needs triton; install it with: pip install triton")
    from kernels import triton_aot

    return triton_aot
