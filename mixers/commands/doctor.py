"""`mixers doctor`: what is available here and why not, and whether every backend is right on this machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import autotune
from autotune.lookup import SHIPPED
from kernels import inductor, jit_cpp
from kernels.agreement import Expected, Inputs, draw
from kernels.catalogue import OPS
from kernels.op import Backend, Config, Op
from kernels.problem import SEQUENCE_DTYPES, Problem
from mixers.commands import common
from mixers.commands.common import Device, mistakes
from mixers.commands.probe import SIZES, kinds, problem

PACKAGES = ("triton", "einops", "numpy", "pandas", "matplotlib")
# One token, and a length that no chunk divides.
LENGTHS = (1, SIZES["T"])


def doctor(
    device: Device = None,
    every_config: Annotated[
        bool, typer.Option("--every-config", help="Every config of a backend, not its default alone.")
    ] = False,
) -> None:
    """Examines this machine: what is installed, what each backend needs, and whether its results are right.

    Every backend of every op is compared with a loop in float64: values and gradients, every dtype, packed and
    complex where the op has it. The exit code is 1 if any of them is wrong.
    """
    console, where = common.console(), common.device_of(device)
    facts = common.table("", "", show_header=False)
    for name, text in _facts(where):
        facts.add_row(Text(name, "bold"), text)
    console.print(facts)
    console.print()
    found: list[Examined] = []
    todo = [(op, backend) for op in OPS.values() for backend in op.backends]
    with console.status("") as status, mistakes():
        for op, backend in todo:
            status.update(f"{op.name} {backend.name} (the first time may compile kernels)")
            found.append(examine(op, backend, where, every_config=every_config))
    _report(console, where, found)
    if any(examined.failures for examined in found):
        raise typer.Exit(1)


@dataclass
class Examined:
    """What came of one backend: cases passed by direction, the failures, or why it cannot run."""

    op: Op
    backend: Backend
    cannot: list[str] = field(default_factory=list)
    passed: dict[str, int] = field(default_factory=lambda: {"forward": 0, "backward": 0})
    failures: list[tuple[str, str]] = field(default_factory=list)
    partly: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def examine(op: Op, backend: Backend, device: torch.device, *, every_config: bool = False) -> Examined:
    """Runs the backend on a small problem of every kind, dtype and direction, and compares with the loop in float64."""
    found, start = Examined(op, backend), time.perf_counter()
    for kind, case in cases(op, device):
        reasons = backend.cannot(case)
        for reason in reasons:
            found.partly[reason] = found.partly.get(reason, 0) + 1
        if reasons:
            continue
        for config, wrong in compared(draw(op, case), backend, every_config=every_config):
            if wrong is None:
                found.passed[case.direction] += 1
            else:
                found.failures.append((f"{case.direction} {case.dtype_name} {kind} {common.config(config)}", wrong))
    found.seconds = time.perf_counter() - start
    if not any(found.passed.values()) and not found.failures:
        found.cannot = list(found.partly)
    return found


def compared(inputs: Inputs, backend: Backend, *, every_config: bool) -> Iterator[tuple[Config, str | None]]:
    """The backend's default config, or every one, and what is wrong with its results."""
    expected = Expected.of(inputs)
    for config in backend.configs(inputs.problem)[: None if every_config else 1]:
        try:
            with torch.no_grad():
                wrong = expected.difference(inputs.call(backend, config)())
        # whatever a backend raises is its failure, and the others are still examined
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        yield config, wrong


def cases(op: Op, device: torch.device) -> Iterator[tuple[str, Problem]]:
    for dtype in SEQUENCE_DTYPES:
        # no float64 on Apple's GPUs
        if device.type == "mps" and dtype == torch.float64:
            continue
        for length in LENGTHS:
            for kind, facts in kinds(op):
                for direction in ("forward", "backward"):
                    yield f"T={length} {kind}", problem(op, direction, dtype, device, length, facts)
        if dtype.itemsize == 2 and any(arg.role == "decay" for arg in op.inputs):
            for direction in ("forward", "backward"):
                facts = {"decay_dtype": torch.float32}
                yield f"T={LENGTHS[-1]} float32 decay", problem(op, direction, dtype, device, LENGTHS[-1], facts)


def _report(console: Console, device: torch.device, found: list[Examined]) -> None:
    table = common.table(
        "op", "backend", "forward", "backward", "time", f"verdict on {device}", right=("forward", "backward", "time")
    )
    before = None
    for each in found:
        name = Text(each.op.name if each.op is not before else "", "bold")
        before = each.op
        if each.cannot:
            table.add_row(
                name, Text(each.backend.name, "dim"), "", "", "", Text(f"cannot: {'; '.join(each.cannot)}", "dim")
            )
            continue
        counts = []
        for direction in ("forward", "backward"):
            bad = sum(case.startswith(direction) for case, _ in each.failures)
            good = each.passed[direction]
            counts.append(Text(f"{good}/{good + bad} {'✗' if bad else '✓'}", "red" if bad else "green"))
        verdict = Text("right", "green")
        if each.failures:
            verdict = Text(f"WRONG in {len(each.failures)} cases", "bold red")
        elif each.partly:
            verdict = Text(f"right, but cannot: {'; '.join(each.partly)}", "yellow")
        table.add_row(name, each.backend.name, *counts, common.seconds(each.seconds), verdict)
    console.print(table)
    for each in found:
        for case, wrong in each.failures[:3]:
            console.print(Text(f"{each.op.name} {each.backend.name}: {case}: {wrong}", "red"))
        if len(each.failures) > 3:
            console.print(Text(f"{each.op.name} {each.backend.name}: and {len(each.failures) - 3} more", "red"))


def _facts(device: torch.device) -> Iterator[tuple[str, str | Table]]:
    yield (
        "software",
        f"sequence-mixers {_version('sequence-mixers')}, Python {platform.python_version()}, torch {torch.__version__}",
    )
    yield "", ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    threads = f"{torch.get_num_threads()} threads"
    yield (
        "machine",
        f"{platform.system()} {platform.machine()}, {threads}, torch uses {torch.backends.cpu.get_cpu_capability()}",
    )
    yield "device", f"{device}: {autotune.fingerprint(device)}"
    yield "GPU", _gpu()
    yield "C++ compiler", _compiler()
    yield "torch.compile", inductor.reason(device.type) or f"can generate code for {device.type}"
    folder = autotune.cache_folder()
    yield "cache folder", f"{folder} ({_writable(folder)})"
    for where, path in (("shipped", SHIPPED), ("user", folder / "tuned")):
        yield f"{where} tables", _tables(path, device)
    variables = [
        f"{name}={os.environ[name]}"
        for name in ("SEQUENCE_MIXERS_CACHE", "CXX", "TRITON_INTERPRET")
        if name in os.environ
    ]
    yield "environment", ", ".join(variables) or "nothing set that matters"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.accelerator.is_available():
        built = torch.version.cuda or torch.version.hip
        return f"none found (torch is built {'for ' + built if built else 'without GPU support'})"
    kind = torch.accelerator.current_accelerator()
    names = (
        [autotune.fingerprint(torch.device(kind.type, n)) for n in range(torch.accelerator.device_count())]
        if kind
        else []
    )
    return ", ".join(names)


def _compiler() -> str:
    """The compiler, and how wide the vectors of the kernels are that it made."""
    try:
        command = " ".join(jit_cpp.compiler())
    except jit_cpp.BuildError as error:
        return str(error)
    widths = []
    for op in OPS.values():
        for backend in op.backends:
            source = getattr(backend.loaded, "SOURCE", None)
            if not isinstance(source, Path):
                continue
            reason = jit_cpp.reason(source)
            if reason is not None:
                widths.append(f"{op.name}: {reason.splitlines()[0]}")
            else:
                widths.append(f"{op.name} with vectors of {8 * jit_cpp.load(source).vector_bytes()} bits")
    return f"{command}: {'; '.join(widths)}" if widths else command


def _writable(folder: Path) -> str:
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        return "NOT writable: measurements last for one process, kernels are compiled anew; set SEQUENCE_MIXERS_CACHE"
    return "writable" if folder.exists() else "writable, made when needed"


def _tables(folder: Path, device: torch.device) -> str:
    """What the folder has for the device: how many rows, and how many of them count."""
    path = folder / f"{autotune.fingerprint(device)}.jsonl"
    if not path.exists():
        return f"none for this device in {folder}"
    records = autotune.Store(path).read()
    known = {name: op.source(device.type) for name, op in OPS.items()}
    fresh = sum(record.source == known.get(record.key.op) for record in records)
    return f"{len(records)} measurements, {fresh} of them with today's sources: {path}"
