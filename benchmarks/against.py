"""Is anything slower than before? `python benchmarks/against.py REVISION`. Exit code 1 if so.

REVISION of this repository, or another folder with the project's files, is compared with the files that are here. Each
of the two trees has a process of its own, which imports nothing of the other, compiles its native code itself, and goes
by rule: no table of the user's is read. Both get the same rows, one at a time, and work in turns of some milliseconds,
A B, B A, and so on; while one works, the other waits. What slows the machine for longer than a turn slows both.

Rows: every op's forward and backward pass by what `backend="auto"` takes where nothing was measured, at lengths from 1
to 65,536; at T = 1 also the public op, without and with gradients; and a layer's step of decoding. On a CPU.

What is called slower: by the rule of `mixers compare`, a median more than 5 % above the other and by more than the
spread of either. A round's two times are first divided by how slow that round was, so that the spread is that of the
ratio. A row that is slower by this rule is measured again in two new processes, for three times as long, and then
once more; it stands as slower only if it was slower each time, by the last one's figures. Rows whose median is
more than 5 % above, but within the spread, are listed at the end: of those this run says nothing.

With --out the two files that `mixers compare` reads are kept there, as before.json and after.json.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import math
import shlex
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import typer
from against_rows import DTYPES, LENGTHS, everything, rows
from against_trees import Measured, Row, Side, Tree, measure
from timer import about

from autotune.lookup import MARGIN
from mixers import tables
from mixers.commands.tables import compare

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("against_worker.py")
# How often a row that seems to be slower is measured again, and for how many times as long
REPEATS, LONGER = 2, 3
# Seconds that a row gets at most, and the share of the time that is kept for those measured again
SECONDS, KEPT = 2.0, 0.3
Start = Callable[[], AbstractContextManager[tuple[Side, Side]]]


def compared(
    wanted: Sequence[Row], start: Start, minutes: float, clock: Callable[[], float] = time.perf_counter
) -> tuple[list[Measured], list[str]]:
    """Every row's last measurement, and what has none, or was not measured again, with the reason. start: gives the
    trees before and after, in new processes."""
    found, notes = dict[str, Measured](), list[str]()
    with start() as sides:
        compile_all(wanted, sides)
    begin = clock()

    def measured(those: Sequence[Row], until: float, most: float) -> None:
        with start() as sides:
            for number, row in enumerate(those):
                left = begin + 60 * minutes * until - clock()
                if left <= 0:
                    notes.append(f"{row}: {'not again, ' if str(row) in found else ''}the time was over")
                    continue
                result = measure(row, sides, min(left / (len(those) - number), most), clock)
                if isinstance(result, Measured):
                    found[str(row)] = result
                    print(f"{result.ratio:5.2f}  {row}", flush=True)
                else:
                    notes.append(f"{row}: {result}")

    measured(wanted, 1 - KEPT, SECONDS)
    for repeat in range(1, REPEATS + 1):
        if not (suspects := [each.row for each in found.values() if verdict(each) == "slower"]):
            break
        print(f"{len(suspects)} seem to be slower; again, in new processes", flush=True)
        measured(suspects, 1 - KEPT * (REPEATS - repeat) / REPEATS, LONGER * SECONDS)
    return list(found.values()), notes


def compile_all(wanted: Sequence[Row], sides: tuple[Side, Side]) -> None:
    """Poses a row of each name, in both trees at once: what is compiled for the first time is not on the minutes."""
    for row in {(row.kind, row.name): row for row in reversed(wanted)}.values():
        for side in sides:
            side.pose(row)
        for side in sides:
            side.posed()


def verdict(each: Measured) -> str:
    """What `mixers compare` says of one row."""
    with tempfile.TemporaryDirectory() as folder:
        (change,) = tables.compare(*write([each], Path(folder)))
    return change.verdict


def write(found: Sequence[Measured], folder: Path) -> tuple[Path, Path]:
    """The two files, as pytest-benchmark saves them."""
    facts = about(torch.device("cpu"))
    files = folder / "before.json", folder / "after.json"
    for side, file in enumerate(files):
        data = {
            "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
            "command": shlex.join(["python", "benchmarks/against.py", *sys.argv[1:]]),
            "benchmarks": [benchmark(each, side, facts) for each in found],
        }
        file.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return files


def benchmark(each: Measured, side: int, facts: dict[str, Any]) -> dict[str, Any]:
    row, rounds = each.row, each.level()[side]
    lower, _, upper = statistics.quantiles(rounds, n=4, method="inclusive")
    return {
        "name": str(row),
        "fullname": f"benchmarks/against.py::{row}",
        "stats": {
            "median": statistics.median(rounds),
            "iqr": upper - lower,
            "rounds": len(rounds),
            "data": rounds,
            # as measured
            "min": each.least[side],
        },
        "extra_info": {
            **facts,
            **{
                name: getattr(row, name)
                for name in ("kind", "name", "variant", "direction", "dtype", "length", "sizes")
            },
            "backend": "auto" if row.kind == "op" else "",
            "config": each.chosen[side],
            "chosen": True,
            "median_as_measured_s": statistics.median(each.rounds[side]),
        },
    }


@contextlib.contextmanager
def exported(revision: str) -> Iterator[Path]:
    """A folder with the project's files at that revision; a folder is taken as it is."""
    if Path(revision).is_dir():
        yield Path(revision).resolve()
        return
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as archive:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "archive", "--format=tar", revision],
            stdout=archive, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{revision!r} is neither a folder nor a revision: {done.stderr.strip()}")
        archive.seek(0)
        with tarfile.open(fileobj=archive) as files:
            files.extractall(folder, filter="data")
        yield Path(folder).resolve()


def starting(before: Path, after: Path, caches: Path) -> Start:
    """Each time the other tree's process is there first: which memory a process gets may make a difference."""
    order = itertools.cycle(((0, 1), (1, 0)))
    trees = ("before", before), ("after", after)

    @contextlib.contextmanager
    def start() -> Iterator[tuple[Side, Side]]:
        with contextlib.ExitStack() as stack:
            there = {}
            for n in next(order):
                name, folder = trees[n]
                there[n] = Tree(name, folder, caches / name, WORKER)
                stack.callback(there[n].close)
            yield there[0], there[1]

    return start


def say(found: Sequence[Measured], notes: Sequence[str], folder: Path) -> int:
    """What `mixers compare` prints of the two files; then more of what it calls slower, and what is not known. The exit
    code."""
    code = 0
    try:
        compare(*write(found, folder))
    except typer.Exit as end:
        code = end.exit_code
    verdicts = [verdict(each) for each in found]
    for each, how in zip(found, verdicts):
        if how == "slower":
            by = " and ".join(f"{chosen}" for chosen in each.chosen) if each.chosen[0] != each.chosen[1] else ""
            least = each.least[1] / each.least[0]
            print(
                f"slower: {each.row}, {each.ratio:.2f} (minima {least:.2f}, {len(each.rounds[0])} rounds) {by}".rstrip()
            )
    print(f"geometric mean of all ratios: {math.exp(statistics.fmean(math.log(each.ratio) for each in found)):.3f}")
    unsure = [
        f"{each.row} {each.ratio:.2f}"
        for each, how in zip(found, verdicts)
        if how == "same" and each.ratio > 1 + MARGIN
    ]
    for what, listed in ((f"more than {MARGIN:.0%} above, but within the spread", unsure), ("without a figure", notes)):
        if listed:
            print("\n  ".join([f"{what} [{len(listed)}]:", *dict.fromkeys(listed)]))
    return code


def main() -> int:
    ops, layers = everything()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="of this repository, or a folder with the project's files")
    parser.add_argument("--op", action="append", choices=ops, help="repeat it; by default all, and all layers")
    parser.add_argument("--layer", action="append", choices=layers, help="repeat it; by default all, and all ops")
    parser.add_argument("--length", action="append", type=int, help=f"repeat it; by default {LENGTHS}")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help=f"repeat it; by default {DTYPES[0]}")
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--cache", type=Path, help="where compiled code is kept; by default it is not")
    parser.add_argument("--out", type=Path, help="where before.json and after.json are kept")
    given = parser.parse_args()
    if not (given.op or given.layer):
        given.op, given.layer = ops, layers
    wanted = list(rows(given.op or (), given.layer or (), given.length or LENGTHS, given.dtype or DTYPES[:1]))
    with exported(given.revision) as before, tempfile.TemporaryDirectory() as folder:
        print(f"{len(wanted)} rows, {torch.get_num_threads()} threads, {given.revision} and {ROOT}", flush=True)
        try:
            found, notes = compared(wanted, starting(before, ROOT, given.cache or Path(folder)), given.minutes)
        except RuntimeError as error:
            sys.exit(str(error))
        if not found:
            sys.exit("\n".join(["nothing was measured:", *notes]))
        out = given.out or Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        return say(found, notes, out)


if __name__ == "__main__":
    sys.exit(main())
