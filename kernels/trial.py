"""Tries candidates in a process of their own: what crashes, hangs or takes all memory there does so alone.

One process serves many candidates, for it takes seconds to start, when it is first needed: on a CPU, by a child that is
replaced in no time when a candidate takes it down. It reads requests from its stdin and answers on its stdout, one line
of JSON each, and ends when its stdin does: with the process that started it.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping
from typing import IO, Any

import torch

from autotune.check import Failure
from kernels.catalogue import OPS
from kernels.comparison import Comparison
from kernels.op import Backend, Config, Op
from kernels.problem import Problem

# A candidate that has not returned by then hangs; what it says that it needs to start comes on top.
HANGS_AFTER = 20.0
# Of what is left for checks, the others get half.
SHARE = 0.5
LEAST_SECONDS = 1.0
# Starting, and drawing tensors and running the loop, which are ours and do not hang.
START, PREPARATION = 120.0, 300.0


class Trials:
    """The process, and who is sent to it.

    isolate: True: every candidate with machine code of its own (C++, Triton, other packages'); None: other packages'
    on any device, ours where a fault makes the device useless for the whole process, as on a GPU; False: nobody.
    memory: bytes that candidates may allocate there; by default three quarters of what the machine or the GPU has.
    """

    def __init__(self, isolate: bool | None = None, memory: int | None = None) -> None:
        self.isolate, self.memory = isolate, memory
        self._process: subprocess.Popen[str] | None = None
        # who runs the candidates: the process, or the child that it has at the moment
        self._runner: int | None = None
        self._replies: queue.Queue[dict[str, Any] | None] = queue.Queue()
        # seconds that went by until somebody was ready to try something
        self.starting = 0.0

    def __enter__(self) -> Trials:
        # what the process prints, which is of interest if it dies
        self._errors = tempfile.TemporaryFile("a+", encoding="utf-8", errors="replace")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._errors.close()

    def needed(self, op: Op, backend: Backend, problem: Problem) -> bool:
        """Whether this backend's candidates are to be tried apart before they run here."""
        if self.isolate is False or OPS.get(op.name) is not op:
            return False
        if self.isolate is None and problem.device.type == "cpu":
            return backend.foreign
        return machine_code(backend)

    def safe(self, op: Op, problem: Problem) -> str:
        """A backend that may run here unmeasured: "auto" where all may, else the last one that need not be tried."""
        ours = [backend for backend in op.backends if not backend.foreign]
        free = [backend for backend in ours if not self.needed(op, backend, problem)]
        if len(free) == len(ours):
            return "auto"
        names = [backend.name for backend in free if not backend.cannot(problem)]
        return names[-1] if names else "auto"

    def run(
        self, comparison: Comparison, backend: Backend, config: Config, left: float, startup: float = 0.0
    ) -> Failure | None:
        """What is wrong with the candidate, if anything; left: seconds that the search has left for its checks."""
        patience = HANGS_AFTER + startup
        limit = min(patience, max(SHARE * left, LEAST_SECONDS))
        try:
            self._start(comparison.problem.device)
            self._send({**_request(comparison, backend, config), "limit": limit})
            self._await("begun", PREPARATION)
        except _Ended as ended:
            self._stop()
            message = f"autotune: the process in which {backend.name} was to be tried {ended}; it was not tried"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            return Failure("", str(ended))
        try:
            reply = self._await("status", limit)
        except _Ended as ended:
            self._replace()
            if not ended.late:
                # what memory is left may be different at another length
                return Failure("error" if ended.killed else "wrong", f"its process {ended}")
            if limit < patience:
                # what the search had for it: one that has no more would give it no more
                return Failure("error", f"no result within {limit:.3g} s; a longer search tries it again", left)
            return Failure("wrong", f"hangs: no result within {limit:.3g} s")
        if reply.get("lost"):
            self._replace()
        return Failure(reply["status"], reply["message"]) if reply["status"] != "ok" else None

    def _start(self, device: torch.device) -> None:
        begun = time.perf_counter()
        if self._process is None:
            path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", "from kernels.trial_process import serve; serve()"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    encoding="utf-8",
                    env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
                    # a group of its own: a key that interrupts this process is ours to handle
                    start_new_session=True,
                )
            except OSError as error:
                raise _Ended(f"could not be started: {error}") from error
            self._replies = queue.Queue()
            threading.Thread(target=_listen, args=(self._process.stdout, self._replies), daemon=True).start()
            # a GPU that was touched before a fork, even by an import, is of no use after it
            fork = device.type == "cpu" and hasattr(os, "fork")
            self._send({"threads": torch.get_num_threads(), "memory": self.memory, "fork": fork})
        try:
            if self._runner is None:
                self._runner = self._await("ready", START)["ready"]
        finally:
            self.starting += time.perf_counter() - begun

    def _replace(self) -> None:
        """Ends whoever runs candidates, who may have ended already; the next one starts when it is needed."""
        runner, self._runner = self._runner, None
        process = self._process
        if process is None or runner is None or runner == process.pid or process.poll() is not None:
            self._stop()
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(runner, signal.SIGKILL)

    def _stop(self) -> None:
        """Ends the process, and what it has started."""
        process, self._process, self._runner = self._process, None, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()
        # closing stdin flushes what nobody reads any more
        with contextlib.suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]

    def _send(self, message: Mapping[str, Any]) -> None:
        self._errors.truncate(0)
        # a process that has died says so when it is asked for its reply
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(message) + "\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]

    def _await(self, what: str, seconds: float) -> dict[str, Any]:
        """The next reply of that kind. Raises _Ended: it says nothing, or has died."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                reply = self._replies.get(timeout=max(deadline - time.monotonic(), 0.0))
            except queue.Empty:
                raise _Ended(f"said nothing for {seconds:.3g} s", late=True) from None
            if reply is None:
                raise self._death(self._process.wait())  # type: ignore[union-attr]
            if "ended" in reply and what != "ready":
                raise self._death(reply["ended"])
            # others are left from a runner that was given up
            if what in reply:
                return reply

    def _death(self, code: int) -> _Ended:
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        words = f" ({lines[-1][:200]})" if lines else ""
        return _Ended(f"{_ending(code)}{words}", killed=code == -getattr(signal, "SIGKILL", 9))


class _Ended(Exception):
    """The process is of no use any more. late: it still runs. killed: by SIGKILL, as systems do that lack memory."""

    def __init__(self, what: str, *, late: bool = False, killed: bool = False) -> None:
        super().__init__(what)
        self.late, self.killed = late, killed


def machine_code(backend: Backend) -> bool:
    """Whether the backend is more than calls of torch: C++ or Triton of ours, or whatever another package does."""
    return backend.foreign or any(hasattr(backend.loaded, name) for name in ("SOURCE", "compile_for"))


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-code).name}"
    return f"was killed by signal {-code}"


def _listen(stream: IO[str], replies: queue.Queue[dict[str, Any] | None]) -> None:
    # closed, or gone
    with contextlib.suppress(ValueError, OSError):
        for line in stream:
            # the last line of a runner that was killed may be half a reply
            with contextlib.suppress(json.JSONDecodeError):
                reply = json.loads(line)
                if isinstance(reply, dict):
                    replies.put(reply)
    replies.put(None)


def _request(comparison: Comparison, backend: Backend, config: Config) -> dict[str, Any]:
    problem = comparison.problem
    return {
        "op": problem.op,
        "direction": problem.direction,
        "device": str(problem.device),
        "dtypes": {name: str(dtype).removeprefix("torch.") for name, dtype in problem.dtypes.items()},
        "sizes": dict(problem.sizes),
        "options": dict(problem.options),
        "length": comparison.length,
        "by": comparison.by,
        "backend": [backend.name, backend.module],
        "config": dict(config),
    }
