"""The search: nothing measured is lost, and no more is run than was asked for."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from workshop import EXPECTED, Workshop, agree, offered, planted

import autotune
from autotune import Key, Record, Store
from autotune import search as search_module
from autotune.check import Failure, Prepared
from autotune.search import Candidate, DeviceLost, search, trusted


def test_right_candidates_are_timed_and_saved(shop: Workshop, cache: Path, make_key: Callable[..., Key]) -> None:
    candidates = [shop.candidate("naive", 5.0), shop.candidate("native", 2.0, block=8)]
    records = shop.search(make_key(), candidates)
    assert {(r.backend, r.status, r.median_s, r.spread_s, r.rounds) for r in records} == {
        ("naive", "ok", 5.0, 0.0, 3),
        ("native", "ok", 2.0, 0.0, 3),
    }
    assert Store(cache / "tuned" / "toy-device.jsonl").read() == records
    assert all((r.key, r.source) == (make_key(), "src") and r.date and r.torch for r in records)
    choice = autotune.choose(make_key(), offered(candidates), "src")
    assert choice is not None
    assert (choice.backend, choice.config) == ("native", {"block": 8})


def test_checked_before_timed_and_timed_interleaved(shop: Workshop, make_key: Callable[..., Key]) -> None:
    shop.search(make_key(), [shop.candidate(n) for n in "ab"])
    assert "".join(shop.log) == "bbaa" + "ba" + "ab" + "ba"


def test_what_is_recorded_is_not_measured_again(shop: Workshop, make_key: Callable[..., Key]) -> None:
    candidates = [shop.candidate("naive"), shop.candidate("bad", make=planted()["raises"][0])]
    assert len(shop.search(make_key(), candidates)) == 2
    shop.log.clear()
    assert shop.search(make_key(), candidates) == []
    assert shop.log == []
    assert len(shop.search(make_key(), candidates, retime=True)) == 2
    assert len(shop.search(make_key(), candidates, source="changed")) == 2
    assert len(shop.search(make_key(length=1), candidates)) == 2


def test_the_incumbent_is_timed_again_beside_a_newcomer(shop: Workshop, make_key: Callable[..., Key]) -> None:
    candidates = [shop.candidate("naive", 5.0), shop.candidate("compiled", 2.0)]
    shop.search(make_key(), candidates)
    # The machine is slower now: what counts is the comparison within this search.
    candidates = [shop.candidate("naive", 15.0), shop.candidate("compiled", 6.0), shop.candidate("native", 4.0)]
    records = shop.search(make_key(), candidates)
    assert {r.backend: r.median_s for r in records} == {"compiled": 6.0, "native": 4.0}
    choice = autotune.choose(make_key(), offered(candidates), "src")
    assert choice is not None
    assert choice.backend == "native"


def test_a_search_without_enough_time_learns_the_most_promising_and_goes_on_later(
    shop: Workshop, make_key: Callable[..., Key]
) -> None:
    candidates = [
        shop.candidate("naive", 10.0),
        shop.candidate("triton", 1.0, block=32),
        shop.candidate("triton", 1.0, block=64),
    ]
    # Checks cost 2 (block 32) and 20 (naive), and three quarters of the time are over; a quarter (6) is left for
    # the rounds, where one sample each takes 1 and 10.
    first = shop.search(make_key(), candidates, seconds=24.0)
    assert [(r.backend, *r.config.values()) for r in first] == [("triton", 32), ("naive",)]
    assert [r.rounds for r in first] == [1, 1]
    assert shop.now == 33.0
    second = shop.search(make_key(), candidates)
    assert [(r.backend, *r.config.values()) for r in second] == [("triton", 32), ("triton", 64)]
    assert [r.rounds for r in second] == [3, 3]


def test_who_got_no_round_is_left_for_the_next_search(shop: Workshop, make_key: Callable[..., Key]) -> None:
    candidates = [shop.candidate("naive", 1.0), shop.candidate("compiled", 30.0)]
    # The checks take 60 (compiled) and 2 (naive). A quarter of the time is left, and compiled takes it all.
    records = shop.search(make_key(), candidates, seconds=81.0)
    assert [(r.backend, r.rounds) for r in records] == [("compiled", 1)]
    records = shop.search(make_key(), candidates, seconds=1000.0)
    assert [(r.backend, r.rounds) for r in records] == [("compiled", 2), ("naive", 3)]


def test_a_check_that_takes_all_the_time_does_not_waste_what_was_checked(
    shop: Workshop, make_key: Callable[..., Key]
) -> None:
    def slow_to_compile() -> Prepared:
        shop.now += 60.0
        return shop.candidate("compiled", 0.2).prepare()

    candidates = [Candidate("compiled", {}, slow_to_compile), shop.candidate("native", 0.1)]
    records = shop.search(make_key(), candidates, seconds=5.0)
    assert {r.backend: r.status for r in records} == {"native": "ok", "compiled": "ok"}
    # The compilation, the rest of the checks, a quarter of the time for rounds and one sample begun in it.
    assert shop.now <= 60.0 + 0.6 + 1.25 + 0.2


def test_no_time_at_all_records_nothing(shop: Workshop, cache: Path, make_key: Callable[..., Key]) -> None:
    assert shop.search(make_key(), [shop.candidate("naive")], seconds=0.0) == []
    assert shop.log == []
    assert not cache.exists()


def test_an_interrupted_search_keeps_what_it_has(shop: Workshop, cache: Path, make_key: Callable[..., Key]) -> None:
    calls = itertools.count()

    def interrupted() -> Any:
        # Two calls are checks, the third is its first sample.
        if next(calls) == 3:
            raise KeyboardInterrupt
        return EXPECTED, None

    candidates = [
        shop.candidate("naive", 3.0),
        shop.candidate("bad", make=lambda: (EXPECTED + 1, None)),
        shop.candidate("native", 1.0, interrupted),
    ]
    with pytest.raises(KeyboardInterrupt):
        shop.search(make_key(), candidates)
    saved = Store(cache / "tuned" / "toy-device.jsonl").read()
    assert [(r.backend, r.status, r.rounds) for r in saved] == [
        ("bad", "wrong", 0),
        ("native", "ok", 1),
        ("naive", "ok", 2),
    ]
    assert shop.search(make_key(), candidates) == []


def test_failures_are_on_disk_before_the_next_check(shop: Workshop, cache: Path, make_key: Callable[..., Key]) -> None:
    store = Store(cache / "tuned" / "toy-device.jsonl")
    seen: list[list[str]] = []

    def interrupt() -> Any:
        seen.append([r.backend for r in store.read()])
        raise KeyboardInterrupt

    candidates = [shop.candidate("last", make=interrupt), shop.candidate("bad", make=lambda: (EXPECTED + 1, None))]
    with pytest.raises(KeyboardInterrupt):
        shop.search(make_key(), candidates)
    assert seen == [["bad"]]


def test_a_cache_that_cannot_be_written_costs_one_warning(
    shop: Workshop, cache: Path, make_key: Callable[..., Key]
) -> None:
    # A file where the folder should be: nobody can write below it, root included.
    cache.write_text("")
    candidates = [shop.candidate("naive", 5.0), shop.candidate("native", 1.0)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        records = shop.search(make_key(), candidates)
        shop.search(make_key(length=1), candidates)
    assert {r.backend for r in records} == {"naive", "native"}
    assert [str(w.message).split(": ")[1].split(" in ")[0] for w in caught] == [
        "cannot read the table " + str(cache / "tuned" / "toy-device.jsonl"),
        "cannot save measurements",
    ]
    choice = autotune.choose(make_key(), offered(candidates), "src")
    assert choice is not None
    assert choice.backend == "native"


def test_another_store_can_be_named(shop: Workshop, tmp_path: Path, cache: Path, make_key: Callable[..., Key]) -> None:
    store, candidates = Store(tmp_path / "other.jsonl"), [shop.candidate("naive")]
    records = shop.search(make_key(), candidates, store=store)
    assert store.read() == records
    assert not cache.exists()
    assert shop.search(make_key(), candidates, store=store) == []
    assert autotune.choose(make_key(), offered(candidates), "src") is None


def test_a_pinned_table_is_searched_and_appended_to(
    shop: Workshop, tmp_path: Path, cache: Path, make_key: Callable[..., Key]
) -> None:
    candidates = [shop.candidate("naive")]
    with autotune.using(tmp_path / "pinned.jsonl") as store:
        records = shop.search(make_key(), candidates)
        assert len(records) == 1
        assert store.read() == records
        assert autotune.choose(make_key(), offered(candidates), "src") is not None
    assert not cache.exists()


def test_shipped_rows_do_not_keep_the_user_from_measuring(
    shop: Workshop, make_key: Callable[..., Key], make_record: Callable[..., Record]
) -> None:
    Store(autotune.lookup.SHIPPED / "toy-device.jsonl").append(make_record("naive", 1.0))
    autotune.refresh()
    assert [r.median_s for r in shop.search(make_key(), [shop.candidate("naive", 2.0)])] == [2.0]


def test_progress_counts_to_the_end(shop: Workshop, make_key: Callable[..., Key]) -> None:
    steps: list[tuple[int, int, str]] = []
    candidates = [shop.candidate("naive"), shop.candidate("native", block=8)]
    shop.search(make_key(), candidates, progress=lambda *step: steps.append(step))
    assert steps == [
        (0, 5, "checking native block=8"),
        (1, 5, "checking naive"),
        (2, 5, "timing"),
        (3, 5, "timing"),
        (4, 5, "timing"),
        (5, 5, "timing"),
    ]


def test_a_lost_device_ends_the_search_instead_of_condemning_the_rest(
    shop: Workshop, cache: Path, make_key: Callable[..., Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(search_module, "synchronizer", lambda _: lost)
    candidates = [shop.candidate("naive"), shop.candidate("native", make=planted()["raises"][0])]
    with pytest.raises(
        DeviceLost, match=r"native failed \(RuntimeError: out of shared memory\).*illegal memory access"
    ):
        shop.search(make_key(), candidates)
    assert [r.backend for r in Store(cache / "tuned" / "toy-device.jsonl").read()] == ["native"]


def test_a_candidate_that_fails_its_trial_is_not_run_here(shop: Workshop, make_key: Callable[..., Key]) -> None:
    asked: list[tuple[str, float]] = []

    def trial(candidate: Candidate, seconds: float) -> Failure | None:
        asked.append((candidate.backend, seconds))
        shop.now += 100.0
        return Failure("wrong", "killed by SIGSEGV") if candidate.backend == "native" else None

    candidates = [shop.candidate("naive"), shop.candidate("native")]
    records = {r.backend: r for r in shop.search(make_key(), candidates, trial=trial)}
    assert (records["native"].status, records["native"].message) == ("wrong", "killed by SIGSEGV")
    assert records["naive"].status == "ok"
    assert "native" not in shop.log
    # three quarters of a thousand seconds are for checks
    assert asked == [("native", 750.0), ("naive", 650.0)]


def test_what_gave_no_result_is_tried_again_with_twice_the_time(shop: Workshop, make_key: Callable[..., Key]) -> None:
    def late(_: Candidate, seconds: float) -> Failure:
        return Failure("error", "no result", limit_s=seconds)

    candidates = [shop.candidate("native")]
    (record,) = shop.search(make_key(), candidates, seconds=10.0, trial=late)
    assert record == Record.from_line(record.to_line())
    assert record.limit_s == 7.5
    assert shop.search(make_key(), candidates, seconds=19.0) == []
    assert [r.status for r in shop.search(make_key(), candidates, seconds=20.0)] == ["ok"]
    assert shop.search(make_key(), candidates, seconds=20.0) == []


def test_trusted_is_what_was_right_in_this_direction_with_these_sources(
    tmp_path: Path, make_key: Callable[..., Key], make_record: Callable[..., Record]
) -> None:
    other_size = make_key(length=8, sizes=(("D", 3),))
    rows = [
        make_record("right", key=other_size),
        make_record("stale", source="before"),
        make_record("other direction", key=make_key(direction="backward")),
        make_record("other op", key=make_key(op="gla")),
        make_record("wrong", "wrong"),
    ]
    store = autotune.user_store("toy-device")
    for row in rows:
        store.append(row)
    assert trusted(make_key(), "src") == trusted(make_key(), "src", store) == {("right", ())}
    elsewhere = Store(tmp_path / "other.jsonl")
    assert trusted(make_key(), "src", elsewhere) == set()
    for row in (make_record("there"), make_record("other device", key=make_key(device="toy"))):
        elsewhere.append(row)
    assert trusted(make_key(), "src", elsewhere) == {("there", ())}


def test_a_faulty_reference_is_the_callers_error(shop: Workshop, make_key: Callable[..., Key]) -> None:
    def reference() -> Any:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        search(make_key(), [shop.candidate("naive")], reference, agree, source="src")


def test_real_callables_on_the_real_clock(make_key: Callable[..., Key]) -> None:
    x = torch.ones(64, 64)
    candidates = [
        Candidate("loop", {}, lambda: Prepared(lambda: (torch.stack([row.sum() for row in x]), None))),
        Candidate("sum", {}, lambda: Prepared(lambda: (x.sum(1), None))),
    ]
    records = search(make_key(), candidates, lambda: (x.double().sum(1), None), agree, source="src", seconds=5.0)
    assert {r.backend for r in records} == {"loop", "sum"}
    assert all(r.status == "ok" and r.median_s and r.median_s > 0 for r in records)
