"""Triton tests in processes of their own: in the interpreter on the CPU, or compiled for GPUs that are not there.

`run(script)` is for ordinary tests: it runs pytest on a file of tests/apart/, with TRITON_INTERPRET=1 (which has to be
set before triton is imported) or without, and returns how many kernels were launched or compiled there. In that process
this module is a pytest plugin: it counts, and repairs the interpreter.

The repair: Triton 3.7's interpreter truncates where it casts float32 to bfloat16, and GPUs round to nearest even. (It
also computes on the bits of bfloat16 as if they were integers; kernels that cast to float32 first never ask it to.)
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TESTS = Path(__file__).parent


def run(script: str, *arguments: str, interpret: bool, share: int = 1) -> int:
    """Runs the tests in tests/apart/<script>; the number of kernels launched or compiled, or a failure with the log.

    share: of every `share` neighbours among the cases of a test a random one is run, the same in every run: of cases
    for four targets (which are neighbours where `target` is the first decorator) one target, of forward and backward
    one. Of a few cases all are run, and with HYPOTHESIS_PROFILE=long of any number.
    """
    share = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else share
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_TESTS_SHARE"] = str(share)
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), environment.get("PYTHONPATH", "")])
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    # Options of its own: one process, whose count is the count
    options = ["-q", "-o", "addopts=--strict-markers --import-mode=importlib", "-p", "triton_interpreter"]
    command = [sys.executable, "-m", "pytest", *options, f"tests/apart/{script}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=TESTS.parent)
    if done.returncode:
        pytest.fail(f"{script}:\n{done.stdout[-8000:]}\n{done.stderr[-2000:]}", pytrace=False)
    found = re.search(r"^kernels: (\d+)$", done.stdout, re.MULTILINE)
    assert found, f"no count of kernels in:\n{done.stdout}"
    return int(found[1])


@dataclass
class Traffic:
    """What the kernels launched inside `counting` did to global memory, in bytes of unmasked elements.

    outside: what torch's own operations did, each of whose inputs is read once and each of whose outputs written once.
    """

    launches: int = 0
    read: int = 0
    written: int = 0
    outside: int = 0

    @property
    def moved(self) -> int:
        return self.read + self.written


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share, left = int(os.environ.get("TRITON_TESTS_SHARE", "1")), []
    tests = [item.nodeid.partition("[")[0] for item in items]
    cases, seen = Counter(tests), Counter[str]()
    for item, test in zip(items, tests):
        group, place = divmod(seen[test], share)
        few = cases[test] < (4 if "target" in item.callspec.params else 5) if hasattr(item, "callspec") else True
        if not few and random.Random(f"{test} {group}").randrange(share) != place:
            left.append(item)
        seen[test] += 1
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


_kernels = 0
_counting: list[Traffic] = []
# Is the interpreter at work? What it does with tensors is not the program's doing
_launching = False


class _Outside(TorchDispatchMode):
    """Counts torch's operations, but for views and for memory that nothing is written to."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not (_launching or func.is_view or "empty" in func.__name__):
            tensors = {id(x): x for x in tree_leaves((args, kwargs, found)) if isinstance(x, torch.Tensor)}
            self.traffic.outside += sum(x.numel() * x.element_size() for x in tensors.values())
        return found


@contextlib.contextmanager
def counting() -> Iterator[Traffic]:
    """Counts what the kernels launched inside the block read and write, and what torch does around them."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        with _Outside(traffic):
            yield traffic
    finally:
        _counting.remove(traffic)


@contextlib.contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """The programs of each launch inside the block run in random order."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    order: list[int] = []

    def set_grid_dim(self: Any, *size: int) -> None:
        order[:] = random.Random(seed).sample(range(size[0]), size[0])
        set_dim(self, *size)

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        set_idx(self, order[x], y, z)

    with mock.patch.multiple(builder, set_grid_dim=set_grid_dim, set_grid_idx=set_grid_idx):
        yield


def _interpreter_patches() -> Iterator[Any]:
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, convert = builder.cast_impl, builder.create_fp_to_fp
    load, store, call = builder.create_masked_load, builder.create_masked_store, interpreter.GridExecutor.__call__

    def rounded(source: Any) -> Any:
        nearest = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
        return handle(nearest.view(torch.uint16).numpy(), tl.bfloat16)

    def narrows(source: Any, target: Any) -> bool:
        return (source.dtype.scalar, target.scalar) == (tl.float32, tl.bfloat16)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        return rounded(source) if narrows(source, target) else cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        return rounded(source) if narrows(source, target) else convert(self, source, target, rounding)

    def bytes_at(pointers: Any, mask: Any) -> int:
        elements = int(np.broadcast_to(mask.data, pointers.data.shape).sum())
        return elements * max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    def create_masked_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        for traffic in _counting:
            traffic.read += bytes_at(pointers, mask)
        return load(self, pointers, mask, *rest)

    def create_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        for traffic in _counting:
            traffic.written += bytes_at(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    # It looks through the whole language on every call of a function in a kernel; once per module and launch is enough
    patch_language = interpreter._patch_lang
    patched: set[int] = set()

    def patch_language_once(function: Any) -> Any:
        if id(function.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(function.__globals__))
        return patch_language(function)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _launching
        patched.clear()
        for traffic in _counting:
            traffic.launches += 1
        _launching = True
        try:
            return call(self, *args, **kwargs)
        finally:
            _launching = False

    # The builder's other casts call cast_impl, its unmasked loads and stores the masked ones
    yield mock.patch.multiple(builder, cast_impl=cast_impl, create_fp_to_fp=create_fp_to_fp)
    yield mock.patch.multiple(builder, create_masked_load=create_masked_load, create_masked_store=create_masked_store)
    yield mock.patch.object(interpreter, "_patch_lang", patch_language_once)
    yield mock.patch.object(interpreter.GridExecutor, "__call__", _counted(launch))


def _compiler_patches() -> Iterator[Any]:
    import triton

    yield mock.patch.object(triton, "compile", _counted(triton.compile))


def _counted(function: Any) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        global _kernels
        _kernels += 1
        return function(*args, **kwargs)

    return counted


@pytest.fixture(autouse=True, scope="session")
def _patched_triton() -> Iterator[None]:
    interpret = os.environ.get("TRITON_INTERPRET") == "1"
    with contextlib.ExitStack() as stack:
        for patch in _interpreter_patches() if interpret else _compiler_patches():
            stack.enter_context(patch)
        yield


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"kernels: {_kernels}")
