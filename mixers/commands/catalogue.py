"""`mixers list` and `mixers show`: what there is, and what one of them is."""

from __future__ import annotations

import inspect
import re
from typing import Annotated, Any

import torch
import typer
from rich.console import Group
from rich.padding import Padding
from rich.panel import Panel
from rich.text import Text

from kernels.catalogue import OPS
from mixers import registry
from mixers.commands import common
from mixers.commands.common import Device, Dim, Name, Options, mistakes
from mixers.commands.probe import backends_here
from mixers.mixer import SequenceMixer

# Lengths at which a state's size is compared: the same at both means that it does not grow.
SHORT, LONG = 1024, 4096


def list_mixers(
    dim: Dim = 512,
    device: Device = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="The page docs/mixers.md instead.")] = False,
) -> None:
    """Lists every mixer: its family, its state, and the kernels it runs on here."""
    if markdown:
        from mixers.commands.page import page

        typer.echo(page(), nl=False)
        return
    console, where = common.console(), common.device_of(device)
    table = common.table("name", "family", f"state at dim {dim}", "kernels here", "source")
    for name in registry.names():
        try:
            mixer = _on_meta(name, dim)
        # a plug-in may raise anything; the others are listed all the same
        except Exception as error:
            table.add_row(Text(name, "bold"), Text(f"cannot be built: {error}", "red"), "", "", "")
            continue
        kernels = [Text(f"{op}: {', '.join(backends_here(OPS[op], where)) or 'none'}") for op in mixer.ops if op in OPS]
        table.add_row(
            Text(name, "bold cyan"),
            mixer.family,
            state_of(mixer),
            Group(*kernels) if kernels else "torch",
            mixer.source,
        )
    console.print(table)
    console.print()
    console.print(Text(f'mixers show NAME tells more; mixers.build("hgrn", dim={dim}) builds one.', "dim"))


def show(name: Name, dim: Dim = 512, option: Options = None) -> None:
    """Shows one mixer: its equation, its options with their defaults, its size."""
    console = common.console()
    with mistakes():
        document = Document(registry.describe(name))
        defaults = registry.options(name)
    mixer = common.build(name, dim, common.options_of(option), device=torch.device("meta"))
    console.print(
        Panel(
            Text(document.title),
            title=Text(name, "bold cyan"),
            title_align="left",
            border_style="cyan",
            width=common.prose_width(console),
        )
    )
    for kind, text in document.paragraphs:
        style = "bold" if kind == "equation" else ""
        padded = Padding(Text(text, style), (0, 0, 1, 4 if kind == "equation" else 1), expand=False)
        console.print(padded, width=common.prose_width(console))
    table = common.table("option", "default", "meaning")
    table.add_row(Text("dim", "cyan"), "", document.arguments.get("dim", ""))
    for option_name, default in defaults.items():
        meaning = document.arguments.get(option_name, "")
        table.add_row(Text(option_name, "cyan"), _default(default), meaning)
    console.print(table)
    console.print()
    parameters = sum(p.numel() for p in mixer.parameters())
    facts = common.table("", "", show_header=False)
    facts.add_row("parameters", f"{parameters:,} at dim {dim}")
    facts.add_row("state", f"{state_of(mixer)} numbers a sequence")
    facts.add_row("kernels", ", ".join(mixer.ops) or "torch alone")
    if mixer.source:
        facts.add_row("source", mixer.source)
    given = "".join(f", {key}={value!r}" for key, value in common.options_of(option).items())
    facts.add_row("build", f'mixers.build("{name}", dim={dim}{given})')
    console.print(facts)


class Document:
    """A docstring in parts: title, paragraphs in order as (kind, text), and the options' meanings."""

    def __init__(self, text: str) -> None:
        body, self.arguments = _arguments(text)
        blocks = [block.strip("\n") for block in re.split(r"\n\s*\n", body) if block.strip()]
        self.title = _joined(blocks[0]) if blocks else ""
        self.paragraphs = [
            (_kind(block), _joined(block) if _kind(block) == "text" else _dedented(block)) for block in blocks[1:]
        ]


def _arguments(text: str) -> tuple[str, dict[str, str]]:
    """The text without its Args section, and that section as a mapping."""
    match = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n(?=[ \t]))*)", text, re.MULTILINE)
    if match is None:
        return text, {}
    found: dict[str, str] = {}
    # options that belong together share an entry
    names: list[str] = []
    for line in match[1].splitlines():
        entry = re.match(r" {4}(\w+(?:, \w+)*):\s*(.*)", line)
        if entry:
            names = entry[1].split(", ")
        for name in names if line.strip() else []:
            found[name] = entry[2] if entry else f"{found[name]} {line.strip()}"
    return text[: match.start()] + text[match.end() :], found


def _kind(block: str) -> str:
    return "equation" if all(line.startswith("    ") for line in block.splitlines()) else "text"


def _dedented(block: str) -> str:
    return "\n".join(line[4:] for line in block.splitlines())


def _joined(block: str) -> str:
    """The lines of a paragraph as one; lines that begin a statement of their own ("Cost: ...") stay apart."""
    return re.sub(r"\n(?![A-Z][a-z]+: )\s*", " ", block)


def _default(value: Any) -> str:
    return "required" if value is inspect.Parameter.empty else repr(value)


def state_of(mixer: SequenceMixer) -> str:
    """The numbers in the state of one sequence, or how many each token adds."""
    short, long = mixer.state_size(SHORT), mixer.state_size(LONG)
    if not mixer.causal:
        return "none"
    if short == long:
        return f"{short:,}"
    return f"{(long - short) / (LONG - SHORT):,.0f} a token"


def _on_meta(name: str, dim: int) -> SequenceMixer:
    with torch.device("meta"):
        return registry.build(name, dim)
