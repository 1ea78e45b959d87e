"""What the commands share: arguments, a console that is sane in a pipe, errors of one line, numbers for people."""

from __future__ import annotations

import ast
import contextlib
import enum
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import autotune
from kernels.op import Plan, recording
from kernels.problem import Problem
from kernels.rehearsal import rehearsing
from mixers import registry
from mixers.mixer import SequenceMixer
from mixers.units import count, seconds, times

__all__ = ["console", "count", "device_of", "fail", "mistakes", "seconds", "table", "times"]

# Where output goes to a file or a pipe, there is no window to fit.
PIPED_WIDTH = 160
PROSE_WIDTH = 100
# Set by `mixers --traceback`.
show_tracebacks = False


class Dtype(str, enum.Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"

    @property
    def torch(self) -> torch.dtype:
        return getattr(torch, self.value)


Name = Annotated[str, typer.Argument(help="A mixer's name, as `mixers list` prints it.", show_default=False)]
Dim = Annotated[int, typer.Option(min=1, help="Width of x and y.")]
Length = Annotated[int, typer.Option(min=1, help="Tokens in a sequence, T.")]
Batch = Annotated[int, typer.Option(min=1, help="Sequences in a batch, B.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Of the parameters and x.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, mps, ...; by default the GPU if there is one.", show_default=False),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--option", "-o", metavar="NAME=VALUE", help="An option of the mixer; repeat it.", show_default=False),
]
Isolate = Annotated[
    bool | None,
    typer.Option(
        "--isolate/--no-isolate",
        help="Try what is not known to be right in another process first, which alone ends if it crashes or hangs; "
        "by default other packages' kernels, and on a GPU all kernels.",
        show_default=False,
    ),
]
Backward = Annotated[bool, typer.Option("--backward/--no-backward", help="Training, or only the forward pass.")]


def console() -> Console:
    """Writes to what is stdout now; wide where that is no terminal."""
    piped = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=PIPED_WIDTH if piped else None, highlight=False)


def prose_width(console: Console) -> int:
    """Lines longer than this are hard to read."""
    return min(console.width, PROSE_WIDTH)


def fail(message: object, code: int = 1) -> NoReturn:
    """One line (or the few that the message has) on stderr, and the end. code: 2 for a wrong call, else 1."""
    lines = str(message).strip() or "failed"
    Console(stderr=True, highlight=False, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), lines))
    raise typer.Exit(code)


def only(context: typer.Context, what: str, *names: str) -> None:
    """Fails if an option was given that is none of these parameters: `what` does nothing with it."""
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        # by its name: typer may bring a click of its own
        if source is not None and source.name == "COMMANDLINE" and parameter.name not in names:
            fail(f"{'/'.join((*parameter.opts, *parameter.secondary_opts))} does nothing with {what}", 2)


@contextlib.contextmanager
def mistakes() -> Iterator[None]:
    """Around what a user's arguments reach: what the library says of them, without a traceback."""
    if show_tracebacks:
        yield
        return
    try:
        yield
    except (ValueError, TypeError) as error:
        fail(error, 2)
    # typer.Exit is a RuntimeError
    except (ImportError, typer.Exit):
        raise
    except (RuntimeError, OSError) as error:
        fail(error, 1)


def options_of(pairs: Sequence[str] | None) -> dict[str, Any]:
    """["complex=False", "norm=rms"] as keyword arguments; what is no Python literal is text."""
    found: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals:
            fail(f"--option is {pair!r}, expected NAME=VALUE", 2)
        try:
            literal = ast.literal_eval(value.capitalize() if value in ("true", "false", "none") else value)
        except (ValueError, SyntaxError):
            literal = value
        found[name.strip().replace("-", "_")] = literal
    return found


def device_of(name: str | None) -> torch.device:
    """The device of that name; by default the accelerator, if there is one, else the CPU."""
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return there or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        fail(f"--device is {name!r}, expected cpu, cuda, cuda:1, mps or the like", 2)
    if device.type == "meta":
        fail("--device is 'meta', which runs nothing", 2)
    if device.type != "cpu":
        if there is None or there.type != device.type:
            fail(f"--device is {name!r}, but torch finds no such device here", 1)
        if device.index is not None and device.index >= torch.accelerator.device_count():
            fail(f"--device is {name!r}, but there are {torch.accelerator.device_count()} of that type", 1)
    return device


def build(
    name: str, dim: int, options: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, device: torch.device
) -> SequenceMixer:
    with mistakes(), torch.device(device):
        return registry.build(name, dim, **options).to(dtype)


def problems_of(mixer: SequenceMixer, batch: int, length: int, *, backward: bool) -> dict[Problem, Plan]:
    """The problems that a forward (and backward) pass of the mixer meets, each with the plan that ran."""
    parameter = next(mixer.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, mixer.dim, generator=generator).to(parameter.device, parameter.dtype)
    x.requires_grad_(backward)
    with mistakes(), recording() as met, torch.set_grad_enabled(backward):
        y, _ = mixer(x)
        if backward:
            y.sum().backward()
    return met


def problems_at(mixer: SequenceMixer, batch: int, length: int, *, backward: bool) -> list[Problem]:
    """The same problems. Nothing is computed, but for a single token, which has a way of its own on real tensors, and
    where a mixer looks at numbers."""
    if length > 1:
        # what is wrong with the mixer or its input, the run says too
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            return _rehearsed(mixer, batch, length, backward)
    return list(problems_of(mixer, batch, length, backward=backward))


def _rehearsed(mixer: SequenceMixer, batch: int, length: int, backward: bool) -> list[Problem]:
    first, *others = mixer.parameters()
    with rehearsing() as met, torch.set_grad_enabled(backward):
        x = torch.empty(batch, length, mixer.dim, device=first.device, dtype=first.dtype, requires_grad=backward)
        y, _ = mixer(x)
        if backward:
            # not y.backward(), which would leave fake gradients in the parameters
            torch.autograd.grad(y.sum(), [x, first, *others], allow_unused=True)
    return list(met)


def subject(mixer: SequenceMixer, name: str, batch: int, lengths: Sequence[int]) -> Text:
    """`hgrn  dim 512 · batch 1 · T 4096 · float32 on cpu-...`"""
    parameter = next(mixer.parameters())
    dtype = str(parameter.dtype).removeprefix("torch.")
    where = f"{dtype} on {autotune.fingerprint(parameter.device)}"
    facts = f"  dim {mixer.dim} · batch {batch} · T {', '.join(map(str, lengths))} · {where}"
    return Text.assemble((name, "bold cyan"), (facts, "dim"))


def command(verb: str, name: str, dim: int, length: int, batch: int, dtype: Dtype, option: Sequence[str] | None) -> str:
    """Another command about the same mixer."""
    given = "".join(f" -o {pair}" for pair in option or ())
    return f"mixers {verb} {name} --dim {dim} --length {length} --batch {batch} --dtype {dtype.value}{given}"


@contextlib.contextmanager
def warnings_of_one_line() -> Iterator[None]:
    """Shows what the library warns of as it shows errors: a person needs no file name and line number."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            Text.assemble(("warning: ", "yellow"), str(message))
        )

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def table(*columns: str, right: Sequence[str] = (), **options: Any) -> Table:
    """A quiet table: no frame, columns that fold instead of losing text."""
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", **options)
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def config(values: Mapping[str, Any] | None) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items()) if values else "—"
