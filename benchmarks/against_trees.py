"""Two trees of files, each with a process of its own, that time the same row in turns: see `against.py`."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

# Of a turn: its length in seconds, how long calls are made untimed before, and that of one of its samples at least
TURN, WARM, SAMPLE = 15e-3, 3e-3, 5e-4
# A call longer than this is made once a turn, and none untimed before; one longer than the other is not timed at all
LONG, TOO_LONG = 0.1, 2.0
FEWEST = 5
LAST_LINES = 20


@dataclass(frozen=True)
class Row:
    """kind: "op" or "mixer". direction of an op: "forward", "backward" or both; of a mixer: "decode", and length the
    tokens before that step. facts: see `kernels.agreement.pose`."""

    kind: str
    name: str
    direction: str
    length: int
    dtype: str
    sizes: dict[str, int]
    variant: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join(filter(None, (self.name, self.variant, self.direction, self.dtype, f"T={self.length}")))


@dataclass(frozen=True)
class Measured:
    """Seconds of a call in each round, and the least of all samples; the tree before and the tree after."""

    row: Row
    rounds: tuple[list[float], list[float]]
    least: tuple[float, float]
    chosen: tuple[dict[str, Any], dict[str, Any]]

    def level(self) -> tuple[list[float], list[float]]:
        """The rounds without what slowed both trees: a round's two times are divided by how slow that round was, which
        is their geometric mean over that of the median round. Their ratio stays."""
        pace = [(before * after) ** 0.5 for before, after in zip(*self.rounds)]
        usual = statistics.median(pace)
        before, after = ([seconds * usual / p for seconds, p in zip(side, pace)] for side in self.rounds)
        return before, after

    @property
    def ratio(self) -> float:
        """Of the tree after to the one before, in the median round."""
        return statistics.median(after / before for before, after in zip(*self.rounds))


class Side(Protocol):
    """What measures one tree's rows."""

    def pose(self, row: Row) -> None:
        """Begins to make the row's tensors."""

    def posed(self) -> dict[str, Any]:
        """Waits for that: {"chosen": ...}, or {"lacks": why there is no such row}."""

    def turn(self, calls: int, samples: int, warm: float) -> list[float]:
        """Seconds of a call in so many samples."""


class Tree:
    """A process whose `autotune`, `kernels` and `mixers` are those of a folder, and its own cache."""

    def __init__(self, name: str, folder: Path, cache: Path, worker: Path) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        here = {
            "PYTHONPATH": str(folder),
            "SEQUENCE_MIXERS_CACHE": str(cache),
            # nothing is written into a tree
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, str(worker), str(folder)],
            env={**os.environ, **here}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip

    def pose(self, row: Row) -> None:
        self._tell({"do": "pose", "row": asdict(row)})

    def posed(self) -> dict[str, Any]:
        return self._hear()

    def turn(self, calls: int, samples: int, warm: float) -> list[float]:
        self._tell({"do": "turn", "calls": calls, "samples": samples, "warm": warm})
        return self._hear()["seconds"]

    def close(self) -> None:
        self._process.kill()
        # closes the pipes too; what could not be sent any more does not matter
        self._process.communicate()
        self._errors.close()

    def _tell(self, request: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._died()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer.endswith("\n"):
            self._died()
        return json.loads(answer)

    def _died(self) -> None:
        code = self._process.wait()
        self._errors.seek(0)
        last = "".join(self._errors.readlines()[-LAST_LINES:]).rstrip()
        raise RuntimeError(f"the process of the tree {self.name} ended with code {code}:\n{last}")


def measure(
    row: Row, sides: tuple[Side, Side], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> Measured | str:
    """The row in turns, A B, B A, ..., until `seconds` are over and at least FEWEST rounds were made; or why not."""
    for side in sides:
        side.pose(row)
    # both before either is looked at: an answer must not be left behind
    answers = [side.posed() for side in sides]
    for when, answer in zip(("before", "after"), answers):
        if "lacks" in answer:
            return f"not in the tree {when}: {answer['lacks'].partition(chr(10))[0]}"
    once = max(min(side.turn(1, 2, 0.0)) for side in sides)
    if once > TOO_LONG:
        return f"a call takes {once:.1f} s, more than {TOO_LONG:g}"
    calls = max(round(SAMPLE / once), 1)
    samples = max(round(TURN / (calls * once)), 1)
    warm = 0.0 if once > LONG else WARM
    taken: tuple[list[list[float]], list[list[float]]] = ([], [])
    end = clock() + seconds
    while len(taken[0]) < FEWEST or clock() < end:
        # who had the last turn has the next one
        for n in (0, 1) if len(taken[0]) % 2 == 0 else (1, 0):
            taken[n].append(sides[n].turn(calls, samples, warm))
    medians = [[statistics.median(turn) for turn in turns] for turns in taken]
    least = [min(min(turn) for turn in turns) for turns in taken]
    return Measured(row, (medians[0], medians[1]), (least[0], least[1]), (answers[0]["chosen"], answers[1]["chosen"]))
