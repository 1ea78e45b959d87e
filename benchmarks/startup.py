"""How long it takes until something runs: `python benchmarks/startup.py`. Exit code 1 for a miss.

Importing the package beside importing torch, each in a process of its own, in turns; and compiling each C++ file for
the first time, into an empty cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from limits import Row, main, medians

import kernels.scan

COMPILE = """
import sys, time
from pathlib import Path
from kernels import jit_cpp
for source in sys.argv[1:]:
    start = time.perf_counter()
    jit_cpp.load(Path(source))
    print(Path(source).parent.name, time.perf_counter() - start)
"""


def importing(rounds: int) -> Iterator[Row]:
    programs = ("import torch", "import mixers", "import mixers; mixers.build('hgrn', 8)")
    runs: list[Callable[[], object]] = [partial(python, program) for program in programs]
    torch_s, mixers_s, layer_s = medians(runs, max(rounds // 4, 3))
    detail = f"{mixers_s:.2f} s, torch {torch_s:.2f} s"
    yield Row("import mixers over import torch", mixers_s - torch_s, 0.3, "s", detail)
    # what a mixer needs is imported when it is asked for
    yield Row("import mixers and a first layer over import torch", layer_s - torch_s, None, "s", f"{layer_s:.2f} s")


def compiling(rounds: int) -> Iterator[Row]:
    """The one that takes longest; once, whatever the rounds."""
    sources = sorted(Path(kernels.scan.__file__).parents[1].glob("*/native.cpp"))
    with tempfile.TemporaryDirectory() as folder:
        printed = python(COMPILE, *map(str, sources), SEQUENCE_MIXERS_CACHE=folder)
    seconds = {op: float(each) for op, each in map(str.split, printed.splitlines())}
    detail = ", ".join(f"{op} {each:.1f}" for op, each in sorted(seconds.items(), key=lambda item: -item[1]))
    yield Row("first compile of an op's C++, the slowest", max(seconds.values()), 15, "s", detail)


def slowest_imports() -> Iterator[str]:
    """Our own modules and what they import first, by the time inside each, but for torch's."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import torch; import mixers"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = [line.removeprefix("import time:").split("|") for line in done.stderr.splitlines() if line.count("|") == 2]
    names = [name.strip() for _, _, name in lines]
    after = lines[names.index("torch") + 1 :]
    own = sorted(((int(alone), name.strip()) for alone, _, name in after), reverse=True)[:8]
    yield "import: " + ", ".join(f"{name} {alone / 1e3:.0f} ms" for alone, name in own)


def python(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


if __name__ == "__main__":
    sys.exit(main(__doc__, (importing, compiling)))
