"""What is said of a choice: where it comes from, and what became of the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from planted import deterministic, planted, problem, slow

import autotune
from kernels.explain import explain
from kernels.scan import OP as SCAN
from kernels.tuning import tune


@pytest.fixture(autouse=True)
def store(tmp_path: Path) -> Iterator[autotune.Store]:
    with autotune.using(tmp_path / "tuned.jsonl") as store:
        yield store


def test_explain_says_where_a_decision_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    op = planted(monkeypatch, lazy=(slow, slow))
    posed = problem(op)
    longer = replace(posed, sizes={**posed.sizes, "T": 1000})
    other = replace(posed, sizes={**posed.sizes, "D": 6})
    assert "nothing was measured" in explain(op, posed).origin
    tune(op, posed, seconds=1)
    exact, near, far = explain(op, posed), explain(op, longer), explain(op, other)
    assert exact.origin.startswith("measured at this length")
    assert "the user table" in exact.origin
    assert {v.backend: v.status for v in exact.verdicts} == {"naive": "chosen", "lazy": "slower"}
    assert all((v.ratio or 0) > 5 for v in exact.verdicts if v.backend == "lazy")
    assert near.origin.startswith("measured at T ≤ 16, the nearest length on record")
    assert "sizes.D is 6 here, 5 there" in far.origin
    assert {v.backend: v.status for v in far.verdicts} == {"naive": "not measured", "lazy": "chosen"}
    named = explain(op, posed, op.choose(posed, "lazy"))
    assert named.origin == "by name: backend='lazy' was asked for"


def test_explain_says_that_the_sources_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    op = planted(monkeypatch, lazy=(slow, slow))
    posed = problem(op)
    tune(op, posed, seconds=1)
    monkeypatch.setitem(op.__dict__, "source", lambda device: "other")
    found = explain(op, posed)
    assert "the sources of the op have changed since" in found.origin
    assert {v.backend: (v.status, v.reason) for v in found.verdicts} == {
        "naive": ("not measured", "measured with other sources"),
        "lazy": ("chosen", "measured with other sources"),
    }


def test_explain_says_predicted_only_where_that_decided(monkeypatch: pytest.MonkeyPatch, store: autotune.Store) -> None:
    op = planted(monkeypatch, lazy=(slow, slow))
    posed = problem(op)
    store.append(autotune.Record(op.key(posed), "lazy", {}, "predicted", source=op.compiled_source))
    found = explain(op, posed)
    assert found.origin.startswith("predicted, not measured, for this length")
    assert {v.backend: (v.status, v.reason) for v in found.verdicts} == {
        "naive": ("not measured", ""),
        "lazy": ("chosen", "predicted, not measured"),
    }
    with deterministic():
        found = explain(op, posed)
    assert found.origin.startswith("by rule, because torch.use_deterministic_algorithms is on")
    assert {v.backend: (v.status, v.reason) for v in found.verdicts} == {
        "naive": ("not measured", ""),
        "lazy": ("chosen", ""),
    }


def test_what_cannot_run_says_why() -> None:
    verdict = next(v for v in explain(SCAN, problem()).verdicts if v.backend == "triton")
    assert (verdict.status, verdict.config) == ("cannot", None)
    assert "cuda" in verdict.reason.lower()
