"""The page about all mixers, docs/mixers.md, made from the registry."""

from __future__ import annotations

import torch

from kernels.catalogue import OPS
from kernels.op import Op
from mixers import registry
from mixers.commands.catalogue import Document, state_of

DIM = 512
HEAD = f"""# The mixers

Made by `mixers list --markdown > docs/mixers.md` from what the classes say of themselves; a test keeps it so. Every
mixer is `y, state = mixer(x, state=None, *, cu_seqlens=None)` with x and y [B, T, dim], and keeps the laws of
`mixers.checks`. The state is counted in numbers a sequence at dim {DIM}, with default options; `mixers show NAME` has
the options.

| name | family | parameters | state | ops | source |
|---|---|---|---|---|---|
"""

OPS_HEAD = """
## The ops

Backends, simplest first. Those in brackets run kernels of other packages, or of torch: `auto` takes them only where
they were compared and measured.

| op | backends |
|---|---|
"""


def page() -> str:
    """Our own mixers, without those of other packages."""
    names = [name for name in registry.names() if registry.get(name).__module__ == f"mixers.{name}"]
    rows, sections = [], []
    for name in names:
        with torch.device("meta"):
            mixer = registry.build(name, DIM)
        parameters = sum(p.numel() for p in mixer.parameters())
        facts = mixer.family, f"{parameters:,}", state_of(mixer), ", ".join(mixer.ops), mixer.source
        rows.append(f"| [{name}](#{name}) | {' | '.join(facts)} |\n")
        sections.append(f"\n## {name}\n\n{_section(name)}")
    ops = "".join(f"| {op.name} | {', '.join(_backends(op))} |\n" for op in OPS.values())
    return HEAD + "".join(rows) + OPS_HEAD + ops + "".join(sections)


def _backends(op: Op) -> list[str]:
    """Those that ship with the op; in brackets what runs other packages' kernels."""
    shipped = [backend for backend in op.backends if backend.module.startswith("kernels.")]
    return [f"({backend.name})" if backend.foreign else backend.name for backend in shipped]


def _section(name: str) -> str:
    document = Document(registry.describe(name))
    parts = [document.title]
    parts += [f"```\n{text}\n```" if kind == "equation" else text for kind, text in document.paragraphs]
    return "\n\n".join(parts) + "\n"
