"""Warm-up and explanations of a program: its own code path, nothing left behind."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import autotune
import mixers
from autotune import measure
from autotune.program import resized
from kernels import pool


@pytest.fixture(autouse=True)
def store(tmp_path: Path) -> Iterator[autotune.Store]:
    with autotune.using(tmp_path / "tuned.jsonl") as store:
        yield store


def test_warmup_tunes_what_the_program_meets_and_leaves_nothing_behind(store: autotune.Store) -> None:
    mixer, x = mixers.build("mingru", 4).bfloat16(), torch.randn(2, 6, 4, dtype=torch.bfloat16)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    made = autotune.warmup(mixer, x, lengths=[40, 1], seconds=4)
    met = {(p.direction, p.sizes["T"], p.dtype_name) for p in made}
    assert met == {(d, t, "bfloat16") for d in ("forward", "backward") for t in (40, 1)}
    assert {record.key.length for record in store.read()} == {64, 1}
    assert all(parameter.grad is None for parameter in mixer.parameters())
    assert torch.equal(torch.get_rng_state(), before)
    assert pool.idle_bytes() == 0
    # started again it has nothing to do
    again = autotune.warmup(mixer, x, lengths=[40, 1], seconds=4)
    done = {record.candidate for records in made.values() for record in records}
    assert not any(record.candidate in done for records in again.values() for record in records)


def test_warmup_that_is_interrupted_goes_on_where_it_was(
    store: autotune.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer, x = mixers.build("mingru", 4), torch.randn(1, 5, 4)
    rounds = measure.Interleaved.rounds

    def second_is_interrupted(*args: Any) -> None:
        rounds(*args)
        if store.read():
            raise KeyboardInterrupt

    monkeypatch.setattr(measure.Interleaved, "rounds", second_is_interrupted)
    with pytest.raises(KeyboardInterrupt):
        autotune.warmup(mixer, x, seconds=4)
    # what the first search timed, and what the second had timed when it ended
    saved = store.read()
    assert {record.key.direction for record in saved} == {"forward", "backward"}
    assert {record.status for record in saved} == {"ok"}
    assert pool.idle_bytes() == 0
    monkeypatch.undo()
    autotune.warmup(mixer, x, seconds=4)
    again = [(r.key, r.candidate) for r in store.read()[len(saved) :]]
    before = {(r.key, r.candidate) for r in saved}
    # the fastest known one is timed beside those that are new
    for key in {r.key for r in saved}:
        assert sum(k == key and (k, c) in before for k, c in again) <= 1


def test_warmup_starts_with_the_most_expensive_and_says_how_far_it_is() -> None:
    said: list[tuple[float, int, str]] = []
    autotune.warmup(
        mixers.build("mingru", 4), torch.randn(1, 3, 4), lengths=[2, 300], seconds=1, progress=lambda *s: said.append(s)
    )
    assert said[0][2].startswith("hgru backward")
    assert said[-1] == (4, 4, "done")


@pytest.mark.parametrize("terminal", [True, False])
def test_warmup_draws_a_bar_on_a_terminal_only(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", stderr)
    autotune.warmup(mixers.build("mingru", 4), torch.randn(1, 3, 4), seconds=0.5)
    drawn = stderr.getvalue().split("\r\x1b[K")
    if not terminal:
        assert drawn == [""]
        return
    assert drawn[1].startswith(f"[{' ' * 24}] 0/2 hgru backward: ")
    # full at last, and wiped away
    assert drawn[-2:] == [f"[{'=' * 24}] 2/2 done", ""]


def test_problems_that_take_too_much_memory_are_left_out(store: autotune.Store) -> None:
    mixer, x = mixers.build("mingru", 4), torch.randn(1, 3, 4)
    small = 4 * 4 * 3 * 4 * 5
    made = autotune.warmup(mixer, x, lengths=[3, 5000], seconds=1, memory=small)
    assert {problem.sizes["T"] for problem in made} == {3}
    assert autotune.warmup(mixer, x, seconds=1, memory=0) == {}


def test_explain_says_what_runs() -> None:
    found = autotune.explain(mixers.build("mingru", 4), torch.randn(1, 7, 4))
    assert [each.problem.direction for each in found] == ["forward", "backward"]
    text = str(found[0])
    assert text.startswith("hgru forward [")
    assert ": by rule, for nothing was measured" in text
    assert "  triton: cannot, " in text


def test_inputs_of_another_length() -> None:
    x, mask, table = torch.arange(6.0).reshape(1, 3, 2), torch.ones(1, 3), torch.zeros(5)
    longer = resized([x, mask, table, "text"], 5)
    assert [getattr(each, "shape", None) for each in longer] == [(1, 5, 2), (1, 5), (5,), None]
    assert torch.equal(longer[0][:, :3], x)
    assert resized([x.requires_grad_()], 2)[0].requires_grad
    with pytest.raises(ValueError, match="length is 0"):
        resized([x], 0)
    with pytest.raises(ValueError, match="no input is a tensor with an axis 1"):
        resized([table], 3)
