"""Which files an op is made of, and a hash of them: with others, what was measured or predicted is stale."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent
# What asks, checks, chooses and explains computes nothing of a result.
FRAMEWORK = frozenset(
    ROOT / f"{name}.py"
    for name in (
        *("agreement", "backend", "catalogue", "comparison", "declaration", "engine", "explain", "flops", "op"),
        *("predict", "problem", "registration", "sources", "trial", "trial_process", "triton_aot", "tuning"),
    )
)
IMPORT = re.compile(r"^ *from kernels([\w.]*) import (?:\(([^)]*)\)|(.+))$", re.MULTILINE)
INCLUDE = re.compile(r'^#include "(.+)"$', re.MULTILINE)


def own(folder: Path, kind: str) -> list[Path]:
    """The files of an op's folder that run on a device of that kind: on a "gpu" no C++ and nothing that loads it, on a
    "cpu" nothing that is Triton's."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".py", ".cpp", ".h"))
    if kind == "cpu":
        return [path for path in files if not path.name.startswith("triton")]
    return [path for path in files if path.suffix == ".py" and "jit_cpp" not in path.read_text(encoding="utf-8")]


def digest(files: Iterable[Path]) -> str:
    """A hash of what is gathered."""
    whole = hashlib.sha256()
    for path, text in sorted(gathered(files).items()):
        whole.update(f"{path.relative_to(ROOT).as_posix()}\0{text}\0".encode())
    return whole.hexdigest()[:16]


def gathered(files: Iterable[Path]) -> dict[Path, str]:
    """The files and all that they import from `kernels` or include, but the framework, with their texts."""
    found: dict[Path, str] = {}
    todo = sorted(files)
    while todo:
        path = todo.pop()
        if path in found or path in FRAMEWORK:
            continue
        found[path] = path.read_text(encoding="utf-8")
        todo += named(path, found[path])
    return found


def named(path: Path, text: str) -> Iterator[Path]:
    """The files of `kernels` that a file's text imports or includes."""
    if path.suffix != ".py":
        yield from ((path.parent / name).resolve() for name in INCLUDE.findall(text))
        return
    for dots, several, one in IMPORT.findall(text):
        package = ROOT.joinpath(*filter(None, dots.split(".")))
        names = (name.split()[0] for name in (several or one).split(",") if name.strip())
        places = [package.with_suffix(".py"), package / "__init__.py", *(package / f"{name}.py" for name in names)]
        yield from (place for place in places if place.is_file())
