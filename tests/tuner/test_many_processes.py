"""Ten processes tune at once, with neither Triton nor a compiler, and are killed at random moments: nothing is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import autotune

# Every process tunes one problem after the other, and tells each record that is on the disk.
CODE = """
import sys
sys.modules["triton"] = None
import itertools, os, random, signal, time
from pathlib import Path
import torch
import autotune
from autotune import store
from kernels.agreement import pose
from kernels.scan import OP
from kernels.tuning import tune

folder, moments = Path(sys.argv[1]), random.Random(0)

def measure(width, direction, table):
    sizes = {"B": 1, "T": 3, "D": width, "N": 1}
    problem = pose(OP, direction, sizes, dtype=torch.float32, device=torch.device("cpu"))
    tune(OP, problem, seconds=5, store=autotune.Store(folder / table), retime=True)

def slowly(descriptor, data, write=os.write):
    # long enough for another to write beside it, and to be killed in
    time.sleep(0.005)
    written = write(descriptor, data)
    time.sleep(0.005)
    return written

def work(name):
    os.write = slowly
    told = open(folder / name, "ab", buffering=0)
    store.appended.append(lambda path, record: told.write(record.to_line().encode() + b"\\n"))
    for width in itertools.count(1):
        measure(width, "forward", "table.jsonl")
        measure(width, "backward", "table.jsonl")

def lines(name):
    return (folder / name).read_bytes().count(b"\\n") if (folder / name).exists() else 0

# what is imported on first use is imported once
measure(1, "backward", "first.jsonl")
names, workers = [f"told-{n}" for n in range(10)], []
for name in names:
    child = os.fork()
    if not child:
        work(name)
    workers.append(child)
deadline = time.monotonic() + 120
while not all(map(lines, names)) and time.monotonic() < deadline:
    time.sleep(0.02)
for worker in workers:
    time.sleep(moments.uniform(0, 0.1))
    os.kill(worker, signal.SIGKILL)
    _, status = os.waitpid(worker, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork and SIGKILL are POSIX")
def test_ten_processes_tune_at_once_and_are_killed(tmp_path: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CXX": "/no/such/compiler", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", CODE, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    with warnings.catch_warnings():
        # half a line would be one
        warnings.simplefilter("error")
        found = [record.to_line() for record in autotune.Store(tmp_path / "table.jsonl").read()]
    told = [(tmp_path / f"told-{n}").read_text().splitlines() for n in range(10)]
    assert all(told)
    assert {line for lines in told for line in lines} <= set(found)
    # each may have been killed between writing a record and telling it
    assert len(found) <= sum(map(len, told)) + 10
    assert {autotune.Record.from_line(line).status for line in found} == {"ok"}
    assert {autotune.Record.from_line(line).backend for line in found} <= {"naive", "compiled"}
