"""`mixers tables` and `mixers compare`: benchmark results as pages that people can read, and what has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from mixers.commands import common
from mixers.commands.common import console, fail, mistakes

# where pytest-benchmark saves, by benchmarks/pytest.ini
SAVED = Path(".benchmarks")


def tables(
    json: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file that pytest-benchmark saved; repeat it. By default all in .benchmarks, but for rows that "
            "were made with other sources than these.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for the pages.")] = Path("docs/speed"),
    replace: Annotated[
        bool, typer.Option("--replace", help="Without the rows that the folder has from other runs.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; fail if a page is not what its rows give.")
    ] = False,
) -> None:
    """Turns the JSON of `python -m pytest benchmarks` into a page of tables for each device, and an index.

    A row takes the place of the same measurement's in the folder, and the others there stay as they are, with their
    date and versions: a sweep may be spread over several runs.
    """
    import pandas as pd

    from mixers import tables as pages

    with mistakes():
        if check:
            if wrong := pages.check(out):
                fail("\n".join(wrong))
            console().print(f"{out}: every page is what its rows give")
            return
        for file in json or []:
            _must_exist("--json", file)
        if json:
            rows = pd.concat(map(pages.read, json), ignore_index=True)
        else:
            rows = pages.current(pages.saved(SAVED))
        if rows.empty:
            fail(f"no results of these sources in {SAVED}; make some with: python -m pytest benchmarks", 2)
        written = pages.write(rows, out, replace=replace)
    for path in written:
        console().print(str(path))


def compare(
    old: Annotated[Path, typer.Argument(help="A file that pytest-benchmark saved.", show_default=False)],
    new: Annotated[Path, typer.Argument(help="A later one.", show_default=False)],
    everything: Annotated[bool, typer.Option("--all", help="Also what has not changed beyond the noise.")] = False,
) -> None:
    """Says what got slower or faster between two benchmark runs; exit code 1 if anything got slower.

    A change counts if it is more than 5 % and more than the spread of either measurement.
    """
    from mixers import tables as pages

    for name, file in (("old", old), ("new", new)):
        _must_exist(name, file)
    with mistakes():
        changes = pages.compare(old, new)
    shown = changes if everything else [change for change in changes if change.verdict != "same"]
    table = common.table("measurement", "old", "new", "new / old", "", right=("old", "new", "new / old"))
    for change in shown:
        style = {"slower": "bold red", "faster": "green"}.get(change.verdict, "dim")
        times = common.seconds(change.old), common.seconds(change.new), f"{change.ratio:.2f}"
        table.add_row(change.what, *times, Text(change.verdict, style))
    if shown:
        console().print(table)
    counts = {verdict: sum(change.verdict == verdict for change in changes) for verdict in ("slower", "faster", "same")}
    console().print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if counts["slower"]:
        raise typer.Exit(1)


def _must_exist(name: str, file: Path) -> None:
    if not file.is_file():
        fail(f"{name} is {str(file)!r}, which is no file", 2)
