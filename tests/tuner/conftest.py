"""Keys and records to test with, and a cache folder of each test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from offers import Offer
from workshop import Workshop

import autotune
from autotune import lookup
from autotune.key import Key
from autotune.record import Record
from autotune.store import Store

KEY = Key("scan", "forward", "toy-device", "float32", (("B", 2), ("D", 8)), (("reverse", True),), 1024)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's cache folder, empty; the folder of shipped tables is another empty one."""
    monkeypatch.setenv("SEQUENCE_MIXERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lookup, "SHIPPED", tmp_path / "shipped")
    autotune.refresh()
    yield tmp_path / "cache"
    autotune.refresh()


@pytest.fixture(scope="session")
def make_key() -> Callable[..., Key]:
    return lambda **changes: replace(KEY, **changes)


@pytest.fixture(scope="session")
def make_record() -> Callable[..., Record]:
    """A record of `backend`: ok with a median in seconds, or wrong or error; further fields by name."""

    def make(backend: str, outcome: float | str = 1.0, key: Key = KEY, **fields: Any) -> Record:
        facts: dict[str, Any] = {"config": {}, "source": "src", **fields}
        if isinstance(outcome, str):
            return Record(key, backend, status=outcome, message="because", **facts)
        return Record(key, backend, status="ok", median_s=outcome, **{"spread_s": 0.0, "rounds": 7, **facts})

    return make


@pytest.fixture
def shop() -> Workshop:
    return Workshop()


@pytest.fixture
def tables(cache: Path, make_record: Callable[..., Record]) -> Callable[..., None]:
    """Appends (candidate, outcome) rows for a key to the "user" or the "shipped" table."""

    def add(where: str, key: Key, *rows: tuple[Offer, Any], **fields: Any) -> None:
        folder = cache / "tuned" if where == "user" else lookup.SHIPPED
        store = Store(folder / f"{key.device}.jsonl")
        for (backend, config), outcome in rows:
            store.append(make_record(backend, outcome, key, config=config, **fields))
        autotune.refresh()

    return add
