"""A package adds backends to our ops by entry points: they compete where they were compared, and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RIGHT = """
from kernels.scan.naive import backward, forward
"""
# the gradient of the final state is dropped
WRONG = """
from kernels.scan import naive
from kernels.scan.naive import forward

def backward(dh, dfinal_state, *residuals, **options):
    return naive.backward(dh, None, *residuals, **options)
"""
BROKEN = """
raise OSError("no such library")
"""
ENTRY_POINTS = """[mixers.backends]
scan.right = toy_backends.right
scan.wrong = toy_backends.wrong
scan.broken = toy_backends.broken
scan.missing = toy_backends.missing
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """An installed distribution, as pip leaves it."""
    (tmp_path / "toy_backends").mkdir()
    for name, text in (("__init__", ""), ("right", RIGHT), ("wrong", WRONG), ("broken", BROKEN)):
        (tmp_path / "toy_backends" / f"{name}.py").write_text(text)
    info = tmp_path / "toy_backends-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-backends\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return tmp_path


CODE = """
import torch
import autotune
from kernels.scan import OP, scan
from kernels.explain import explain
from kernels.tuning import tune

a, x, s = torch.rand(1, 9, 3), torch.rand(1, 9, 3), torch.rand(1, 3)
assert [b.name for b in OP.backends if b.foreign] == ["right", "wrong", "broken", "missing"]
forward = OP.problem_of("forward", (a, x, s, None, False, "auto"))
backward = OP.problem_of("backward", (x, s, a, x, s, None, False, 7, "auto"))
assert OP.choose(forward).backend.name not in ("right", "wrong"), "never by rule"
torch.testing.assert_close(scan(a, x, s, backend="right"), scan(a, x, s, backend="naive"))
with autotune.using({table!r}):
    for problem in (forward, backward):
        tune(OP, problem, seconds=3)
    print(explain(OP, backward))
    assert OP.choose(backward).backend.name != "wrong"
"""


def test_the_gate_admits_what_is_right_and_says_what_is_wrong(package: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    code = CODE.format(table=str(package / "tuned.jsonl"))
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = {line.split(":")[0].strip(): line for line in done.stdout.splitlines()[1:]}
    assert " µs" in lines["right"]
    assert "wrong: wrong, da is off by" in lines["wrong"]
    assert "importing toy_backends.broken failed: OSError: no such library" in lines["broken"]
    assert "No module named 'toy_backends.missing'" in lines["missing"]
