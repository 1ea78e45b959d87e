"""Tries candidates, correctness first, and records what comes of them. The only part that ever runs anything."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autotune import lookup, record
from autotune.check import Agree, Failure, Outputs, Prepared, check, checksums, described
from autotune.device import synchronizer
from autotune.key import Key
from autotune.measure import Interleaved, Timing
from autotune.record import Config, Record
from autotune.store import Store

# Checking may take this share of the time. Its end cannot be foreseen (a candidate may compile for long), so what
# was checked always gets the rest for its rounds: work done is not thrown away.
CHECKING = 0.75
# A candidate this many times slower than the fastest one gets two rounds only.
GIVE_UP = 4.0

# A candidate that gave no result gets another try from a search that can give it so many times as long.
PATIENCE = 2.0

Progress = Callable[[int, int, str], None]

_warned: set[Path] = set()


@dataclass(frozen=True)
class Candidate:
    """Something to try. prepare: makes (compiles, if need be) the call that is compared and timed, and what else is
    compared.

    The call returns its outputs: a tensor, None, a number, or tuples, lists and dicts of them. It may be called many
    times; where it would change its inputs, `prepare` makes it inputs of its own.
    """

    backend: str
    config: Config
    prepare: Callable[[], Prepared]

    @property
    def name(self) -> record.Candidate:
        return record.candidate(self.backend, self.config)

    def __str__(self) -> str:
        return " ".join([self.backend, *(f"{k}={v}" for k, v in self.config.items())])


# Tries a candidate where it can do no harm, in about so many seconds; None: it may be run here.
Trial = Callable[[Candidate, float], "Failure | None"]


class DeviceLost(RuntimeError):
    """A candidate left the device in a state in which nothing can be run; what follows says nothing of the others."""


class OtherBits(Exception):
    """A call gave other bits than the one before it."""


def search(
    key: Key,
    candidates: Sequence[Candidate],
    reference: Callable[[], Outputs],
    agree: Agree,
    *,
    source: str,
    seconds: float = 10.0,
    rounds: int = 7,
    store: Store | None = None,
    progress: Progress | None = None,
    retime: bool = False,
    trial: Trial | None = None,
    device: torch.device | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Record]:
    """Checks and times the candidates (simplest first) that have no record yet, and returns the new records.

    A candidate is timed only after its outputs agreed with the reference's and came out with the same bits twice;
    else it is recorded as "wrong" with the reason, or as "error" if it raised; so is one whose bits change while it is
    timed. agree(outputs, others, expected) returns None, or what differs. Those that pass are timed against one
    another, together with the fastest candidate known so far, so that one comparison is never between two occasions.
    Failures are saved at once, timings after their rounds, and also when the search is interrupted in the middle.

    source: hash of the op's sources. seconds: no check starts when three quarters are over, no sample when all
    are; a check in progress cannot be cut short, and what passed always gets the last quarter. Candidates that got no
    round are left unrecorded, for the next search. Where time may run out, the first config of each backend comes
    first, the last listed backend before the others. store: where to save and what counts as recorded, by default the
    user's table of the key's device. retime: try all, recorded or not. progress: called with steps done, steps in all
    and what comes next. trial: is asked about a candidate before anything of it is run here. device: where the
    candidates run, by default where the reference's first tensor is. clock: seconds, for tests.

    A store that cannot be written costs nothing but a warning: the records are returned, and kept for this process.

    Raises:
        DeviceLost: the device failed for good while a candidate ran.
        whatever `reference` raises, and KeyboardInterrupt.
    """
    start = clock()
    store = store or lookup.user_store(key.device)
    known = lookup.newest(_recorded(key, source, store), source)
    todo = _order(candidates, {name: r for name, r in known.items() if not _again(r, seconds)}, retime)
    if not todo:
        return []
    expected = reference()
    device = device or _device(expected)
    made: list[Record] = []

    def save(candidate: Candidate, status: str, **facts: Any) -> None:
        kind = device.type if device else "cpu"
        new = Record.made_here(key, candidate.backend, candidate.config, status, kind, source=source, **facts)
        made.append(new)
        append(store, new)

    def tell(done: int, what: str) -> None:
        if progress:
            progress(done, len(todo) + rounds, what)

    ready: list[tuple[Candidate, Callable[[], Outputs]]] = []
    bits: list[list[int]] = []

    def watch(i: int, outputs: object) -> None:
        if checksums(outputs) != bits[i]:
            raise OtherBits("not deterministic: while it was timed, a call gave different bits")

    for done, candidate in enumerate(todo):
        left = CHECKING * seconds - (clock() - start)
        if left <= 0:
            break
        tell(done, f"checking {candidate}")
        failure = trial(candidate, left) if trial else None
        if failure is not None:
            if failure.status:
                save(candidate, failure.status, message=failure.message, limit_s=failure.limit_s)
            continue
        found = check(candidate.prepare, expected, agree)
        if not isinstance(found, Failure):
            ready.append((candidate, found[0]))
            bits.append(found[1])
            continue
        save(candidate, found.status, message=found.message)
        if found.status == "error":
            _still_there(device, candidate, found.message)
    del expected

    runs = [run for _, run in ready]
    interleaved = Interleaved(runs, synchronize=synchronizer(device), give_up=GIVE_UP, watch=watch, clock=clock)
    tell(len(todo), "timing")
    try:
        left = max(seconds - (clock() - start), (1 - CHECKING) * seconds)
        interleaved.rounds(rounds, left, lambda done: tell(len(todo) + done, "timing"))
    finally:
        for (candidate, _), timing in zip(ready, interleaved.timings):
            _save_timing(save, candidate, timing)
    return made


def _recorded(key: Key, source: str, store: Store) -> list[Record]:
    """What the store has for the key, oldest first: from memory if it is the one that look-ups go by."""
    if _looked_up(key, store):
        return [row for row, where, _ in reversed(lookup.listing(key, source)) if where == "user"]
    return [row for row in store.read() if row.key == key]


def _looked_up(key: Key, store: Store) -> bool:
    """Whether it is the store that look-ups of the key go by."""
    return store.path == lookup.user_store(key.device).path


def _order(candidates: Sequence[Candidate], known: Mapping[record.Candidate, Record], retime: bool) -> list[Candidate]:
    """What to try, the most promising first, so that a short search learns most; led by the one to beat."""
    todo = [c for c in candidates if retime or c.name not in known]
    if not todo:
        return []
    best = lookup.fastest(known, [(c.backend, c.config) for c in candidates])
    incumbent = [c for c in candidates if best and c.name == best.candidate]
    # Going backwards, the last assignment wins: each backend's first config, the last listed backend first.
    defaults = {c.backend: c for c in reversed(todo)}
    ordered = {c.name: c for c in (*incumbent, *defaults.values(), *todo)}
    return list(ordered.values())


def _again(known: Record, seconds: float) -> bool:
    """Whether it gave no result in its time, and this search can give it more."""
    return known.failed and known.limit_s is not None and CHECKING * seconds >= PATIENCE * known.limit_s


def trusted(key: Key, source: str, store: Store | None = None) -> set[record.Candidate]:
    """The candidates found right on this device with these sources, for any problem of the op in this direction.

    store: what says so, by default all that look-ups go by. Goes through the whole table.
    """
    rows = lookup.rows(key.device) if store is None or _looked_up(key, store) else store.read()
    right = (key.op, key.direction, key.device, source, "ok")
    return {r.candidate for r in rows if (r.key.op, r.key.direction, r.key.device, r.source, r.status) == right}


def _still_there(device: torch.device | None, candidate: Candidate, message: str) -> None:
    """Raises DeviceLost if the device is beyond use: a fault in a GPU's kernel makes every later call fail."""
    wait = synchronizer(device)
    try:
        if wait:
            wait()
    except Exception as fault:
        raise DeviceLost(f"autotune: {candidate} failed ({message}), and so does {device} since: {fault}") from fault


def _save_timing(save: Callable[..., None], candidate: Candidate, timing: Timing) -> None:
    if isinstance(timing.error, OtherBits):
        save(candidate, "wrong", message=str(timing.error))
    elif timing.error is not None:
        save(candidate, "error", message=f"while it was timed: {described(timing.error)}")
    elif timing.rounds:
        save(candidate, "ok", median_s=timing.median, spread_s=timing.spread, rounds=timing.rounds)


def append(store: Store, new: Record) -> None:
    """Saves a record; where the store cannot be written, it counts for this process, with a warning."""
    try:
        store.append(new)
    # NotImplementedError: a file system without locks.
    except (OSError, NotImplementedError) as error:
        lookup.keep(store.path, new)
        if store.path not in _warned:
            _warned.add(store.path)
            message = f"autotune: cannot save measurements in {store.path}, they last for this process only: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)


def _device(outputs: Outputs) -> torch.device | None:
    """Where the first tensor lives; None if there is none."""
    if isinstance(outputs, Tensor):
        return outputs.device
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if isinstance(outputs, (tuple, list)):
        return next((device for device in map(_device, outputs) if device is not None), None)
    return None
