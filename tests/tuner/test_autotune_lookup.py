"""What is chosen from given tables, by which rule, and at what price."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from offers import ALL, COMPILED, NAIVE, NATIVE, Offer, chosen

import autotune
from autotune import Key, Record
from autotune.lookup import fastest, newest


def test_nothing_is_known_at_first(make_key: Callable[..., Key]) -> None:
    assert chosen(make_key()) is None
    assert autotune.listing(make_key(), "src") == []
    assert autotune.closest(make_key()) is None


def test_the_fastest_is_chosen_with_its_config(make_key: Callable[..., Key], tables: Callable[..., None]) -> None:
    tables("user", make_key(), (NAIVE, 3.0), (COMPILED, 2.0), (NATIVE, 1.0))
    choice = autotune.choose(make_key(), ALL, "src")
    assert choice is not None
    assert (choice.backend, choice.config, choice.origin) == ("native", {"block": 8}, "exact")
    assert choice.record.median_s == 1.0
    assert chosen(make_key(), ALL[:2]) == ("compiled", "exact")


@pytest.mark.parametrize(
    ("naive", "native", "winner"),
    [
        ((1.0, 0.0), (0.96, 0.0), "naive"),
        ((1.0, 0.0), (0.94, 0.0), "native"),
        ((1.0, 0.2), (0.85, 0.0), "naive"),
        ((1.0, 0.0), (0.85, 0.2), "naive"),
        ((1.0, 0.1), (0.85, 0.1), "native"),
        ((0.9, 0.0), (1.0, 0.0), "naive"),
        ((1.0, 2.0), (0.4, 0.0), "native"),
        ((1.0, 2.0), (0.6, 0.0), "naive"),
        ((1.0, 0.0), (0.4, 0.7), "naive"),
    ],
)
def test_the_simpler_stays_unless_clearly_beaten(
    naive: tuple[float, float], native: tuple[float, float], winner: str, make_record: Callable[..., Record]
) -> None:
    candidates: list[Offer] = [("naive", {}), ("native", {})]
    records = [make_record(b, m, spread_s=s) for b, (m, s) in (("naive", naive), ("native", native))]
    best = fastest(newest(records, "src"), candidates)
    assert best is not None
    assert best.backend == winner


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0, 1)), min_size=1, max_size=6))
def test_no_candidate_clearly_beats_the_chosen_one(make_record: Any, times: list[tuple[float, float]]) -> None:
    records = [make_record(str(i), median, spread_s=spread) for i, (median, spread) in enumerate(times)]
    best = fastest(newest(records, "src"), [(str(i), {}) for i in range(len(times))])
    assert best is not None
    (median, spread), place = best.times, int(best.backend)
    assert median <= times[0][0]
    for after, noise in times[place + 1 :]:
        assert median - after <= max(0.05 * median, spread, noise)


def test_the_order_of_candidates_decides_not_that_of_rows(
    make_key: Callable[..., Key], tables: Callable[..., None]
) -> None:
    tables("user", make_key(), (NATIVE, 1.0), (NAIVE, 1.0), (COMPILED, 1.0))
    assert chosen(make_key()) == ("naive", "exact")
    assert chosen(make_key(), ALL[::-1]) == ("native", "exact")


def test_the_user_beats_what_was_shipped(make_key: Callable[..., Key], tables: Callable[..., None]) -> None:
    tables("shipped", make_key(), (NAIVE, 3.0), (NATIVE, 1.0))
    assert chosen(make_key()) == ("native", "exact")
    tables("user", make_key(), (NATIVE, 9.0))
    assert chosen(make_key()) == ("naive", "exact")
    rows = autotune.listing(make_key(), "src")
    assert [(r.backend, r.median_s, where) for r, where, _ in rows] == [
        ("native", 9.0, "user"),
        ("native", 1.0, "shipped"),
        ("naive", 3.0, "shipped"),
    ]


def test_the_newest_row_of_a_candidate_counts(make_key: Callable[..., Key], tables: Callable[..., None]) -> None:
    tables("user", make_key(), (NAIVE, 3.0), (NATIVE, 1.0), (NATIVE, 9.0))
    assert chosen(make_key()) == ("naive", "exact")
    tables("user", make_key(), (NATIVE, 2.0))
    assert chosen(make_key()) == ("native", "exact")


def test_stale_rows_are_listed_and_not_used(make_key: Callable[..., Key], tables: Callable[..., None]) -> None:
    tables("user", make_key(), (NAIVE, 3.0))
    tables("user", make_key(), (NATIVE, 1.0), source="former")
    assert chosen(make_key()) == ("naive", "exact")
    assert chosen(make_key(), source="former") == ("native", "exact")
    assert chosen(make_key(), source="next") is None
    assert [stale for _, _, stale in autotune.listing(make_key(), "src")] == [True, False]


@pytest.mark.parametrize("status", ["wrong", "error"])
def test_what_failed_is_never_chosen(status: str, make_key: Callable[..., Key], tables: Callable[..., None]) -> None:
    tables("user", make_key(), (NATIVE, 1.0), (NATIVE, status))
    assert chosen(make_key()) is None
    assert [(r.backend, r.status, r.message) for r in autotune.refused(make_key(), "src")] == [
        ("native", status, "because")
    ]
    # Right and fast at another length, but known to fail at this one.
    tables("user", make_key(length=2048), (NATIVE, 1.0), (NAIVE, 5.0))
    assert chosen(make_key()) == ("naive", "nearest length")
    # Measured again, and right this time.
    tables("user", make_key(), (NATIVE, 1.0))
    assert chosen(make_key()) == ("native", "exact")
    assert autotune.refused(make_key(), "src") == []


def test_what_is_wrong_at_one_length_is_not_trusted_unchecked_at_another(
    make_key: Callable[..., Key], tables: Callable[..., None]
) -> None:
    tables("user", make_key(length=16), (NATIVE, "wrong"), (COMPILED, "error"), (NAIVE, 9.0))
    tables("user", make_key(length=2048), (NATIVE, 1.0), (COMPILED, 2.0), (NAIVE, 9.0))
    assert chosen(make_key(length=1024)) == ("compiled", "nearest length")
    assert [r.backend for r in autotune.refused(make_key(length=1024), "src")] == ["native"]
    assert chosen(make_key(length=2048)) == ("native", "exact")
    assert autotune.refused(make_key(length=2048), "src") == []


def test_other_statuses_neither_count_nor_hide(
    make_key: Callable[..., Key], make_record: Callable[..., Record]
) -> None:
    records = [make_record("native", 1.0), make_record("native", "predicted")]
    assert newest(records, "src") == {("native", ()): records[0]}


def test_unknown_candidates_are_ignored(make_key: Callable[..., Key], tables: Callable[..., None]) -> None:
    tables("user", make_key(), (("native", {"block": 16}), 0.1), (("cuda", {}), 0.1), (NAIVE, 3.0))
    assert chosen(make_key()) == ("naive", "exact")
    assert chosen(make_key(), [NATIVE]) is None


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [([512, 4096], 512), ([256, 2048], 2048), ([512, 2048], 2048), ([1, 65536], 65536), ([1], 1), ([64, 65536], 64)],
)
def test_the_nearest_length_is_used_and_of_two_the_longer(
    recorded: list[int], expected: int, make_key: Callable[..., Key], tables: Callable[..., None]
) -> None:
    for length in recorded:
        tables("user", make_key(length=length), (NATIVE, 1.0))
    choice = autotune.choose(make_key(length=1024), ALL, "src")
    assert choice is not None
    assert (choice.origin, choice.record.key.length) == ("nearest length", expected)


def test_a_nearer_length_without_a_usable_row_is_passed_over(
    make_key: Callable[..., Key], tables: Callable[..., None]
) -> None:
    tables("user", make_key(length=512), (NATIVE, "error"), (COMPILED, 1.0))
    tables("user", make_key(length=128), (NATIVE, 1.0))
    assert chosen(make_key(), [NATIVE]) == ("native", "nearest length")


@pytest.mark.parametrize(
    "change",
    [
        {"op": "gla"},
        {"direction": "backward"},
        {"device": "other"},
        {"dtype": "bfloat16"},
        {"sizes": (("B", 2), ("D", 16))},
        {"options": ()},
    ],
)
def test_no_other_field_is_crossed(
    change: dict[str, Any], make_key: Callable[..., Key], tables: Callable[..., None]
) -> None:
    tables("user", make_key(**change), (NATIVE, 1.0))
    assert chosen(make_key()) is None


def test_the_closest_key_says_why_there_is_nothing(make_key: Callable[..., Key], tables: Callable[..., None]) -> None:
    tables("user", make_key(dtype="float64", length=1), (NATIVE, 1.0))
    tables("user", make_key(dtype="bfloat16"), (NATIVE, 1.0))
    other = autotune.closest(make_key())
    assert other is not None
    assert make_key().difference(other) == ["dtype is float32 here, bfloat16 there"]


def test_a_device_that_is_no_file_name_is_refused(make_key: Callable[..., Key]) -> None:
    with pytest.raises(ValueError, match=r"device is '\.\./escape'"):
        chosen(make_key(device="../escape"))


@given(st.lists(st.tuples(st.sampled_from(range(3)), st.sampled_from([1.0, 2.0, "wrong", "error"])), max_size=8))
@settings(max_examples=50, deadline=None)
def test_the_chosen_one_is_always_the_newest_ok_row_of_a_candidate(
    tmp_path_factory: pytest.TempPathFactory, make_key: Any, make_record: Any, rows: list[tuple[int, Any]]
) -> None:
    with autotune.using(tmp_path_factory.mktemp("rows") / "table.jsonl") as store:
        last = {}
        for which, outcome in rows:
            backend, config = ALL[which]
            store.append(make_record(backend, outcome, config=config))
            last[backend] = outcome
        ok = {backend for backend, outcome in last.items() if isinstance(outcome, float)}
        choice = autotune.choose(make_key(), ALL, "src")
        assert (choice is None) == (not ok)
        if choice is not None:
            assert choice.backend in ok
            assert choice.record.median_s == last[choice.backend]
        assert {r.backend for r in autotune.refused(make_key(), "src")} == set(last) - ok
