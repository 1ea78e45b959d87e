"""`mixers explain`: which kernels a mixer runs on here, which it could, and why."""

from __future__ import annotations

from rich.console import Group
from rich.text import Text

from kernels.catalogue import OPS
from kernels.explain import Explanation, Verdict
from kernels.explain import explain as explained
from mixers.commands import common
from mixers.commands.common import Backward, Batch, Device, Dim, Dtype, DtypeOption, Length, Name, Options

COLOURS = {"chosen": "bold green", "slower": "", "as fast": "", "wrong": "red", "error": "red"}


def explain(
    name: Name,
    dim: Dim = 512,
    length: Length = 4096,
    batch: Batch = 1,
    dtype: DtypeOption = Dtype.float32,
    device: Device = None,
    backward: Backward = True,
    option: Options = None,
) -> None:
    """Explains which kernels a mixer runs on: every candidate, and what speaks for or against it.

    Runs the mixer once and collects the problems that it meets. Nothing is measured: `mixers tune` does that.
    """
    console, where = common.console(), common.device_of(device)
    mixer = common.build(name, dim, common.options_of(option), dtype=dtype.torch, device=where)
    with console.status("running the mixer once (the first time may compile kernels)"):
        met = common.problems_of(mixer, batch, length, backward=backward)
    console.print(common.subject(mixer, name, batch, [length]))
    if not met:
        console.print("It uses no op of the catalogue: there is nothing to choose.")
    for problem, plan in met.items():
        console.print()
        console.print(rendered(explained(OPS[problem.op], problem, plan)))
    if any(plan.origin in ("rule", "predicted") for plan in met.values()):
        console.print()
        console.print(Text(f"measure: {common.command('tune', name, dim, length, batch, dtype, option)}", "dim"))


def rendered(found: Explanation) -> Group:
    table = common.table("backend", "config", "time", "verdict", right=("time",))
    for verdict in found.verdicts:
        style = COLOURS.get(verdict.status, "dim")
        time = ""
        if verdict.record is not None and verdict.record.status == "ok":
            median, spread = verdict.record.times
            time = f"{common.seconds(median)} ± {common.seconds(spread)}"
        mark = "▶ " if verdict.status == "chosen" else "  "
        config = common.config(verdict.config) if verdict.config is not None else ""
        cells = (mark + verdict.backend, config, time, _said(verdict))
        table.add_row(*(Text(cell, style) for cell in cells))
    return Group(Text(str(found.problem), "bold"), Text(f"decided {found.origin}", "italic"), table)


def _said(verdict: Verdict) -> str:
    if verdict.status == "slower" and verdict.ratio is not None:
        said = f"slower by {common.times(verdict.ratio)}"
    elif verdict.status == "as fast" and verdict.ratio is not None:
        noise = "the simpler one keeps its place where the gap is within the noise"
        said = f"faster by {common.times(1 / verdict.ratio)}, but {noise}" if verdict.ratio < 0.995 else "as fast"
    else:
        said = {"wrong": "wrong:", "error": "failed:", "cannot": "cannot:"}.get(verdict.status, verdict.status)
        return f"{said} {verdict.reason}" if said.endswith(":") else _with(said, verdict.reason)
    return _with(said, verdict.reason)


def _with(said: str, remark: str) -> str:
    return f"{said} ({remark})" if remark else said
