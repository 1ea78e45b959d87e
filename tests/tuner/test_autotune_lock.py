"""A lock says which candidate runs a problem; the run does so or fails."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import autotune
import mixers
from autotune.check import same_bits
from kernels.catalogue import OPS
from kernels.explain import explain
from kernels.op import recording
from kernels.scan import OP, naive, scan

A, X = torch.rand(2, 9, 5), torch.rand(2, 9, 5)


def key(x: torch.Tensor = X) -> autotune.Key:
    return OP.key(OP.problem_of("forward", (x, x, None, None, False, "auto")))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    autotune.Lock(tmp_path / "tuned.json", {key(): ("naive", {})}).write()
    return tmp_path / "tuned.json"


def backend() -> tuple[str, str]:
    plan = OP.choose(OP.problem_of("forward", (A, X, None, None, False, "auto")))
    return plan.backend.name, plan.origin


def test_what_is_written_is_read(path: Path) -> None:
    assert autotune.Lock.read(path).entries == {key(): ("naive", {})}
    data = json.loads(path.read_text())
    assert (data["schema"], len(data["choices"])) == (1, 1)
    assert data["choices"][0]["backend"] == "naive"
    assert os.listdir(path.parent) == ["tuned.json"]


def test_inside_the_block_the_lock_decides_and_after_it_no_longer(path: Path) -> None:
    before = backend()
    assert before[0] != "naive"
    with autotune.use(path):
        assert backend() == ("naive", f"locked by {path}")
        assert explain(OP, OP.problem_of("forward", (A, X, None, None, False, "auto"))).origin == f"locked by {path}"
        # bit for bit what the loop gives
        assert torch.equal(scan(A, X)[0], naive.forward(A, X, None, None, reverse=False)[0])
    assert backend() == before


def test_the_same_lock_gives_the_same_bits_whatever_was_measured_since(tmp_path: Path) -> None:
    mixer, x = mixers.build("hgrn", 8), torch.randn(2, 40, 8)
    with recording() as met:
        mixer(x)[0].sum().backward()
    plans = {OPS[problem.op].key(problem): ("naive", {}) for problem in met}
    autotune.Lock(tmp_path / "tuned.json", plans).write()

    def bits() -> list[torch.Tensor]:
        y, _ = mixer(x)
        return [y, *torch.autograd.grad(y.sum(), list(mixer.parameters()), allow_unused=True)]

    with autotune.use(tmp_path / "tuned.json"):
        before = bits()
    with autotune.using(tmp_path / "table.jsonl") as store:
        for problem, plan in met.items():
            op, times = OPS[problem.op], {"median_s": 1e-9, "spread_s": 0.0}
            made = autotune.Record(
                op.key(problem), plan.backend.name, plan.config, "ok", **times, source=op.source("cpu")
            )
            store.append(made)
        unlocked = bits()
        with autotune.use(tmp_path / "tuned.json"):
            after = bits()
    assert same_bits(after, before)
    assert not same_bits(unlocked, before)


def test_as_a_function_it_lasts_until_it_is_ended(path: Path) -> None:
    using = autotune.use(path)
    try:
        assert backend()[0] == "naive"
    finally:
        using.end()
    assert backend()[0] != "naive"


def test_a_problem_without_an_entry_goes_by_rule_whatever_was_measured(path: Path, tmp_path: Path) -> None:
    long = torch.rand(2, 40, 5)
    problem = OP.problem_of("forward", (long, long, None, None, False, "auto"))
    with autotune.using(tmp_path / "table.jsonl") as store:
        store.append(
            autotune.Record(OP.key(problem), "naive", {}, "ok", median_s=1e-9, spread_s=0.0, source=OP.source("cpu"))
        )
        assert OP.choose(problem).backend.name == "naive"
        with autotune.use(path):
            assert (OP.choose(problem).backend.name, OP.choose(problem).origin) != ("naive", "exact")
            assert OP.choose(problem).origin == "rule"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (("triton", {}), "locks backend 'triton', which cannot run: "),
        (("warp", {}), "locks backend 'warp', which cannot run: there is no such backend"),
        (("naive", {"block": 7}), "locks backend 'naive', which cannot run: it has no such config any more"),
    ],
)
def test_what_is_locked_and_cannot_run_fails(entry: tuple[str, dict[str, int]], message: str, tmp_path: Path) -> None:
    autotune.Lock(tmp_path / "tuned.json", {key(): entry}).write()
    with autotune.use(tmp_path / "tuned.json"), pytest.raises(RuntimeError, match=message):
        scan(A, X)
    scan(A, X)


def test_a_lock_for_another_device_fails(path: Path) -> None:
    with (
        autotune.use(path),
        autotune.pretend("cpu", "another-cpu"),
        pytest.raises(RuntimeError, match=r"locks scan forward for cpu-.*, not another-cpu"),
    ):
        scan(A, X)


NEWER = '{"format": "sequence-mixers lock", "schema": 9, "choices": []}'


@pytest.mark.parametrize("text", ["", "nothing", "{}", NEWER])
def test_what_is_no_lock_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tuned.json").write_text(text)
    with pytest.raises(ValueError, match=r"tuned\.json is no lock file"):
        autotune.use(tmp_path / "tuned.json")
    assert autotune.lock() is None
