"""Where a device has a queue, a row's calls are queued and waited for once a round, and its tensors are soon drawn."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from kernels import foreign
from kernels.agreement import draw, pose
from kernels.catalogue import OPS

FILES = ("libraries", "sizes", "timing")


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Of a folder that is not installed."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    yield {name: __import__(name) for name in FILES}
    for name in FILES:
        sys.modules.pop(name, None)


def test_the_last_call_of_a_round_waits(files: dict[str, ModuleType]) -> None:
    done: list[str] = []
    call = files["timing"].LastWaits(lambda: done.append("run"), lambda: done.append("wait"), 3)
    for _ in range(7):
        call()
    assert done == [*(["run"] * 3 + ["wait"]) * 2, "run"]
    done.clear()
    files["timing"].seconds_of(lambda: done.append("run"), lambda: done.append("wait"), 2)
    assert done == ["run", "run", "wait"]


@pytest.mark.parametrize("name", OPS)
def test_repeated_rows_pose_the_problem(files: dict[str, ModuleType], name: str) -> None:
    op, sizes = OPS[name], files["sizes"]
    problem = pose(op, "forward", sizes.sizes_of(op, 100), dtype=torch.bfloat16, device=torch.device("cpu"))
    found, drawn = sizes.repeated(op, problem), draw(op, problem)
    for arg, few, every in zip(op.inputs, found.tensors, drawn.tensors):
        assert (few is None) == (every is None)
        if few is not None and every is not None:
            assert (few.shape, few.dtype, few.is_contiguous()) == (every.shape, every.dtype, every.is_contiguous())
            if arg.letters[1:2] == ("T",):
                assert torch.equal(few[:, :36], few[:, 64:])
    args = [*found.tensors, None, *(problem.options[option] for option in op.options), "auto"]
    assert op.problem_of("forward", args) == problem


def test_an_accelerator_gets_more(files: dict[str, ModuleType]) -> None:
    sizes = files["sizes"]
    wide = sizes.sizes_of(OPS["selective_scan"], 8, torch.device("cuda"))
    assert wide == {"B": 8, "D": 2048, "K": 16, "N": 8, "T": 8}
    assert sizes.sizes_of(OPS["gla"], 8, torch.device("cpu")) == sizes.sizes_of(OPS["gla"], 8)


def test_peers_on_a_gpu_are_of_cases(files: dict[str, ModuleType]) -> None:
    libraries = files["libraries"]
    assert {peer.case for peer in libraries.PEERS} == set(libraries.CASES)
    assert len(libraries.peers_of("gla per key", torch.device("cuda"))) == 2
    assert foreign.DISTRIBUTION in {peer.package for peer in libraries.peers_of("scan", torch.device("cuda"))}
