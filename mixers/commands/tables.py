"""`mixers tables`: benchmark results as pages that people can read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mixers.commands.common import console, fail, mistakes


def tables(
    json: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file that pytest-benchmark saved; repeat it. By default the newest one.", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for the pages.")] = Path("docs/speed"),
) -> None:
    """Turns the JSON of `python -m pytest benchmarks` into a page of tables for each device, and an index."""
    from mixers import tables as pages

    with mistakes():
        files = json or [pages.newest(Path(".benchmarks"))]
        for file in files:
            if not file.is_file():
                fail(f"--json is {str(file)!r}, which is no file", 2)
        written = pages.write(files, out)
    for path in written:
        console().print(str(path))
