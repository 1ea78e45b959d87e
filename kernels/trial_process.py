"""The process in which candidates are tried, see `kernels.trial`: what reads requests, runs them and answers."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from autotune.check import Failure, check
from autotune.record import MESSAGE_LENGTH
from kernels.catalogue import OPS
from kernels.comparison import Comparison, Reference
from kernels.op import Backend, Config, Op
from kernels.problem import Problem

# The share of a device's memory that a process may have that was given no number; and what the loop may need besides.
MEMORY_SHARE = 0.75
LOOP_MEMORY = 6 * 2**30
# How long after its time a candidate ends that nobody has ended.
GRACE = 10.0


def serve() -> None:
    """The process's side: answers requests until there are no more, itself or by a child, replaced when it dies."""
    # whatever candidates print, and read, is no message of ours
    requests, replies = os.dup(0), os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)

    def tell(message: Mapping[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    settings = json.loads(_line(requests))
    while settings["fork"]:
        child = os.fork()
        if not child:
            break
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return
        # it may have died in the middle of a line
        replies.write("\n")
        tell({"ended": code})
    _answer(requests, tell, settings["threads"], settings["memory"])
    os._exit(0)


def _answer(requests: int, tell: Callable[[Mapping[str, Any]], None], threads: int, memory: int | None) -> None:
    torch.set_num_threads(threads)
    bound: set[str] = set()
    made: dict[str, tuple[Comparison, Reference]] = {}
    tell({"ready": os.getpid()})
    while line := _line(requests):
        request = json.loads(line)
        limit, name, config = request.pop("limit"), request.pop("backend"), request.pop("config")
        device = torch.device(request["device"])
        if device.type not in bound:
            bound.add(device.type)
            limit_memory(device, memory)
        with torch.no_grad():
            same = json.dumps(request)
            if same not in made:
                made.clear()
                made[same] = _prepare(**request)
            comparison, reference = made[same]
            backend = _backend(comparison.op, *name)
            # should nobody be there to end it: a thread that needs no interpreter does
            faulthandler.dump_traceback_later(limit + GRACE, exit=True)
            tell({"begun": True})
            tell(_tried(comparison, reference, backend, config))
            faulthandler.cancel_dump_traceback_later()


def _line(requests: int) -> bytes:
    """The next line, and nothing beyond: whoever comes next reads on from there. Empty at the end."""
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(requests, 1)
        if not piece:
            return b""
        line += piece
    return line


def _prepare(op: str, length: int, by: str, **facts: Any) -> tuple[Comparison, Reference]:
    dtypes = {name: getattr(torch, dtype) for name, dtype in facts.pop("dtypes").items()}
    problem = Problem(op, device=torch.device(facts.pop("device")), dtypes=dtypes, **facts)
    comparison = Comparison(OPS[op], problem, length=length, by=by)
    reference = comparison.reference()
    # before it is a candidate's turn, which may not be blamed for it
    assert comparison.timed
    return comparison, reference


def _backend(op: Op, name: str, module: str) -> Backend:
    """The op's, or one that only the process that asks has given it."""
    known = [backend for backend in op.backends if (backend.name, backend.module) == (name, module)]
    return known[0] if known else Backend(name, module, foreign=True)


def _tried(comparison: Comparison, reference: Reference, backend: Backend, config: Config) -> dict[str, Any]:
    try:
        found = check(lambda: comparison.prepare(backend, config), reference, comparison.agree)
    # a candidate may even end the interpreter
    except BaseException as error:
        found = Failure("error", f"{type(error).__name__}: {error}")
    if not isinstance(found, Failure):
        return {"status": "ok", "message": ""}
    return {
        "status": found.status,
        "message": found.message[:MESSAGE_LENGTH],
        "lost": not _usable(comparison.problem.device),
    }


def _usable(device: torch.device) -> bool:
    """Whether the device still works: after a fault in a GPU's kernel, nothing does in that process."""
    try:
        float(torch.zeros(1, device=device).sum())
    except Exception:
        return False
    return True


def limit_memory(device: torch.device, memory: int | None) -> None:
    """From now on, this process may allocate so many bytes on the device, beside what it has and what the loop needs.

    memory: by default, three quarters of what there is. Nothing on systems and devices that know no limit.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        allowed = free * MEMORY_SHARE if memory is None else memory + LOOP_MEMORY
        torch.cuda.set_per_process_memory_fraction(min(allowed / total, 1.0), device)
    elif device.type == "cpu" and sys.platform == "linux":
        import resource

        page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
        with open("/proc/self/statm") as statm:
            has = int(statm.read().split()[0]) * page
        allowed = int(page * pages * MEMORY_SHARE) if memory is None else memory + LOOP_MEMORY
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = has + allowed
        resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
