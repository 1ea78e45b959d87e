"""Keys and records: equal problems are equal keys, and JSON gives back what it was given."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune import Key, Record, bucket
from autotune.record import SCHEMA, NewerSchema

NAMES = st.text(min_size=1, max_size=8)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
KEYS = st.builds(
    Key.of,
    op=st.text(),
    direction=st.sampled_from(["forward", "backward"]),
    device=st.text(),
    dtype=st.text(),
    sizes=st.dictionaries(NAMES, st.integers()),
    options=st.dictionaries(NAMES, PLAIN),
    length=st.integers(1, 2**40),
)
SECONDS = st.floats(1e-9, 1e6)
FAILURES = st.builds(
    Record,
    key=KEYS,
    backend=st.text(),
    config=st.dictionaries(NAMES, PLAIN),
    status=st.sampled_from(["wrong", "error", "predicted"]),
    message=st.text(),
    source=st.text(),
    date=st.text(),
    threads=st.integers(0, 512),
)
TIMED = st.builds(
    lambda failure, median, spread, rounds: replace(
        failure, status="ok", median_s=median, spread_s=spread, rounds=rounds
    ),
    FAILURES,
    SECONDS,
    st.just(0.0) | SECONDS,
    st.integers(1, 99),
)


@given(st.integers(1, 2**62))
def test_a_bucket_is_the_next_power_of_two(length: int) -> None:
    found = bucket(length)
    assert found & (found - 1) == 0
    assert found // 2 < length <= found


def test_there_is_no_bucket_below_one() -> None:
    with pytest.raises(ValueError, match="length is 0, expected at least 1"):
        bucket(0)


@given(KEYS)
def test_a_key_survives_json(key: Key) -> None:
    again = Key.from_json(json.loads(json.dumps(key.to_json())))
    assert again == key
    assert hash(again) == hash(key)
    assert key.difference(again) == []


@given(FAILURES | TIMED)
def test_a_record_survives_json_as_one_line(record: Record) -> None:
    line = record.to_line()
    assert "\n" not in line
    assert "\r" not in line
    assert Record.from_line(line) == record
    assert Record.from_line(line.encode()) == record


@given(KEYS, st.randoms())
def test_the_order_of_names_does_not_matter(key: Key, random: Any) -> None:
    sizes, options = list(key.sizes), list(key.options)
    random.shuffle(sizes)
    random.shuffle(options)
    assert replace(key, sizes=tuple(sizes), options=tuple(options)) == key


def test_a_difference_names_each_field_and_both_values(make_key: Callable[..., Key]) -> None:
    key = make_key()
    other = replace(
        key, dtype="bfloat16", sizes=(("B", 2), ("D", 16)), options=(("packed", True), ("reverse", True)), length=1
    )
    assert key.difference(other) == [
        "dtype is float32 here, bfloat16 there",
        "sizes.D is 8 here, 16 there",
        "options.packed is absent here, True there",
        "length is 1024 here, 1 there",
    ]


@pytest.mark.parametrize("field", [field.name for field in fields(Key)])
def test_every_field_of_a_key_counts(field: str, make_key: Callable[..., Key]) -> None:
    other = {"direction": "backward", "sizes": (), "options": (), "length": 1}.get(field, "other")
    key, changed = make_key(), make_key(**{field: other})
    assert key != changed
    assert len(key.difference(changed)) >= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction": "sideways"}, "direction is 'sideways'"),
        ({"length": 1000}, "length is 1000, expected a power of two"),
        ({"length": 0}, "length is 0"),
        ({"sizes": (("B", 1), ("B", 2))}, "sizes names something twice"),
    ],
)
def test_impossible_keys_are_refused(changes: dict[str, Any], message: str, make_key: Callable[..., Key]) -> None:
    with pytest.raises(ValueError, match=message):
        make_key(**changes)


@pytest.mark.parametrize("median", [None, math.nan, math.inf, 0.0, -1.0])
def test_ok_needs_a_time(median: float | None, make_key: Callable[..., Key]) -> None:
    with pytest.raises(ValueError, match="median_s"):
        Record(make_key(), "native", {}, "ok", median_s=median, spread_s=0.0)


def test_fields_and_versions_to_come_are_read(make_record: Callable[..., Record]) -> None:
    record = make_record("native", 2.0)
    data = json.loads(record.to_line())
    data |= {"schema": SCHEMA + 1, "energy_j": 3.5, "status": "predicted"}
    data["key"]["vendor"] = {"name": "x"}
    read = Record.from_line(json.dumps(data))
    assert (read.key, read.backend, read.status, read.schema) == (record.key, "native", "predicted", SCHEMA + 1)


def test_a_later_version_that_cannot_be_used_is_told_from_garbage(make_record: Callable[..., Record]) -> None:
    data = json.loads(make_record("native").to_line())
    del data["key"]
    with pytest.raises(ValueError, match="key"):
        Record.from_line(json.dumps(data))
    with pytest.raises(NewerSchema):
        Record.from_line(json.dumps({**data, "schema": SCHEMA + 1}))


def test_details_may_be_absent(make_record: Callable[..., Record]) -> None:
    data = json.loads(make_record("native", "wrong").to_line())
    bare = {name: data[name] for name in ("key", "backend", "config", "status")}
    assert Record.from_line(json.dumps(bare)).threads == 0


def test_what_is_not_known_is_left_out_and_null_says_the_same(make_record: Callable[..., Record]) -> None:
    for record, absent in (
        (make_record("native"), {"limit_s", "predicted"}),
        (make_record("native", "wrong"), {"median_s"}),
    ):
        data = json.loads(record.to_line())
        assert not absent & set(data)
        assert None not in data.values()
        assert Record.from_line(json.dumps({**data, **dict.fromkeys(absent)})) == record


@pytest.mark.parametrize(
    "change",
    [
        {"key": 3},
        {"key": {}},
        {"config": [1]},
        {"config": {"block": [1]}},
        {"status": None},
        {"median_s": "fast"},
        {"median_s": True},
        {"median_s": 10**400},
        {"median_s": None},
        {"threads": 1.5},
        {"message": 7},
    ],
)
def test_fields_of_the_wrong_type_are_refused(change: dict[str, Any], make_record: Callable[..., Record]) -> None:
    data = json.loads(make_record("native", 2.0).to_line())
    with pytest.raises(ValueError):
        Record.from_line(json.dumps({**data, **change}))


def test_what_json_cannot_hold_is_refused_before_it_is_written(make_record: Callable[..., Record]) -> None:
    with pytest.raises(ValueError):
        make_record("native", config={"alpha": math.nan}).to_line()
    with pytest.raises(TypeError):
        make_record("native", config={"kernel": object()}).to_line()


def test_a_record_made_here_says_what_made_it(make_key: Callable[..., Key]) -> None:
    record = Record.made_here(make_key(), "native", {}, "error", "cpu", source="src", message="x" * 100_000)
    assert record.torch
    assert record.threads >= 1
    assert record.date.endswith("+00:00")
    assert len(record.message) == 2000
