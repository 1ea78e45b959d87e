"""Compiles the Triton kernels of candidates before they are measured: side by side, in processes of their own.

    compile_ahead(problems, seconds=30)

A process without a GPU runs a backend's own function on tensors without memory. Triton then says what it would compile
for each launch, and instead of launching anything that is handed out, kernel by kernel, to all processes. What they
compile lies in Triton's cache on disk, where the first launch on the GPU looks for the same source, types, alignments,
constants, options and target. Nothing depends on it: what does not come about here is compiled when it is launched.
"""

from __future__ import annotations

import contextlib
import heapq
import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kernels.agreement import Inputs, sequence_dtype
from kernels.catalogue import OPS
from kernels.comparison import shortened, tailed
from kernels.op import Config, Op
from kernels.problem import Arg, Problem, size_of, state_dtype

# So many processes at most: each takes about half a gigabyte.
MOST = 16
# Seconds in which processes start and a few kernels are compiled: with fewer it is not begun.
LEAST = 10.0

# Called with the kernels that are done and those that are known.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Candidates:
    """Backends and configs of a problem, the most urgent first; target: a triton GPUTarget."""

    problem: Problem
    target: Any
    configs: tuple[tuple[str, Config], ...]


@dataclass(frozen=True)
class Kernel:
    """What Triton compiles for a launch. facts: types, constants, attributes and options, in Triton's own words."""

    target: Any
    module: str
    name: str
    facts: str


@dataclass
class Outcome:
    """kernels: how many there are to compile, done: of those, and errors: why others are left to their launch."""

    kernels: int = 0
    done: int = 0
    errors: list[str] = field(default_factory=list)


def compile_ahead(
    work: Sequence[Candidates], *, seconds: float, processes: int | None = None, progress: Progress | None = None
) -> Outcome:
    """Compiles what the candidates launch: first everybody's most urgent config, and of those the first problem's.

    seconds: after which it ends, whatever is unfinished. processes: by default one for each core, up to MOST.
    """
    count = sum(len(each.configs) for each in work)
    crew = _Crew(min(processes or min(_cores(), MOST), count))
    for rank, each in enumerate(work):
        crew.add((-1, rank), each)
    deadline = time.monotonic() + seconds
    with crew:
        while crew.wait(deadline - time.monotonic()):
            if progress is not None:
                progress(crew.outcome.done, crew.outcome.kernels)
    return crew.outcome


def target_of(device: torch.device) -> Any:
    """What Triton compiles for when it launches on a GPU."""
    import triton

    with torch.cuda.device(device):
        return triton.runtime.driver.active.get_current_target()


class _Crew:
    """Threads, each with a process of its own that does one thing at a time, the most urgent first."""

    def __init__(self, size: int) -> None:
        self.outcome = Outcome()
        self._todo: list[tuple[tuple[int, ...], int, Any]] = []
        self._known: set[Kernel] = set()
        self._busy, self._closed = 0, False
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(size)]

    def add(self, urgency: tuple[int, ...], task: Any) -> None:
        heapq.heappush(self._todo, (urgency, len(self._known), task))

    def __enter__(self) -> _Crew:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for process in self._processes:
                _end(process)
        for thread in self._threads:
            thread.join()

    def wait(self, seconds: float) -> bool:
        """Waits until there is something to tell; False at the end, or after so many seconds."""
        with self._changed:
            return self._working() and seconds > 0 and self._changed.wait(seconds) and self._working()

    def _working(self) -> bool:
        return not self._closed and bool(self._todo or self._busy)

    def _serve(self) -> None:
        process = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._todo or not self._working())
                if not self._working():
                    break
                urgency, _, task = heapq.heappop(self._todo)
                self._busy += 1
                try:
                    process = process or self._start()
                except Exception as error:
                    self._done(urgency, task, f"no process: {type(error).__name__}: {error}")
                    continue
            try:
                pickle.dump(task, process.stdin)  # type: ignore[arg-type]
                process.stdin.flush()  # type: ignore[union-attr]
                reply = pickle.load(process.stdout)  # type: ignore[arg-type]
            except Exception as error:
                # mostly EOFError; the next task gets another process
                self._stop(process)
                process, reply = None, f"its process died ({type(error).__name__})"
            with self._changed:
                self._done(urgency, task, reply)
        if process is not None:
            self._stop(process)

    def _done(self, urgency: tuple[int, ...], task: Any, reply: Any) -> None:
        """reply: what is wrong, or "", or for every config its kernels and what is wrong."""
        self._busy -= 1
        if self._closed:
            return
        if isinstance(task, Kernel):
            self.outcome.done += not reply
        if isinstance(reply, str):
            self.outcome.errors += [f"{task}: {reply}"] if reply else []
        else:
            for place, (kernels, error) in enumerate(reply):
                self.outcome.errors += [f"{task.problem}: {error}"] if error else []
                for kernel in kernels:
                    if kernel not in self._known:
                        self._known.add(kernel)
                        self.add((place, *urgency[1:]), kernel)
            self.outcome.kernels = len(self._known)
        self._changed.notify_all()

    def _start(self) -> subprocess.Popen[bytes]:
        from triton import knobs

        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        process = subprocess.Popen(
            # not by multiprocessing, which would run a program without a guard of its main module once more
            [sys.executable, "-c", "from kernels.ahead import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "TRITON_CACHE_DIR": knobs.cache.dir},
            # a group of its own, with the assembler: a key that interrupts this process is ours to handle
            start_new_session=True,
        )
        self._processes.add(process)
        return process

    def _stop(self, process: subprocess.Popen[bytes]) -> None:
        with self._changed:
            self._processes.discard(process)
        _end(process)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            # closing flushes what nobody reads any more
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def serve() -> None:
    """The process's side: does what it is sent, one thing after the other, until there is no more."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # whatever compilers print is no message of ours
    os.dup2(2, 1)
    torch.set_num_threads(1)
    while True:
        try:
            task = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(_answer(task), replies)
        replies.flush()


def _answer(task: Candidates | Kernel) -> Any:
    try:
        _stand_in(task.target)
        if isinstance(task, Kernel):
            compile_kernel(task)
            return ""
        return [_found(task, *each) for each in task.configs]
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]


def _found(task: Candidates, backend: str, config: Config) -> tuple[list[Kernel], str]:
    """What a candidate launches in a comparison, which has two lengths, and what kept it from launching more."""
    found: dict[Kernel, None] = {}
    short = tailed(task.problem.sizes["T"] - 1)
    try:
        for problem in (task.problem, *([shortened(task.problem, short)] if short else [])):
            found |= dict.fromkeys(launched(without_memory(OPS[problem.op], problem), backend, config, task.target))
    except Exception as error:
        return list(found), f"{backend} {dict(config)}: {type(error).__name__}: {error}"[:500]
    return list(found), ""


def compile_kernel(kernel: Kernel) -> None:
    """Into Triton's cache on disk, if it is not there."""
    function: Any = importlib.import_module(kernel.module)
    for name in kernel.name.split("."):
        function = getattr(function, name)
    function.preload(kernel.facts)


def launched(inputs: Inputs, backend: str, config: Config, target: Any) -> list[Kernel]:
    """What Triton would compile for what a backend launches. Nothing is launched, so the results are anybody's guess.

    Needs a driver that has the target, as `_stand_in` makes one, and kernels that this process has not launched.
    """
    from triton import knobs

    found = []

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        found.append(Kernel(target, fn.module, fn.name, compile["specialization_data"]))
        # not to be compiled, and therefore not to be launched
        return True

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    try:
        with torch.no_grad():
            inputs.call(inputs.op.backend(backend), config)()
    finally:
        knobs.runtime.jit_cache_hook = before
    return found


def without_memory(op: Op, problem: Problem) -> Inputs:
    """The tensors of a problem as `draw` makes them, on the meta device."""
    sequence, sizes, options = sequence_dtype(op, problem), problem.sizes, problem.options
    roles = {"sequence": sequence, "decay": sequence, "state": state_dtype(sequence), "index": torch.int64}
    args = {arg.name: arg for arg in (*op.inputs, *op.outputs)}
    gradients = {f"d{arg.name}": arg for arg in op.outputs}

    def tensor(name: str) -> Tensor | None:
        arg: Arg = gradients.get(name) or args[name]
        if not (options.get(name, True) if arg.optional else arg.differentiable or name in args):
            return None
        shape = [size_of(axis, sizes) for axis in arg.letters] + [2] * (arg.pairs and options.get("pairs", False))
        return torch.empty(shape, dtype=problem.dtypes.get(name, roles[arg.role]), device="meta")

    packed = torch.empty(sizes["N"] + 1, dtype=torch.int32, device="meta") if options["packed"] else None
    posed = replace(problem, device=torch.device("meta"))
    return Inputs(op, posed, tuple(map(tensor, op.names(problem.direction))), packed)


def _stand_in(target: Any) -> None:
    """From now on, Triton and what launches its kernels take this process's GPU for one of the target's kind."""
    from triton.runtime.driver import driver

    from kernels import triton_launch

    driver.set_active(StandIn(target))
    # by name, for modules of backends import it when they are first needed
    setattr(triton_launch, "lanes", lambda device: target.warp_size)  # noqa: B010


class StandIn:
    """The driver of a GPU that is not asked for anything: no kernel is loaded."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        """Triton keeps what it knows of a target by its device."""
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0
