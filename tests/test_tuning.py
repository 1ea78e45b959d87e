"""Tuning real ops: the fastest right candidate is chosen, a wrong one never, and what went wrong is on record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import CPU, Change, deterministic, planted, problem, right, slow

import autotune
from autotune import search
from kernels import comparison
from kernels.agreement import pose
from kernels.catalogue import OPS
from kernels.comparison import checked_length
from kernels.explain import explain
from kernels.scan import OP as SCAN
from kernels.scan import naive, scan
from kernels.tuning import tune, tune_problems


@pytest.fixture(autouse=True)
def store(tmp_path: Path) -> Iterator[autotune.Store]:
    with autotune.using(tmp_path / "tuned.jsonl") as store:
        yield store


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_fastest_is_chosen_although_the_rule_says_otherwise(
    direction: str, monkeypatch: pytest.MonkeyPatch, store: autotune.Store
) -> None:
    op = planted(monkeypatch, lazy=(slow, slow), lazier=(lambda r: slow(slow(r)), lambda r: slow(slow(r))))
    posed = problem(op, direction)
    before = op.choose(posed)
    records = tune(op, posed, seconds=2, store=store)
    after = op.choose(posed)
    assert (before.backend.name, before.origin) == ("lazier", "rule")
    assert (after.backend.name, after.origin) == ("naive", "exact")
    assert {record.backend: record.status for record in records} == {"naive": "ok", "lazy": "ok", "lazier": "ok"}
    assert len(store.read()) == 3
    with deterministic():
        by_rule = op.choose(posed)
    assert (by_rule.backend.name, by_rule.origin) == ("lazier", "rule")


def one_element(index: int) -> Change:
    """That result with its last element off by 1 %, the others as they are."""

    def change(results: tuple[Any, ...]) -> tuple[Any, ...]:
        changed = [None if tensor is None else tensor.clone() for tensor in results]
        changed[index].view(-1)[-1].mul_(1.01).add_(0.01)
        return tuple(changed)

    return change


@pytest.mark.parametrize(
    ("direction", "change", "reason"),
    [
        ("forward", one_element(0), "h is off by"),
        ("forward", one_element(1), "final_state is off by"),
        ("backward", one_element(0), "da is off by"),
        ("backward", one_element(1), "dx is off by"),
        ("backward", one_element(2), "dinitial_state is off by"),
        ("backward", lambda r: (*r[:2], None), "dinitial_state is NoneType, expected a tensor"),
        ("forward", lambda r: (r[0] * float("nan"), r[1]), "h is not finite"),
        ("forward", lambda r: (r[0].double(), r[1]), "h is torch.float64, expected torch.float32"),
        ("forward", lambda r: (r[0][:, :-1], r[1]), "h has shape [2, 8, 5], expected [2, 9, 5]"),
        ("forward", lambda r: r[0], "returned Tensor, expected 2 tensors"),
    ],
)
def test_a_wrong_backend_is_never_chosen_and_explained(
    direction: str, change: Change, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = planted(
        monkeypatch, honest=(slow, slow), broken=(change, right) if direction == "forward" else (right, change)
    )
    posed = problem(op, direction)
    # more than it takes: on a busy machine a second may pass before all are tried
    tune(op, posed, seconds=30)
    assert op.choose(posed).backend.name == "naive"
    # nor at a length at which nobody tried it
    longer = replace(posed, sizes={**posed.sizes, "T": 100})
    assert op.choose(longer).backend.name == "naive"
    verdict = next(v for v in explain(op, posed).verdicts if v.backend == "broken")
    assert (verdict.status, verdict.ratio) == ("wrong", None)
    assert reason in verdict.reason


def test_a_backend_that_raises_is_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> Any:
        raise RuntimeError("no luck")

    op = planted(monkeypatch, unlucky=(fail, fail))
    posed = problem(op)
    tune(op, posed, seconds=1)
    verdicts = {v.backend: (v.status, v.reason) for v in explain(op, posed).verdicts}
    assert verdicts["unlucky"] == ("error", "RuntimeError: no luck")
    assert verdicts["naive"][0] == "chosen"


def test_what_is_on_record_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    op = planted(monkeypatch, other=(right, right))
    posed = problem(op)
    assert len(tune(op, posed, seconds=1)) == 2
    assert tune(op, posed, seconds=1) == []
    assert len(tune(op, posed, seconds=1, retime=True)) == 2


def test_defaults_first_then_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    op = planted(monkeypatch, other=(right, right))
    configs: list[dict[str, int]] = [{"block": 1}, {"block": 2}, {"block": 3}]
    monkeypatch.setattr(op.backends[1].loaded, "configs", lambda _: configs, raising=False)
    posed = problem(op)
    assert [dict(r.config) for r in tune(op, posed, seconds=1, defaults=True) if r.backend == "other"] == [{"block": 1}]
    # the fastest known one is timed again beside those that are new
    later = [dict(r.config) for r in tune(op, posed, seconds=1) if r.backend == "other"]
    assert all(config in later for config in configs[1:])


def test_candidates_that_take_long_to_start_wait_for_a_longer_search(monkeypatch: pytest.MonkeyPatch) -> None:
    op = planted(monkeypatch, other=(right, right))
    monkeypatch.setattr(op.backends[1].loaded, "startup", lambda problem, config: 100.0, raising=False)
    posed = problem(op)
    assert [record.backend for record in tune(op, posed, seconds=1)] == ["naive"]
    # beside the fastest one known
    assert [record.backend for record in tune(op, posed, seconds=300)] == ["naive", "other"]


def test_where_the_loop_takes_too_long_the_comparison_is_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def seen(results: tuple[Any, ...]) -> tuple[Any, ...]:
        calls.append(results[0].shape[1])
        return results

    op = planted(monkeypatch, spy=(seen, right), wrong=(one_element(0), right))
    posed = replace(problem(op), sizes={**problem(op).sizes, "T": 3000})
    monkeypatch.setattr(comparison, "LOOP_BYTES", op.cost(problem(op)).bytes * 2 * 200 // 9)
    length = checked_length(op, posed, seconds=1000)
    assert length < 200
    # the last chunk of any candidate is cut
    assert length % 64 == 37
    records = tune(op, posed, seconds=300, defaults=True)
    assert {length, 3000} == set(calls)
    spy, wrong = (next(r for r in records if r.backend == name) for name in ("spy", "wrong"))
    assert spy.status == "ok"
    assert spy.message == f"compared with the loop at T = {length}"
    assert wrong.status == "wrong"
    assert wrong.message.endswith(spy.message)
    assert "compared with the loop at T" in next(v for v in explain(op, posed).verdicts if v.backend == "spy").reason


def test_a_short_budget_shortens_the_comparison() -> None:
    posed = replace(problem(), sizes={**problem().sizes, "T": 4096})
    assert checked_length(SCAN, posed, seconds=1e-6) == comparison.SHORTEST
    assert checked_length(SCAN, posed, seconds=1e6) == 4096


def test_several_problems_share_the_time_and_their_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    op = planted(monkeypatch, other=(right, right))
    small, big = problem(op), replace(problem(op), sizes={**problem(op).sizes, "T": 200})
    same_bucket = replace(big, sizes={**big.sizes, "T": 190})
    told: list[tuple[float, int, str]] = []
    made = tune_problems([small, same_bucket, big], seconds=4, progress=lambda *step: told.append(step))
    assert list(made) == [big, small]
    assert all({record.backend for record in records} == {"naive", "other"} for records in made.values())
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[-1] == (2, 2, "done")


def test_the_clock_waits_for_the_problems_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[torch.device] = []
    monkeypatch.setattr(search, "synchronizer", lambda device: lambda: waited.append(device))
    op = planted(monkeypatch, other=(right, right))
    tune(op, problem(op), seconds=1)
    assert set(waited) == {CPU}


def test_a_store_that_cannot_be_written_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    op = planted(monkeypatch, lazy=(slow, slow))
    posed = problem(op)
    (tmp_path / "file").touch()
    with autotune.using(tmp_path / "file" / "tuned.jsonl"):
        with pytest.warns(RuntimeWarning, match="cannot save measurements"):
            records = tune(op, posed, seconds=1)
        assert {record.status for record in records} == {"ok"}
        # for this process it counts all the same
        assert op.choose(posed).backend.name == "naive"


def test_a_corrupt_table_costs_a_warning_and_no_record(store: autotune.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    op = planted(monkeypatch, lazy=(slow, slow))
    posed = problem(op)
    store.path.write_bytes(b'\x00\xff garbage\n{"schema": 1, "key"')
    with pytest.warns(RuntimeWarning, match="no record"):
        assert op.choose(posed).origin == "rule"
    tune(op, posed, seconds=1)
    autotune.refresh()
    with pytest.warns(RuntimeWarning, match="no record"):
        assert op.choose(posed).origin == "exact"


def test_self_attention_at_another_length_is_the_same_problem_but_decoding_is_not() -> None:
    attention, cpu = OPS["attention"], torch.device("cpu")

    def key(length: int, keys: int) -> autotune.Key:
        sizes = {"B": 1, "T": length, "S": keys, "H": 2, "G": 1, "K": 8, "V": 8}
        return attention.key(pose(attention, "forward", sizes, dtype=torch.float32, device=cpu))

    assert key(256, 256).family == key(1024, 1024).family
    assert key(1, 256).family == key(1, 250).family != key(1, 1024).family
    assert key(256, 256).family != key(256, 1024).family


def test_on_a_gpu_auto_is_triton_with_the_config_on_record(
    monkeypatch: pytest.MonkeyPatch, store: autotune.Store
) -> None:
    triton = pytest.importorskip("kernels.scan.triton")
    given: list[Any] = []

    def forward(*args: Any, config: Any, **options: Any) -> Any:
        given.append(config)
        return naive.forward(*args, **options)

    # the tensors stay on the CPU: the backend may run there under the interpreter, and is not really run
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "INTERPRETED", True)
    monkeypatch.setattr(triton, "forward", forward)
    a, x = torch.rand(2, 9, 5), torch.rand(2, 9, 5)
    with autotune.pretend("cpu", "nvidia-h100-80gb-hbm3-sm90"):
        posed = SCAN.problem_of("forward", (a, x, None, None, False, "auto"))
        configs = SCAN.backend("triton").configs(posed)
        scan(a, x)
        assert given == [configs[0]], "by rule, the last backend with its first config"
        key = SCAN.key(posed)
        assert key.device == "nvidia-h100-80gb-hbm3-sm90"
        for config, median in ((configs[0], 3e-6), (configs[1], 2e-6)):
            made = {"median_s": median, "spread_s": 1e-8, "source": SCAN.source("cpu")}
            store.append(autotune.Record(key, "triton", config, "ok", **made))
        h, _ = scan(a, x)
        assert given[1:] == [configs[1]]
    torch.testing.assert_close(h, naive.forward(a, x, None, None, reverse=False)[0])
    scan(a, x)
    assert given[2:] == [configs[0]], "what was measured on one device says nothing about another"
