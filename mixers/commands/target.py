"""Compiling for a GPU that is not here: what `mixers tune --target` and `mixers calibrate --target` share."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

import autotune
from autotune.lookup import SHIPPED
from kernels import predict
from kernels.agreement import pose
from kernels.cards import Card, card
from kernels.catalogue import OPS
from kernels.problem import Problem
from mixers.commands import common

# Whose problems the shipped tables have: every op that compiles for GPUs, in the forms that layers give it.
MIXERS = ("hgrn", "lru", "mingru", "rglru", "gated_deltanet", "rwkv7", "gla", "mamba", "mamba2")
DIMS, BATCHES, LENGTHS = (1024, 2048), (1, 8), (512, 4096, 32768)
DTYPES = (torch.bfloat16,)
# What static.md shows in full
SHOWN_DIM, SHOWN_BATCH, SHOWN_LENGTH = 1024, 8, 4096
# The floors: one sequence of so many channels, or so many together, and so many steps
RECURRENCES = ("scan", "hgru")
COLUMNS = tuple(4**n for n in range(3, 9))
STEPS = tuple(2 * 4**n for n in range(3, 9))
FLOORS = ("sm_80", "sm_90")


def problems(
    console: Console,
    names: Sequence[str] = MIXERS,
    dims: Iterable[int] = DIMS,
    batches: Sequence[int] = BATCHES,
    lengths: Sequence[int] = LENGTHS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    options: Mapping[str, Any] | None = None,
) -> list[Problem]:
    """What the mixers meet, for ops that compile for GPUs; nothing is computed."""
    met: dict[Problem, None] = {}
    with console.status("") as status:
        for name in names:
            for dtype in dtypes:
                for dim in dims:
                    status.update(f"{name} of width {dim} in {str(dtype).removeprefix('torch.')}")
                    built = common.build(name, dim, options or {}, dtype=dtype, device=torch.device("cpu"))
                    for batch, length in itertools.product(batches, lengths):
                        for problem in common.problems_at(built, batch, length, backward=True):
                            if any(hasattr(backend.loaded, "compile_for") for backend in OPS[problem.op].backends):
                                met[problem] = None
    return predict.on_gpu(met)


def records(console: Console, where: Card, met: Sequence[Problem], processes: int) -> list[autotune.Record]:
    """What is predicted for the problems, with a bar."""
    bar = Progress(TextColumn("{task.percentage:3.0f}%"), BarColumn(), TimeElapsedColumn(), console=console)
    with common.mistakes(), bar:
        task = bar.add_task("")
        made = predict.predict(
            met,
            where.target,
            memory(),
            processes=processes,
            progress=lambda done, count: bar.update(task, completed=done, total=count),
        )
    console.print(f"{where.page}: {len(made)} of {len(met)} problems predicted")
    return made


def memory() -> Path:
    """Where what was compiled for GPUs is kept; where the cache folder cannot be written, for this process only."""
    folder = autotune.cache_folder() / "compiled"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder if os.access(folder, os.W_OK) else Path(_for_now().name)


@functools.cache
def _for_now() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sequence-mixers-")


def cores() -> int:
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def write_table(console: Console, where: Card, made: Iterable[autotune.Record], folder: Path = SHIPPED) -> None:
    """Puts the predictions in the place of those that the shipped table of the card has; measurements stay."""
    path = folder / f"{where.fingerprint}.jsonl"
    kept = [record for record in autotune.Store(path).read() if record.status != "predicted"]
    lines = [*(record.to_line() for record in made), *(record.to_line() for record in kept)]
    with common.mistakes():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    console.print(Text(str(path), "dim"))


def write_static(console: Console, where: Card, met: Iterable[Problem], out: Path) -> None:
    """Puts the card's part into <out>/static.json, from which `mixers tables` makes a page."""
    path = out / "static.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    from kernels import triton_aot

    with autotune.pretend("cuda", where.fingerprint), triton_aot.remembering(memory()):
        known[where.target] = {
            "kernels": list(_kernels(where, met)),
            "floors": list(_floors(where)) if where.target in FLOORS else [],
        }
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(_one_line_each(known), encoding="utf-8")
    console.print(Text(str(path), "dim"))


def _one_line_each(known: dict[str, dict[str, list[dict[str, object]]]]) -> str:
    """JSON with a line for every row, so that a change of one can be read."""

    def block(opening: str, parts: list[str], closing: str) -> str:
        return "\n".join([opening, ",\n".join(parts), closing]) if parts else opening + closing

    targets = []
    for target, lists in sorted(known.items()):
        inner = [
            block(f"  {json.dumps(n)}: [", [f"   {json.dumps(row)}" for row in r], "  ]") for n, r in lists.items()
        ]
        targets.append(block(f" {json.dumps(target)}: {{", inner, " }"))
    return block("{", targets, "}\n")


def _kernels(where: Card, met: Iterable[Problem]) -> Iterator[dict[str, object]]:
    """The kernels of every config, for one problem of each form."""
    seen = set()
    for problem in met:
        sizes, options = problem.sizes, problem.options
        form = [name for name in ("pairs", "theta") if options.get(name)]
        form += ["a decay per head" if sizes["J"] == 1 else "a decay per key"] if "J" in sizes else []
        identity = (problem.op, problem.direction, problem.dtype_name, *form)
        shown = (sizes["B"], sizes["T"]) == (SHOWN_BATCH, SHOWN_LENGTH)
        if not shown or identity in seen:
            continue
        seen.add(identity)
        for estimate in predict.estimates(OPS[problem.op], problem, where.target):
            for kernel in estimate.kernels:
                yield {
                    "op": problem.op,
                    "direction": problem.direction,
                    "dtype": problem.dtype_name,
                    "form": ", ".join(form),
                    "sizes": _words({name: size for name, size in sizes.items() if name != "N"}),
                    "config": _words(estimate.config),
                    "kernel": kernel.kernel,
                    "threads": kernel.threads,
                    "registers": kernel.registers,
                    "spills": kernel.spills,
                    "shared": kernel.shared,
                    "occupancy": kernel.occupancy,
                    "loads": {str(width): count for width, count in kernel.loads.items()},
                    "stores": {str(width): count for width, count in kernel.stores.items()},
                    "asynchronous": kernel.asynchronous,
                    "fault": estimate.fault,
                }


def _floors(where: Card) -> Iterator[dict[str, object]]:
    """Least time, programs and launches of the first config by the rule, over columns and steps."""
    for name in RECURRENCES:
        op = OPS.get(name)
        if op is None or not any(hasattr(backend.loaded, "compile_for") for backend in op.backends):
            continue
        for direction in ("forward", "backward"):
            # posed small, for samples are drawn on the CPU
            small: dict[str, Any] = {"dtype": torch.bfloat16, "device": torch.device("cpu"), "initial_state": True}
            posed = pose(op, direction, {"B": 1, "N": 1, "T": 2, "D": 16}, **small)
            for columns, steps in itertools.product(COLUMNS, STEPS):
                sizes = {**posed.sizes, "T": steps, "D": columns}
                problem = replace(posed, sizes=sizes, device=torch.device("cuda"))
                kept = predict.order(predict.estimates(op, problem, where.target), where, steps)
                if kept:
                    yield {
                        "op": name,
                        "direction": direction,
                        "columns": columns,
                        "steps": steps,
                        "floor_s": op.cost(problem).bytes / where.bandwidth,
                        "config": _words(kept[0].config),
                        "programs": kept[0].programs,
                        "launches": kept[0].launches,
                        "bytes": kept[0].bytes,
                        "least": op.cost(problem).bytes,
                    }


def _words(values: object) -> str:
    return " ".join(f"{name}={value}" for name, value in dict(values).items())  # type: ignore[call-overload]


def target_card(target: str) -> Card:
    with common.mistakes():
        return card(target)
