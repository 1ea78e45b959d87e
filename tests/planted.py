"""Backends planted into the scan, and small problems of it."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.agreement import pose
from kernels.catalogue import OPS
from kernels.op import Backend, Op
from kernels.problem import Problem
from kernels.scan import OP as SCAN
from kernels.scan import naive

CPU = torch.device("cpu")
SIZES = {"B": 2, "T": 9, "D": 5}
_numbers = itertools.count()

Change = Callable[[tuple[Any, ...]], Any]


def planted(monkeypatch: pytest.MonkeyPatch, **backends: tuple[Change, Change]) -> Op:
    """The scan with the loop and planted backends: the loop's results, each direction's passed through a function."""
    listed = [SCAN.backends[0]]
    for name, changes in backends.items():
        module = types.ModuleType(f"planted_{name}_{next(_numbers)}")
        for direction, change in zip(("forward", "backward"), changes):
            setattr(module, direction, _through(getattr(naive, direction), change))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        listed.append(Backend(name, module.__name__))
    op = replace(SCAN, name=f"planted_scan_{next(_numbers)}", backends=tuple(listed), _plans={})
    monkeypatch.setitem(OPS, op.name, op)
    return op


def _through(function: Callable[..., Any], change: Change) -> Callable[..., Any]:
    return lambda *args, **options: change(function(*args, **options))


def right(results: tuple[Any, ...]) -> tuple[Any, ...]:
    return results


def slow(results: tuple[Any, ...]) -> tuple[Any, ...]:
    time.sleep(0.02)
    return results


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def problem(op: Op = SCAN, direction: str = "forward", dtype: torch.dtype = torch.float32, **facts: Any) -> Problem:
    sizes = {**SIZES, **({"B": 1, "N": 3} if facts.get("packed") else {})}
    return pose(op, direction, sizes, dtype=dtype, device=CPU, **facts)
