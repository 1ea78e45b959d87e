"""The commands of `mixers`, one file each or a few that belong together."""

from __future__ import annotations

from typing import Annotated

import typer

from mixers.commands import calibrate, catalogue, common, demo, doctor, explain, tables, tune

app = typer.Typer(
    name="mixers",
    help="Sequence mixers whose kernels are checked and chosen on your machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def prepare(
    context: typer.Context,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error comes from.")] = False,
) -> None:
    context.with_resource(common.warnings_of_one_line())
    common.show_tracebacks = traceback


app.command("list")(catalogue.list_mixers)
app.command("show")(catalogue.show)
app.command("explain")(explain.explain)
app.command("doctor")(doctor.doctor)
app.command("tune")(tune.tune)
app.command("tables")(tables.tables)
app.command("compare")(tables.compare)
app.command("calibrate")(calibrate.calibrate)
app.command("demo")(demo.demo)
