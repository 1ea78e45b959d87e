"""Which candidate to run: a pure look-up in the tables, which never times and never writes."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from autotune import store as _store
from autotune.changes import changed, generation
from autotune.device import SAFE, architecture
from autotune.key import Key
from autotune.record import Candidate, Config, Record, candidate
from autotune.store import Store, cache_folder

SHIPPED = Path(__file__).parent / "tables"
# A later candidate is more complicated: it must be this much faster, and by more than the noise.
MARGIN = 0.05


@dataclass(frozen=True)
class Choice:
    """What to run. origin: "exact" or "nearest length" (record.key.length says which), "predicted" for either where
    nothing was measured; record: what decided."""

    backend: str
    config: Config
    origin: str
    record: Record


class _Index:
    """The records of one device by key. Later rows count more: the shipped ones come first, then the user's."""

    def __init__(self, device: str, user: Iterable[Record], path: Path | None) -> None:
        if not SAFE.fullmatch(device):
            raise ValueError(f"autotune: device is {device!r}, expected a fingerprint matching {SAFE.pattern}")
        # of the file whose new records belong here
        self.path = path
        self.rows: dict[Key, list[tuple[Record, str]]] = {}
        self.lengths: dict[tuple[Any, ...], set[int]] = {}
        self.memo: dict[tuple[Key, str, str], tuple[int, list[tuple[str, Config]], Choice | None]] = {}
        self.refusals: dict[tuple[Key, str], tuple[int, list[Record]]] = {}
        for record in _shipped(device):
            self.add(record, "shipped")
        for record in user:
            self.add(record, "user")

    def add(self, record: Record, where: str) -> None:
        rows = self.rows.get(record.key)
        if rows is None:
            rows = self.rows[record.key] = []
            self.lengths.setdefault(record.key.family, set()).add(record.key.length)
        rows.append((record, where))

    def newest(self, key: Key, source: str) -> dict[Candidate, Record]:
        return newest((record for record, _ in self.rows.get(key, ())), source)

    def predicted(self, key: Key, source: str) -> Record | None:
        """The last prediction."""
        rows = self.rows.get(key, ())
        return next((r for r, _ in reversed(rows) if r.status == "predicted" and r.source == source), None)

    def neighbours(self, key: Key) -> list[Key]:
        """The same problem at other lengths, nearest first; of two as near the longer first."""
        lengths = self.lengths.get(key.family, set()) - {key.length}
        order = sorted(lengths, key=lambda n: (abs(math.log2(n / key.length)), -n))
        return [replace(key, length=n) for n in order]


def _shipped(device: str) -> list[Record]:
    """The rows shipped for a device; where none of them is a prediction, those made for a GPU of its architecture."""
    rows, kind = Store(SHIPPED / f"{device}.jsonl").read(), architecture(device)
    if kind and not any(record.status == "predicted" for record in rows):
        for path in sorted(SHIPPED.glob(f"*-{kind}.jsonl")):
            kin = [record for record in Store(path).read() if record.status == "predicted"]
            if kin:
                return [replace(record, key=replace(record.key, device=device)) for record in kin] + rows
    return rows


class _Tables:
    """The user's tables (or a pinned one) over the shipped ones, each device's read when first asked for."""

    def __init__(self, pinned: Store | None = None) -> None:
        self.pinned = pinned
        self.indexes: dict[str, _Index] = {}

    def user(self, device: str) -> Store:
        return self.pinned or Store(cache_folder() / "tuned" / f"{device}.jsonl")

    def index(self, device: str) -> _Index:
        found = self.indexes.get(device)
        if found is None:
            with _lock:
                found = self.indexes.get(device)
                if found is None:
                    store = self.user(device)
                    found = self.indexes[device] = _Index(device, store.read(), store.path)
        return found


_lock = threading.RLock()
# The last one counts; `using` adds one.
_stack = [_Tables()]


def newest(records: Iterable[Record], source: str) -> dict[Candidate, Record]:
    """The last record of each candidate among those that were made with these sources and settle anything."""
    return {r.candidate: r for r in records if r.source == source and (r.status == "ok" or r.failed)}


def fastest(known: Mapping[Candidate, Record], candidates: Sequence[tuple[str, Config]]) -> Record | None:
    """The record to go by. Candidates come simplest first, and each keeps its place unless it is clearly beaten:
    by more than 5 % of its median, and by more than the larger of the two spreads (its own counts for half its median
    at most)."""
    best: Record | None = None
    for backend, config in candidates:
        record = known.get(candidate(backend, config))
        if record is None or record.status != "ok":
            continue
        if best is None or _clearly_faster(record, best):
            best = record
    return best


def _clearly_faster(challenger: Record, incumbent: Record) -> bool:
    (median, spread), (former_median, former_spread) = challenger.times, incumbent.times
    gap = former_median - median
    # a slow one is no harder to beat for being noisy too: twice as fast is fast enough
    return gap > MARGIN * former_median and gap > max(spread, min(former_spread, former_median / 2))


def choose(key: Key, candidates: Sequence[tuple[str, Config]], source: str, compiled_source: str = "") -> Choice | None:
    """The candidate that the tables say is fastest: for this very key, else for the nearest length. Where nothing was
    measured at any length, the one that was predicted, again for this very key or else for the nearest length.

    candidates: (backend, config), simplest first. source: hash of the op's sources; rows of other sources are stale
    and not used. compiled_source: likewise for predictions, which only depend on what is compiled. A candidate found
    wrong or failing is not chosen; one found wrong at any length of this problem is not trusted at a length where
    nobody checked it. None: nothing usable was measured or predicted, and the caller's stated rule decides (see
    `refused`).

    The tables are read at the first call for a device; after that a call is a dictionary access.

    Raises:
        ValueError: the key's device is no fingerprint.
    """
    index = _stack[-1].index(key.device)
    now = generation()
    remembered = index.memo.get((key, source, compiled_source))
    if remembered is not None and remembered[0] == now and remembered[1] == list(candidates):
        return remembered[2]
    # A copy: the caller may change its dictionaries.
    offered: list[tuple[str, Config]] = [(backend, dict(config)) for backend, config in candidates]
    choice = _choose(index, key, offered, source, compiled_source)
    index.memo[key, source, compiled_source] = (now, offered, choice)
    return choice


def _choose(
    index: _Index, key: Key, candidates: list[tuple[str, Config]], source: str, compiled_source: str
) -> Choice | None:
    record = fastest(index.newest(key, source), candidates)
    if record is not None:
        return Choice(record.backend, record.config, "exact", record)
    barred = {record.candidate for record in _refused(index, key, source)}
    trusted = [c for c in candidates if candidate(*c) not in barred]
    neighbours = index.neighbours(key)
    for neighbour in neighbours:
        record = fastest(index.newest(neighbour, source), trusted)
        if record is not None:
            return Choice(record.backend, record.config, "nearest length", record)
    for known in (key, *neighbours):
        record = index.predicted(known, compiled_source)
        if record is not None and any(candidate(*c) == record.candidate for c in trusted):
            return Choice(record.backend, record.config, "predicted", record)
    return None


def refused(key: Key, source: str) -> list[Record]:
    """Why candidates must not run this problem, by rule or otherwise: found wrong or failing for this very key, or
    wrong at another length without having been found right here. One record a candidate."""
    index, now = _stack[-1].index(key.device), generation()
    remembered = index.refusals.get((key, source))
    if remembered is None or remembered[0] != now:
        remembered = index.refusals[key, source] = now, _refused(index, key, source)
    return list(remembered[1])


def _refused(index: _Index, key: Key, source: str) -> list[Record]:
    here = index.newest(key, source)
    found = {name: record for name, record in here.items() if record.failed}
    for neighbour in index.neighbours(key):
        for name, record in index.newest(neighbour, source).items():
            if record.status == "wrong" and name not in here:
                found.setdefault(name, record)
    return list(found.values())


def listing(key: Key, source: str) -> list[tuple[Record, str, bool]]:
    """Every measurement for this very key, those that count most first: (record, "user" or "shipped", whether it is
    stale)."""
    rows = [row for row in _stack[-1].index(key.device).rows.get(key, []) if row[0].status != "predicted"]
    return [(record, where, record.source != source) for record, where in reversed(rows)]


def rows(device: str) -> list[Record]:
    """Every row for the device, shipped and the user's, the oldest of a key first."""
    return [record for found in list(_stack[-1].index(device).rows.values()) for record, _ in found]


def closest(key: Key) -> Key | None:
    """The measured key of the same op and device that differs in the fewest fields; `key.difference` says which.

    Goes through the whole table: for explanations, not for choosing.
    """
    known = list(_stack[-1].index(key.device).rows)
    others = [k for k in known if (k.op, k.device) == (key.op, key.device) and listing(k, "")]
    return min(others, key=lambda k: len(key.difference(k)), default=None)


def user_store(device: str) -> Store:
    """Where measurements of this device (a fingerprint) are saved: the user's file, or the one that `using` pinned."""
    return _stack[-1].user(device)


def refresh() -> None:
    """Forgets what was read, so that the next look-up sees what other processes have written since."""
    with _lock:
        for tables in _stack:
            tables.indexes = {}
    changed()


@contextlib.contextmanager
def using(table: str | os.PathLike[str] | Store) -> Iterator[Store]:
    """Inside the block, one file takes the place of the user's tables, in all threads; the shipped ones stay.

    It is read and appended to, and need not exist yet.
    """
    tables = _Tables(table if isinstance(table, Store) else Store(table))
    _stack.append(tables)
    changed()
    try:
        yield tables.user("")
    finally:
        _stack.remove(tables)
        changed()


def adopt(device: str, records: Iterable[Record]) -> None:
    """These records take the place of the user's table of a device, until `refresh`; what is measured does not join."""
    with _lock:
        _stack[-1].indexes[device] = _Index(device, records, None)
    changed()


def keep(path: Path, record: Record) -> None:
    """Adds a record to what look-ups of the file at `path` see in this process. `Store.append` calls it."""
    with _lock:
        for tables in _stack:
            for device, index in tables.indexes.items():
                if index.path == path and record.key.device == device:
                    index.add(record, "user")
    changed()


_store.appended.append(keep)
