"""Candidates that would take the user's process down are found out elsewhere, and the search goes on without them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import autotune
from autotune.check import Failure
from kernels import trial
from kernels.agreement import pose
from kernels.comparison import Comparison
from kernels.explain import explain
from kernels.op import Backend
from kernels.problem import Problem
from kernels.scan import OP as SCAN
from kernels.trial import Trials
from kernels.tuning import tune, tune_problems

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere crashes and limits of memory are others")
CPU = torch.device("cpu")
GIB = 2**30

COMMON = """
import ctypes, os, time
import torch
from kernels.scan import naive
from kernels.scan.naive import backward, forward

calls = 0

def changed(results, index, change):
    results = [None if tensor is None else tensor.clone() for tensor in results]
    results[index].view(-1)[-1:] = change(results[index].view(-1)[-1:])
    return tuple(results)

def count():
    global calls
    calls += 1
    return calls
"""
FORWARD = "def forward(*args, **options):\n    results = naive.forward(*args, **options)\n    "
BACKWARD = "def backward(*args, **options):\n    results = naive.backward(*args, **options)\n    "
# What a module does, the status it must get, and a part of the reason.
PLANTED = {
    "right": ("", "ok", ""),
    "forward_wrong": (f"{FORWARD}return changed(results, 0, lambda h: h + 1)", "wrong", "h is off by 1 at its worst"),
    "gradient_wrong": (f"{BACKWARD}return changed(results, 1, lambda dx: 2 * dx + 1)", "wrong", "dx is off by"),
    "odd": (
        f"{FORWARD}return changed(results, 0, lambda h: h + results[0].shape[1] % 2)",
        "wrong",
        "h is off by 1 at its worst, allowed",
    ),
    # one call at the other length, two to check, and the first that is timed
    "nan_once": (
        f"{FORWARD}return changed(results, 0, lambda h: h + (float('nan') if count() == 4 else 0))",
        "wrong",
        "while it was timed, a call gave different bits",
    ),
    "undecided": (
        f"{FORWARD}return changed(results, 0, lambda h: h * (1 + count() % 2 * 2e-7))",
        "wrong",
        "not deterministic: two calls",
    ),
    "raises": (f"{FORWARD}raise RuntimeError('no luck')", "error", "RuntimeError: no luck"),
    # without ever giving the interpreter back
    "hangs": (f"{FORWARD}ctypes.PyDLL(None).pause()", "wrong", "hangs: no result within 1 s"),
    "allocates": (
        f"{FORWARD}return [torch.empty(10 << 30, dtype=torch.uint8) for _ in range(10)]",
        "error",
        "can't allocate memory",
    ),
    # more than the search says (and the loop may need), and less than the machine has
    "takes_more": (
        f"{FORWARD}torch.empty(7 << 30, dtype=torch.uint8); return results",
        "error",
        "can't allocate memory",
    ),
    "segfaults": (f"{FORWARD}ctypes.string_at(0)", "wrong", "its process was killed by SIGSEGV"),
    "aborts": (
        f"{FORWARD}os.write(2, b'free(): invalid pointer\\n'); os.abort()",
        "wrong",
        "its process was killed by SIGABRT (free(): invalid pointer)",
    ),
    "leaves": (f"{FORWARD}os._exit(3)", "wrong", "its process ended with exit code 3"),
    "talks": (f"{FORWARD}print('{{}}', flush=True); input()", "error", "EOFError"),
}
# `gradient_wrong` is so in one direction, the others in the other.
FORWARDS = [name for name in PLANTED if name != "gradient_wrong"]


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[autotune.Store]:
    """The scan with the loop and with backends from other packages; a table of the test's own."""
    monkeypatch.syspath_prepend(tmp_path)
    backends = [SCAN.backends[0]]
    for name, (code, _, _) in PLANTED.items():
        (tmp_path / f"planted_{name}.py").write_text(f"{COMMON}\n{code}\n")
        backends.append(Backend(name, f"planted_{name}", foreign=True))
    monkeypatch.setitem(SCAN.__dict__, "backends", tuple(backends))
    monkeypatch.setattr(trial, "HANGS_AFTER", 1.0)
    with autotune.using(tmp_path / "tuned.jsonl") as store:
        yield store
    for name in PLANTED:
        sys.modules.pop(f"planted_{name}", None)


def problem(direction: str = "forward") -> Problem:
    return pose(SCAN, direction, {"B": 2, "T": 16, "D": 5, "N": 2}, dtype=torch.float32, device=CPU)


def test_nothing_wrong_is_chosen_and_this_process_survives(planted: autotune.Store) -> None:
    forward, backward = problem(), problem("backward")
    made = tune_problems([forward, backward], seconds=300, memory=GIB // 4)
    for posed, names in ((forward, FORWARDS), (backward, ["gradient_wrong"])):
        records = {record.backend: record for record in made[posed]}
        assert set(records) >= {"naive", *names}
        for name in names:
            _, status, reason = PLANTED[name]
            assert (name, records[name].status) == (name, status)
            assert reason in records[name].message
            verdict = next(v for v in explain(SCAN, posed).verdicts if v.backend == name)
            assert status == "ok" or (verdict.status, verdict.reason) == (status, records[name].message)
        assert SCAN.choose(posed).backend.name in {name for name, record in records.items() if record.status == "ok"}
        # found out, it is not tried again
        assert {r.backend for r in tune(SCAN, posed, seconds=300)} <= {"naive", "right"}
    # nor is what crashed trusted at a length at which nobody tried it
    longer = pose(SCAN, "forward", {"B": 2, "T": 300, "D": 5, "N": 2}, dtype=torch.float32, device=CPU)
    refused = {record.backend for record in autotune.refused(SCAN.key(longer), SCAN.source("cpu"))}
    assert {"hangs", "segfaults", "aborts", "odd"} <= refused


def test_who_is_tried_apart() -> None:
    """By default other packages' code, and ours on a GPU, where a fault ends everything."""
    foreign = Backend("foreign", "planted_anything", foreign=True)
    on_gpu = replace(problem(), device=torch.device("cuda"))
    backends = (*(SCAN.backend(name) for name in ("naive", "compiled", "native")), foreign)
    expected = {
        (None, problem()): [foreign],
        (None, on_gpu): [SCAN.backend("native"), foreign],
        (True, problem()): [SCAN.backend("native"), foreign],
        (False, on_gpu): [],
    }
    for (isolate, posed), apart in expected.items():
        trials = Trials(isolate)
        assert [backend for backend in backends if trials.needed(SCAN, backend, posed)] == apart
    assert Trials().safe(SCAN, problem()) == "auto"
    # what draws a backward pass's residuals runs in this process
    assert Trials(True).safe(SCAN, problem()) == "compiled"


def test_what_is_trusted_here_starts_no_process(planted: autotune.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCAN.__dict__, "backends", SCAN.backends[:2])
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.warns(RuntimeWarning, match="right was to be tried could not be started.*it was not tried"):
        assert [record.backend for record in tune(SCAN, problem(), seconds=300)] == ["naive"]
    known = {"median_s": 1e-9, "spread_s": 0.0, "source": SCAN.source("cpu")}
    planted.append(autotune.Record(SCAN.key(problem()), "right", {}, "ok", **known))
    longer = pose(SCAN, "forward", {"B": 2, "T": 40, "D": 7, "N": 2}, dtype=torch.float32, device=CPU)
    assert {record.backend for record in tune(SCAN, longer, seconds=300)} == {"naive", "right"}


def test_a_short_search_says_so_and_the_process_ends_with_its_parent(
    planted: autotune.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "HANGS_AFTER", 60.0)
    monkeypatch.setattr(trial, "LEAST_SECONDS", 0.1)
    compared = Comparison(SCAN, problem(), length=16)
    with Trials() as trials:
        failure = trials.run(compared, SCAN.backend("hangs"), {}, left=0.2)
        assert failure == Failure("error", "no result within 0.1 s; a longer search tries it again", 0.2)
        assert trials.run(compared, SCAN.backend("right"), {}, left=100.0) is None
        process, runner = trials._process, trials._runner
        assert process is not None
        assert process.stdin is not None
        assert runner is not None
        process.stdin.close()
        assert process.wait(60) == 0
        with pytest.raises(ProcessLookupError):
            os.kill(runner, 0)
