"""`mixers tune`: measures what a mixer could run on, and remembers the fastest that is right."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

import autotune
from autotune.search import append
from kernels.catalogue import OPS
from kernels.explain import Explanation
from kernels.explain import explain as explained
from kernels.problem import Problem
from kernels.tuning import tune_problems
from mixers.commands import common
from mixers.commands import target as targets
from mixers.commands.common import Backward, Batch, Device, Dim, Dtype, DtypeOption, Isolate, Options, mistakes


def tune(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="A mixer's name, as `mixers list` prints it.", show_default=False)
    ] = None,
    dim: Dim = 512,
    length: Annotated[list[int], typer.Option(min=1, help="Tokens in a sequence, T; repeat it for several.")] = [4096],  # noqa: B006
    batch: Batch = 1,
    dtype: DtypeOption = Dtype.float32,
    device: Device = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="About how long it may take.")] = 60.0,
    backward: Backward = True,
    retime: Annotated[bool, typer.Option("--retime", help="Measure again what is on record.")] = False,
    lock: Annotated[
        Path | None, typer.Option(help="Write what was chosen to this file, for `autotune.use`.", show_default=False)
    ] = None,
    option: Options = None,
    isolate: Isolate = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Compile for a GPU that is not here (sm_80, sm_90, sm_100, gfx942), and predict.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="With --target and no mixer: the folder of the tables that are written.", show_default=False),
    ] = None,
) -> None:
    """Tunes the kernels of a mixer on this machine: checks every candidate, times the right ones, keeps the records.

    From then on backend="auto" goes by them. Interrupted and started again, it continues.

    With --target, every kernel is compiled for a GPU that is not here. What spills registers or does not fit is left
    out, the rest is put in order by a rule (docs/autotune.md), and the first is used on such a GPU until something is
    measured there: for the mixer that is named, in the user's table; for what is shipped, in a folder (--out).
    """
    if target is not None and name is not None:
        common.only(context, "--target and a mixer", "target", "name", "dim", "length", "batch", "dtype", "option")
        _predict(target, name, dim, length, batch, dtype, common.options_of(option))
        return
    if target is not None:
        common.only(context, "--target and no mixer", "target", "out")
        if out is None:
            common.fail(
                "--target needs a mixer's name, or with --out a folder for the tables of all that is shipped", 2
            )
        _predict_all(target, out)
        return
    if out is not None:
        common.fail("--out does nothing without --target", 2)
    if name is None:
        common.fail("which mixer? `mixers list` prints their names; only with --target and --out none is needed", 2)
    console, where = common.console(), common.device_of(device)
    mixer = common.build(name, dim, common.options_of(option), dtype=dtype.torch, device=where)
    console.print(common.subject(mixer, name, batch, length))
    met: list[Problem] = []
    with console.status("which problems does the mixer meet?"):
        for each in length:
            met += [p for p in common.problems_at(mixer, batch, each, backward=backward) if p not in met]
    what = TextColumn("{task.description}")
    bar = Progress(TextColumn("{task.percentage:3.0f}%"), BarColumn(), TimeElapsedColumn(), what, console=console)
    with mistakes(), bar:
        task = bar.add_task("tuning", total=len(met))
        made = tune_problems(
            met,
            seconds=seconds,
            retime=retime,
            isolate=isolate,
            progress=lambda done, _, what: bar.update(task, completed=done, description=what),
        )
    report(console, [explained(OPS[problem.op], problem) for problem in met])
    _tell(console, [record for records in made.values() for record in records], where=autotune.fingerprint(where))
    if lock is not None:
        plans = {OPS[problem.op].key(problem): OPS[problem.op].choose(problem) for problem in met}
        with mistakes():
            autotune.Lock(lock, {key: (plan.backend.name, plan.config) for key, plan in plans.items()}).write()
        console.print(Text(f"{len(plans)} choices locked in {lock}", "dim"))
    console.print(
        Text(f"all candidates: {common.command('explain', name, dim, length[0], batch, dtype, option)}", "dim")
    )


def _predict_all(target: str, out: Path) -> None:
    console, card = common.console(), targets.target_card(target)
    made = targets.records(console, card, targets.problems(console), targets.cores())
    targets.write_table(console, card, made, out)


def _predict(
    target: str,
    name: str,
    dim: int,
    lengths: list[int],
    batch: int,
    dtype: Dtype,
    options: dict[str, Any],
) -> None:
    console, card = common.console(), targets.target_card(target)
    with mistakes():
        met = targets.problems(console, [name], [dim], [batch], lengths, [dtype.torch], options)
    if not met:
        console.print(f"{name} has no op that compiles for GPUs")
        return
    store = autotune.user_store(card.fingerprint)
    for record in targets.records(console, card, met, 1):
        append(store, record)
        key = record.key
        what = f"{key.op} {key.direction} T={key.length} {key.dtype}"
        console.print(Text(f"{what}: {record.backend} {common.config(record.config)}", "bold"))
        console.print(Text(f"  predicted, not measured: {record.message}", "dim"))
    console.print(Text(str(store.path), "dim"))


def report(console: Console, found: list[Explanation]) -> None:
    """One row a problem: what was chosen, how fast it is, and what it beats."""
    table = common.table("problem", "chosen", "time", "GB/s", "beats", right=("time", "GB/s"))
    for each in found:
        best = next((v for v in each.verdicts if v.status == "chosen"), None)
        time = rate = ""
        beats = each.origin
        op = OPS[each.problem.op]
        if best and best.record and best.record.status == "ok" and best.record.key == op.key(each.problem):
            median = best.record.times[0]
            time, rate = common.seconds(median), f"{op.cost(each.problem).bytes / median / 1e9:.3g}"
            beats = _beaten(each) or "nothing else was timed"
        chosen = Text(f"{each.plan.backend.name} ", "bold green").append(common.config(each.plan.config), "not bold")
        table.add_row(Text(str(each.problem)), chosen, time, rate, beats)
    console.print(table)


def _beaten(found: Explanation) -> str:
    """The other backends, each by its best config: "compiled by 1.8×, naive by 312×"."""
    ratios: dict[str, float] = {}
    for verdict in found.verdicts:
        if verdict.ratio is not None and verdict.backend != found.plan.backend.name:
            ratios[verdict.backend] = min(verdict.ratio, ratios.get(verdict.backend, verdict.ratio))
    return ", ".join(f"{backend} by {common.times(ratio)}" for backend, ratio in ratios.items())


def _tell(console: Console, records: list[autotune.Record], where: str) -> None:
    failed = [record for record in records if record.failed]
    for record in failed:
        what = f"{record.key.op} {record.key.direction} {record.backend} {common.config(record.config)}"
        console.print(Text(f"{record.status}: {what}: {record.message}", "red"))
    store = autotune.user_store(where)
    console.print(Text(f"{len(records)} new records, {len(failed)} of them failures, in {store.path}", "dim"))
