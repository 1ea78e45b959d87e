"""Rows that were predicted for a device: what they look like, and when they decide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import autotune
from autotune import Key, Record, Store, lookup
from autotune.device import architecture

DEVICE, KIN = "nvidia-h100-80gb-hbm3-sm90", "nvidia-h200-sm90"
SLOW, FAST = ("triton", {"BT": 8}), ("triton", {"BT": 16})
FIGURES = {"programs": 256, "launches": 1, "bytes": 4096, "least": 4000}


@pytest.fixture
def key(make_key: Callable[..., Key]) -> Key:
    return make_key(device=DEVICE)


def predicted(key: Key, config: dict[str, int] = FAST[1], source: str = "compiled", **fields: Any) -> Record:
    return Record(key, "triton", config, "predicted", source=source, predicted=FIGURES, **fields)


def ship(*records: Record) -> None:
    for record in records:
        Store(lookup.SHIPPED / f"{record.key.device}.jsonl").append(record)
    autotune.refresh()


def chosen(key: Key) -> tuple[str, Any] | None:
    choice = autotune.choose(key, [("naive", {}), SLOW, FAST], "src", "compiled")
    return None if choice is None else (choice.origin, choice.config)


def test_a_row_is_short_and_comes_back(key: Key) -> None:
    row = predicted(key, message="256 programs")
    line = row.to_line()
    assert Record.from_line(line) == row
    assert "median_s" not in line
    assert "limit_s" not in line
    with pytest.raises(ValueError, match="predicted is"):
        Record.from_line(line.replace('"programs": 256', '"programs": "many"'))


def test_it_decides_until_something_was_measured_at_any_length(
    key: Key, make_record: Callable[..., Record], make_key: Callable[..., Key]
) -> None:
    assert chosen(key) is None
    ship(predicted(key))
    assert chosen(key) == ("predicted", FAST[1])
    assert chosen(replace(key, length=64)) == ("predicted", FAST[1]), "the nearest length"
    assert autotune.listing(key, "src") == [], "nothing was measured"
    assert autotune.closest(key) is None
    # one measurement far away, of the other config
    measured = make_record(SLOW[0], 1.0, replace(key, length=2**20), config=SLOW[1])
    autotune.user_store(DEVICE).append(measured)
    assert chosen(key) == ("nearest length", SLOW[1])


def test_a_shipped_measurement_wins_too_and_a_failure_bars(key: Key, make_record: Callable[..., Record]) -> None:
    ship(make_record(SLOW[0], 1.0, key, config=SLOW[1]), predicted(key))
    assert chosen(key) == ("exact", SLOW[1])
    other = replace(key, length=16)
    ship(predicted(other, SLOW[1]), predicted(other, FAST[1]))
    # the last line counts, unless its candidate was found wrong here
    autotune.user_store(DEVICE).append(make_record(FAST[0], "wrong", other, config=FAST[1]))
    autotune.user_store(DEVICE).append(make_record(SLOW[0], "wrong", key, config=SLOW[1]))
    assert chosen(other) is None


@pytest.mark.parametrize("stale", [{"source": "before"}, {"config": {"BT": 99}}])
def test_other_sources_and_configs_that_are_gone_do_not_count(key: Key, stale: dict[str, Any]) -> None:
    ship(predicted(key, **stale))
    assert chosen(key) is None


def test_it_serves_cards_of_the_same_architecture(key: Key, make_record: Callable[..., Record]) -> None:
    ship(predicted(key), make_record(SLOW[0], 1.0, key, config=SLOW[1]))
    assert chosen(key) == ("exact", SLOW[1])
    # of the other card predictions count, measurements do not
    assert chosen(replace(key, device=KIN)) == ("predicted", FAST[1])
    assert chosen(replace(key, device="nvidia-a100-sxm4-80gb-sm80")) is None
    ship(predicted(replace(key, device=KIN), SLOW[1]))
    assert chosen(replace(key, device=KIN)) == ("predicted", SLOW[1]), "its own"


def test_the_architecture_is_the_last_part_of_a_name() -> None:
    names = {
        DEVICE: "sm90",
        "amd-instinct-mi300x-gfx942": "gfx942",
        "cpu-intel-xeon-6-167-avx512-2threads": "",
        "mps": "",
    }
    assert {name: architecture(name) for name in names} == names
