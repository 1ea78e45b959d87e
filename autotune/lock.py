"""Choices as an artefact: a file that says which candidate runs each problem, and a run that goes by it.

A lock is JSON that people can read and compare: one entry a problem, sorted. `use` makes the process go by it:

    with autotune.use("tuned.json"):        # or autotune.use("tuned.json") for the rest of the process
        train()

Inside, a problem with an entry runs what the entry says or fails; every other problem goes by the rule, whatever the
tables hold: the same lock gives the same choices everywhere.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from autotune.changes import changed
from autotune.key import Key
from autotune.record import Config

SCHEMA = 1
FORMAT = "sequence-mixers lock"


@dataclass(frozen=True)
class Locked:
    """What a lock says of one problem, and the file that says so."""

    backend: str
    config: Config
    path: Path


class Lock:
    """The entries of one file, by key."""

    def __init__(self, path: Path, entries: Mapping[Key, tuple[str, Config]]) -> None:
        self.path, self.entries = path, dict(entries)
        self._elsewhere = {replace(key, device=""): key.device for key in self.entries}

    def find(self, key: Key) -> Locked | None:
        """The entry of a problem; None if there is none.

        Raises:
            RuntimeError: there is one, but for another device.
        """
        entry = self.entries.get(key)
        if entry is not None:
            return Locked(*entry, self.path)
        device = self._elsewhere.get(replace(key, device=""))
        if device is not None:
            raise RuntimeError(f"autotune: {self.path} locks {key.op} {key.direction} for {device}, not {key.device}")
        return None

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Lock:
        """Raises OSError: the file cannot be read; ValueError: it is no lock of a version that is known here."""
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.get("format") != FORMAT:
                raise ValueError(f"it has no format {FORMAT!r}")
            if data.get("schema") != SCHEMA:
                raise ValueError(f"its schema is {data.get('schema')!r}, expected {SCHEMA}")
            return Lock(path, dict(_entry(entry) for entry in data["choices"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"autotune: {path} is no lock file: {error}") from error

    def write(self) -> None:
        """Writes the file whole or not at all."""
        choices = [
            {**key.to_json(), "backend": backend, "config": dict(config)}
            for key, (backend, config) in sorted(self.entries.items(), key=lambda entry: _order(entry[0]))
        ]
        lines = ",\n".join("    " + json.dumps(choice, sort_keys=True) for choice in choices)
        text = f'{{\n  "format": "{FORMAT}",\n  "schema": {SCHEMA},\n  "choices": [\n{lines}\n  ]\n}}\n'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            # mkstemp's files are for their owner only
            os.chmod(temporary, 0o644)
            os.replace(temporary, self.path)
        except BaseException:
            os.unlink(temporary)
            raise


class use:
    """Goes by a lock from now on, or, as a context manager, inside the block. Locks may be nested: the last one counts.

    Raises:
        OSError: the file cannot be read. ValueError: it is no lock.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.lock = Lock.read(path)
        _locks.append(self.lock)
        changed()

    def __enter__(self) -> Lock:
        return self.lock

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        """Goes by what counted before."""
        if self.lock in _locks:
            _locks.remove(self.lock)
            changed()


_locks: list[Lock] = []


def lock() -> Lock | None:
    """The lock that counts, if there is one."""
    return _locks[-1] if _locks else None


def _entry(entry: Any) -> tuple[Key, tuple[str, Config]]:
    backend, config = entry["backend"], entry["config"]
    if not isinstance(backend, str) or not isinstance(config, dict):
        raise ValueError("backend or config of an entry is of the wrong type")
    return Key.from_json(entry), (backend, config)


def _order(key: Key) -> tuple[Any, ...]:
    return (key.op, key.direction, key.device, key.dtype, key.length, str(key.sizes), str(key.options))
