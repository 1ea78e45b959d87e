"""`mixers calibrate`: everything that a new device needs, in one go."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

import autotune
from kernels.problem import Problem
from kernels.tuning import tune_problems
from mixers import registry
from mixers.commands import common
from mixers.commands import target as targets
from mixers.commands.common import Device, Isolate, mistakes
from mixers.commands.doctor import doctor
from mixers.commands.tables import tables

# The share of the time that tuning gets; the sweep has the rest. Checks take as long as they take.
TUNING = 0.6
LENGTHS = (1, 512, 2048, 8192)
# What does not fill a GPU says little of it: sequences, and a layer's width
BATCH, DIM = {"cpu": 1}, {"cpu": 512}
GPU_BATCH, GPU_DIM = 8, 2048
BENCHMARKS = Path("benchmarks")


def calibrate(
    context: typer.Context,
    minutes: Annotated[float, typer.Option(min=0.01, help="For tuning and the sweep together.")] = 30.0,
    device: Device = None,
    dim: Annotated[
        int | None, typer.Option(min=1, help="Width of x and y; by default 512, on a GPU 2048.", show_default=False)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences in a batch; by default 1, on a GPU 8.", show_default=False)
    ] = None,
    length: Annotated[list[int], typer.Option(min=1, help="Tokens in a sequence, T; repeat it.")] = list(LENGTHS),  # noqa: B006
    mixer: Annotated[
        list[str] | None, typer.Option(help="Only this mixer; repeat it. By default all.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for the pages.")] = Path("docs/speed"),
    isolate: Isolate = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="A dry run for a GPU that is not here: sm_80, sm_90, sm_100, gfx942; repeat it.", show_default=False
        ),
    ] = None,
) -> None:
    """Checks every backend on this machine, tunes every mixer, runs the benchmarks and writes the speed pages.

    It is the first thing to run on a new device, from a checkout of the repository. Interrupted and started again, it
    continues: what is measured is not measured again. A wrong backend is reported, never used, and ends it with exit
    code 1 after everything else is done.

    With --target nothing is run: every kernel is compiled for that GPU, the tables of what is predicted for it are
    written into the package, and the pages of both into the folder.
    """
    if target:
        common.only(context, "--target", "target", "out")
        _dry_run(target, out)
        return
    console, where = common.console(), common.device_of(device)
    names = mixer or registry.names()
    for name in names:
        with mistakes():
            registry.get(name)
    wrong = False
    console.rule("1 of 4: is every backend right?", align="left")
    try:
        doctor(str(where))
    except typer.Exit as end:
        wrong = bool(end.exit_code)
    console.rule("2 of 4: tuning", align="left")
    dim, batch = dim or DIM.get(where.type, GPU_DIM), batch or BATCH.get(where.type, GPU_BATCH)
    met = problems(console, names, dim, batch, length, where)
    tune(console, met, 60 * minutes * TUNING, isolate)
    console.rule("3 of 4: benchmarks", align="left")
    swept = sweep(console, minutes * (1 - TUNING), where)
    console.rule("4 of 4: pages", align="left")
    if swept:
        tables(json=None, out=out)
    console.print(Text(f"measurements: {autotune.user_store(autotune.fingerprint(where)).path}", "dim"))
    if wrong:
        raise typer.Exit(1)


def _dry_run(names: list[str], out: Path) -> None:
    console = common.console()
    cards = [targets.target_card(name) for name in names]
    console.rule("1 of 3: what do the mixers meet?", align="left")
    met = targets.problems(console)
    console.rule("2 of 3: compiling", align="left")
    for card in cards:
        targets.write_table(console, card, targets.records(console, card, met, targets.cores()))
        with mistakes():
            targets.write_static(console, card, met, out)
    console.rule("3 of 3: pages", align="left")
    from mixers import tables as pages

    with mistakes():
        for name, content in pages.generated(out).items():
            (out / name).write_bytes(content)
            console.print(Text(str(out / name), "dim"))


def problems(
    console: Console, names: list[str], dim: int, batch: int, lengths: list[int], device: torch.device
) -> list[Problem]:
    """What the mixers meet at these lengths in float32 and bfloat16, forward and backward; decoding forward only."""
    met: dict[Problem, None] = {}
    with console.status("") as status:
        for name in names:
            for dtype in (torch.float32, torch.bfloat16):
                built = common.build(name, dim, {}, dtype=dtype, device=device)
                for length in lengths:
                    status.update(f"{name} at T = {length}")
                    found = common.problems_at(built, batch, length, backward=length > 1)
                    met.update(dict.fromkeys(found))
    return list(met)


def tune(console: Console, met: list[Problem], seconds: float, isolate: bool | None = None) -> None:
    bar = Progress(
        TextColumn("{task.percentage:3.0f}%"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=console,
    )
    start = time.perf_counter()
    with mistakes(), bar:
        task = bar.add_task("", total=len(met))
        made = tune_problems(
            met,
            seconds=seconds,
            isolate=isolate,
            progress=lambda done, _, what: bar.update(task, completed=done, description=what),
        )
    records = [record for records in made.values() for record in records]
    failed = [record for record in records if record.failed]
    for record in failed:
        what = f"{record.key.op} {record.key.direction} {record.backend} {common.config(record.config)}"
        console.print(Text(f"{record.status}: {what}: {record.message}", "red"))
    spent = f"{time.perf_counter() - start:.0f} seconds"
    console.print(f"{len(made)} problems, {len(records)} new measurements, {len(failed)} failures, {spent}")


def sweep(console: Console, minutes: float, device: torch.device) -> bool:
    """`python -m pytest benchmarks`; whether it ran."""
    if not BENCHMARKS.is_dir():
        console.print(f"there is no folder {BENCHMARKS} here; run it in a checkout of the repository to have the pages")
        return False
    options = ["-q", "--resume", "--minutes", f"{minutes:.3g}", "--device", str(device)]
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), *options]
    console.print(Text(" ".join(command[1:]), "dim"))
    done = subprocess.run(command, check=False)
    if done.returncode not in (0, 5):
        common.fail(f"the benchmarks failed (exit {done.returncode})")
    return done.returncode == 0
