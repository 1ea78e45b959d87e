"""When tables are read, remembered, and read again; and whose count."""

from __future__ import annotations

import builtins
import io
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from offers import ALL, COMPILED, NAIVE, NATIVE, chosen

import autotune
from autotune import Key, Record, Store, lookup


def test_a_lookup_touches_no_file_after_the_first(
    make_key: Callable[..., Key], tables: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables("user", make_key(length=64), (NATIVE, 1.0))
    chosen(make_key(length=64))

    def refuse(*args: Any, **_: Any) -> Any:
        raise AssertionError(f"touches a file: {args[:1]}")

    for module, name in [
        (builtins, "open"),
        (io, "open"),
        (os, "open"),
        (os, "stat"),
        (os, "scandir"),
        (os, "listdir"),
    ]:
        monkeypatch.setattr(module, name, refuse)
    assert chosen(make_key(length=64)) == ("native", "exact")
    assert chosen(make_key(length=1)) == ("native", "nearest length")
    assert chosen(make_key(dtype="float64")) is None
    assert autotune.refused(make_key(), "src") == []
    assert len(autotune.listing(make_key(length=64), "src")) == 1


def test_a_question_asked_again_is_not_worked_out_again(
    make_key: Callable[..., Key], tables: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    tables("user", make_key(), (NATIVE, 1.0))
    keys = [make_key(), make_key(length=1), make_key(dtype="float64")]
    expected = [("native", "exact"), ("native", "nearest length"), None]
    assert [chosen(key) for key in keys] == expected
    monkeypatch.setattr(lookup, "_choose", lambda *_: pytest.fail("worked out again"))
    assert [chosen(key) for key in keys] == expected


def test_the_order_of_a_configs_names_does_not_matter(
    make_key: Callable[..., Key], tables: Callable[..., None]
) -> None:
    tables("user", make_key(), (("native", {"block": 8, "warps": 4}), 1.0))
    assert chosen(make_key(), [("native", {"warps": 4, "block": 8})]) == ("native", "exact")


def test_a_memo_never_outlives_its_question(make_key: Callable[..., Key], tables: Callable[..., None]) -> None:
    tables("user", make_key(), (NAIVE, 3.0), (NATIVE, 1.0))
    tables("user", make_key(), (COMPILED, 1.0), source="former")
    assert chosen(make_key()) == ("native", "exact")
    assert chosen(make_key(), [NAIVE]) == ("naive", "exact")
    assert chosen(make_key(), source="former") == ("compiled", "exact")
    assert chosen(make_key(), tuple(ALL)) == ("native", "exact")
    changing = {"block": 8}
    assert chosen(make_key(), [NAIVE, ("native", changing)]) == ("native", "exact")
    changing["block"] = 16
    assert chosen(make_key(), [NAIVE, ("native", changing)]) == ("naive", "exact")


def test_appending_is_seen_at_once_and_without_reading(
    make_key: Callable[..., Key], make_record: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen(make_key()) is None
    monkeypatch.setattr(Path, "read_bytes", lambda _: pytest.fail("read again"))
    before = autotune.generation()
    autotune.user_store("toy-device").append(make_record("naive"))
    assert autotune.generation() > before
    assert chosen(make_key()) == ("naive", "exact")


def test_others_writing_is_seen_after_a_refresh(
    cache: Path, make_key: Callable[..., Key], make_record: Callable[..., Record]
) -> None:
    assert chosen(make_key()) is None
    path = cache / "tuned" / "toy-device.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text(make_record("naive").to_line() + "\n")
    assert chosen(make_key()) is None
    before = autotune.generation()
    autotune.refresh()
    assert autotune.generation() > before
    assert chosen(make_key()) == ("naive", "exact")


def test_a_pinned_table_takes_the_users_place(
    tmp_path: Path, make_key: Callable[..., Key], make_record: Callable[..., Record], tables: Callable[..., None]
) -> None:
    tables("user", make_key(), (NATIVE, 1.0))
    tables("shipped", make_key(), (NAIVE, 1.0))
    assert chosen(make_key(), [NATIVE]) == ("native", "exact")
    generations = [autotune.generation()]
    with autotune.using(tmp_path / "pinned.jsonl") as pinned:
        generations.append(autotune.generation())
        assert chosen(make_key(), [NATIVE]) is None
        assert chosen(make_key(), [NAIVE]) == ("naive", "exact")
        assert autotune.user_store("toy-device").path == pinned.path
        pinned.append(make_record("compiled", config={"chunk": 64}))
        assert chosen(make_key(), [COMPILED]) == ("compiled", "exact")
        with autotune.using(Store(tmp_path / "inner.jsonl")):
            assert chosen(make_key(), [COMPILED]) is None
        generations.append(autotune.generation())
        assert chosen(make_key(), [COMPILED]) == ("compiled", "exact")
    generations.append(autotune.generation())
    assert generations == sorted(set(generations))
    assert chosen(make_key(), [COMPILED]) is None
    assert chosen(make_key(), [NATIVE]) == ("native", "exact")


def test_a_pin_holds_in_other_threads(
    tmp_path: Path, make_key: Callable[..., Key], make_record: Callable[..., Record]
) -> None:
    found: list[Any] = []
    with autotune.using(tmp_path / "pinned.jsonl") as pinned:
        pinned.append(make_record("naive"))
        thread = threading.Thread(target=lambda: found.append(chosen(make_key())))
        thread.start()
        thread.join()
    assert found == [("naive", "exact")]


def test_without_a_readable_cache_the_shipped_tables_serve(
    cache: Path, make_key: Callable[..., Key], tables: Callable[..., None]
) -> None:
    tables("shipped", make_key(), (NAIVE, 1.0))
    # A file where the folder should be: this cannot be read whoever asks.
    cache.write_text("")
    autotune.refresh()
    with pytest.warns(RuntimeWarning, match="cannot read the table"):
        assert chosen(make_key()) == ("naive", "exact")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(make_key(length=1)) == ("naive", "nearest length")
