"""Two trees compared in turns: what is called slower when times are planted, and a process that ends."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from mixers import tables

NAMES = ("against", "against_rows", "against_trees", "against_worker", "machine", "sizes", "timer", "timing")
ROUND = 1e-4


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Of a folder that is not installed."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    yield {name: __import__(name) for name in NAMES if name.startswith("against")}
    for name in NAMES:
        sys.modules.pop(name, None)


class Planted:
    """A tree of which every row takes as long as it is told, on a machine whose mood changes every two turns."""

    def __init__(self, name: str, slowdown: dict[str, float], machine: dict[str, Any]) -> None:
        self.name, self.slowdown, self.machine = name, slowdown, machine

    def pose(self, row: Any) -> None:
        self.row = row.name

    def posed(self) -> dict[str, Any]:
        return {"chosen": {}} if self.row in self.slowdown else {"lacks": "KeyError: no such op"}

    def turn(self, calls: int, samples: int, warm: float) -> list[float]:
        if warm:
            self.machine["turns"].append(self.name)
        mood = (1.0, 3.0, 1.2, 8.0, 2.0)[len(self.machine["turns"][:-1]) // 2 % 5]
        seconds = ROUND * mood * self.slowdown[self.row]
        self.machine["now"] += seconds * calls * samples
        return [seconds] * samples


def test_slower_is_what_is_slower_every_time(files: dict[str, ModuleType], tmp_path: Path) -> None:
    against, Row = files["against"], files["against_trees"].Row
    names = ("same", "slow", "slow once", "fast", "unknown before")
    wanted = [Row("op", name, "forward", 8, "float32", {"B": 1}) for name in names]
    machine: dict[str, Any] = {"now": 0.0, "turns": []}
    passes = itertools.count()

    @contextlib.contextmanager
    def start() -> Iterator[Any]:
        slowdown = {"same": 1.0, "slow": 1.06, "slow once": 1.5 if next(passes) < 2 else 1.0, "fast": 0.5}
        before = Planted("before", dict.fromkeys(slowdown, 1.0), machine)
        yield before, Planted("after", slowdown | {"unknown before": 1.0}, machine)

    found, notes = against.compared(wanted, start, 1.0, lambda: machine["now"])
    changes = tables.compare(*against.write(found, tmp_path))
    verdicts = {what: change.verdict for change in changes for what in names if f" {what} B=1 " in f" {change.what} "}
    assert verdicts == {"same": "same", "slow": "slower", "slow once": "same", "fast": "faster"}
    assert changes[0].ratio == pytest.approx(1.06)
    # to compile, all rows, and twice again
    assert next(passes) == 4
    assert [note.partition(":")[0] for note in notes] == [str(wanted[-1])]
    assert machine["turns"][:6] == ["before", "after", "after", "before", "before", "after"]
    assert against.say(found, notes, tmp_path) == 1


def test_no_time_is_told(files: dict[str, ModuleType]) -> None:
    row = files["against_trees"].Row("op", "scan", "forward", 8, "float32", {"B": 1})
    machine: dict[str, Any] = {"now": 0.0, "turns": []}
    side = Planted("both", {"scan": 1.0}, machine)
    found, notes = files["against"].compared([row], lambda: contextlib.nullcontext((side, side)), 0.0, lambda: 0.0)
    assert (found, len(notes)) == ([], 1)
    assert not machine["turns"]


def test_a_process_that_ends_says_why(files: dict[str, ModuleType], tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("import sys\nsys.stdin.readline()\nsys.exit('no such thing as kernels')")
    tree = files["against_trees"].Tree("before", tmp_path, tmp_path, script)
    tree.pose(files["against_trees"].Row("op", "scan", "forward", 8, "float32", {"B": 1}))
    with pytest.raises(RuntimeError, match="the tree before ended with code 1:\nno such thing as kernels"):
        tree.posed()
    tree.close()


def test_rows_run(files: dict[str, ModuleType]) -> None:
    rows, worker = files["against_rows"], files["against_worker"]
    for row in rows.rows(["scan"], ["hgrn"], [1], ["float32"]):
        call, _ = worker.call_of(vars(row) | {"sizes": {**row.sizes, **({"dim": 8} if row.kind == "mixer" else {})}})
        results = call()
        assert any(isinstance(result, Tensor) for result in results), row
        assert len(worker.turn(call, 1, 2, 0.0)) == 2
    # a length that takes no more to pose than one row
    (long, *_) = rows.rows(["attention"], [], [65536], ["bfloat16"])
    assert long.sizes["H"] == long.sizes["G"] == 1
    with pytest.raises(ImportError, match="not from"):
        worker.own(Path("/nowhere"))
