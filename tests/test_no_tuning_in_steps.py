"""Training with lengths that change all the time: nothing is ever measured, read again, or compiled for each length."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import autotune
import mixers
from autotune import measure, search
from autotune.store import Store
from mixers.state import leaves

# torch.compile may make one graph for the first length, one for all others, and each once more for a backward pass
GRAPHS = 3


def lengths(count: int) -> list[int]:
    rng = random.Random(0)
    return [rng.randint(1, 8192) for _ in range(count)]


def step(mixer: torch.nn.Module, length: int) -> None:
    y, state = mixer(torch.randn(1, length, 4))
    loss = y.square().mean() + sum(tensor.square().mean() for tensor in leaves(state) if tensor.is_floating_point())
    loss.backward()


@pytest.fixture
def reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Files read; any measurement fails. There is no table yet."""
    found: list[Path] = []
    original = Store.read

    def read(store: Store) -> list[autotune.Record]:
        found.append(store.path)
        return original(store)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr(Store, "read", read)
    monkeypatch.setattr(measure.Interleaved, "rounds", never)
    monkeypatch.setattr(search, "search", never)
    with autotune.using(tmp_path / "tuned.jsonl"):
        yield found


@pytest.mark.parametrize("name", ["hgrn", "attention"])
def test_steps_of_any_length_measure_nothing_and_read_each_table_once(name: str, reads: list[Path]) -> None:
    mixer = mixers.build(name, 4)
    for length in lengths(25):
        step(mixer, length)
    fingerprint = autotune.fingerprint(torch.device("cpu"))
    assert sorted(path.name for path in reads) == [f"{fingerprint}.jsonl", "tuned.jsonl"], "shipped and user's table"


def test_one_graph_serves_all_lengths(reads: list[Path]) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    mixer = torch.compile(mixers.build("hgrn", 4), dynamic=True, fullgraph=True, backend=counter)
    for length in lengths(12):
        step(mixer, length)
    assert 1 <= counter.frame_count <= GRAPHS
