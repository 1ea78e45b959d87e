"""Tries candidates, correctness first, and records what comes of them. The only part that ever runs anything."""

from __future__ import annotations

import struct
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autotune import lookup, record
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

Outputs = Any
Progress = Callable[[int, int, str], None]

_warned: set[Path] = set()


@dataclass(frozen=True)
class Candidate:
    """Something to try. prepare: makes (compiles, if need be) the call that is run, compared and timed.

    The call returns its outputs: a tensor, None, a number, or tuples, lists and dicts of them. It may be called many
    times; where it would change its inputs, `prepare` makes it inputs of its own.
    """

    backend: str
    config: Config
    prepare: Callable[[], Callable[[], Outputs]]

    @property
    def name(self) -> record.Candidate:
        return record.candidate(self.backend, self.config)

    def __str__(self) -> str:
        return " ".join([self.backend, *(f"{k}={v}" for k, v in self.config.items())])


class DeviceLost(RuntimeError):
    """A candidate left the device in a state in which nothing can be run; what follows says nothing of the others."""


def search(
    key: Key,
    candidates: Sequence[Candidate],
    reference: Callable[[], Outputs],
    agree: Callable[[Outputs, Outputs], str | None],
    *,
    source: str,
    seconds: float = 10.0,
    rounds: int = 7,
    store: Store | None = None,
    progress: Progress | None = None,
    retime: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Record]:
    """Checks and times the candidates (simplest first) that have no record yet, and returns the new records.

    A candidate is timed only after its outputs agreed with the reference's and came out with the same bits twice;
    else it is recorded as "wrong" with the reason, or as "error" if it raised. agree(outputs, expected) returns None,
    or what differs. Those that pass are timed against one another, together with the fastest candidate known so far,
    so that one comparison is never between two occasions. Failures are saved at once, timings after their rounds, and
    also when the search is interrupted in the middle of them.

    source: hash of the op's sources. seconds: no check starts when three quarters are over, no sample when all
    are; a check in progress cannot be cut short, and what passed always gets the last quarter. Candidates that got no
    round are left unrecorded, for the next search. Where time may run out, the first config of each backend comes
    first, the last listed backend before the others. store: where to save and what counts as recorded, by default the
    user's table of the key's device. retime: try all, recorded or not. progress: called with steps done, steps in all
    and what comes next. clock: seconds, for tests.

    A store that cannot be written costs nothing but a warning: the records are returned, and kept for this process.

    Raises:
        DeviceLost: the device failed for good while a candidate ran.
        whatever `reference` raises, and KeyboardInterrupt.
    """
    start = clock()
    store = store or lookup.user_store(key.device)
    known = lookup.newest(_recorded(key, source, store), source)
    todo = _order(candidates, known, retime)
    if not todo:
        return []
    expected = reference()
    device = _device(expected)
    made: list[Record] = []

    def save(candidate: Candidate, status: str, **facts: Any) -> None:
        kind = device.type if device else "cpu"
        new = Record.made_here(key, candidate.backend, candidate.config, status, kind, source=source, **facts)
        made.append(new)
        _append(store, new)

    def tell(done: int, what: str) -> None:
        if progress:
            progress(done, len(todo) + rounds, what)

    ready: list[tuple[Candidate, Callable[[], Outputs]]] = []
    for done, candidate in enumerate(todo):
        if clock() - start >= CHECKING * seconds:
            break
        tell(done, f"checking {candidate}")
        run, status, message = _check(candidate, expected, agree)
        if run is not None:
            ready.append((candidate, run))
            continue
        save(candidate, status, message=message)
        if status == "error":
            _still_there(device, candidate, message)
    del expected

    interleaved = Interleaved([run for _, run in ready], synchronize=synchronizer(device), give_up=GIVE_UP, clock=clock)
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
    if store.path == lookup.user_store(key.device).path:
        return [row for row, where, _ in reversed(lookup.listing(key, source)) if where == "user"]
    return [row for row in store.read() if row.key == key]


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


def _check(
    candidate: Candidate, expected: Outputs, agree: Callable[[Outputs, Outputs], str | None]
) -> tuple[Callable[[], Outputs] | None, str, str]:
    """The call if the candidate is right, else None with a status and a reason."""
    try:
        run = candidate.prepare()
        # A copy: the second call may write into the same buffers.
        first = _copy(run())
    except Exception as error:
        return None, "error", _described(error)
    try:
        difference = agree(first, expected)
    except Exception as error:
        return None, "wrong", f"cannot be compared with the reference: {_described(error)}"
    if difference is not None:
        return None, "wrong", difference
    try:
        second = run()
        same = same_bits(first, second)
    except Exception as error:
        return None, "error", f"at the second call: {_described(error)}"
    if not same:
        return None, "wrong", "not deterministic: two calls with the same inputs gave different bits"
    return run, "ok", ""


def _still_there(device: torch.device | None, candidate: Candidate, message: str) -> None:
    """Raises DeviceLost if the device is beyond use: a fault in a GPU's kernel makes every later call fail."""
    wait = synchronizer(device)
    try:
        if wait:
            wait()
    except Exception as fault:
        raise DeviceLost(f"autotune: {candidate} failed ({message}), and so does {device} since: {fault}") from fault


def _save_timing(save: Callable[..., None], candidate: Candidate, timing: Timing) -> None:
    if timing.error is not None:
        save(candidate, "error", message=f"while it was timed: {_described(timing.error)}")
    elif timing.rounds:
        save(candidate, "ok", median_s=timing.median, spread_s=timing.spread, rounds=timing.rounds)


def _append(store: Store, new: Record) -> None:
    try:
        store.append(new)
    # NotImplementedError: a file system without locks.
    except (OSError, NotImplementedError) as error:
        lookup.keep(store.path, new)
        if store.path not in _warned:
            _warned.add(store.path)
            message = f"autotune: cannot save measurements in {store.path}, they last for this process only: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)


def same_bits(a: Outputs, b: Outputs) -> bool:
    """Whether two results are equal bit for bit: NaN equals the same NaN, 0.0 is not -0.0."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        return alike and torch.equal(_bytes(a), _bytes(b))
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(same_bits(x, y) for x, y in zip(a, b))
    if isinstance(a, float) and isinstance(b, float):
        return struct.pack("d", a) == struct.pack("d", b)
    return type(a) is type(b) and bool(a == b)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _copy(outputs: Outputs) -> Outputs:
    if isinstance(outputs, Tensor):
        return outputs.detach().clone()
    if isinstance(outputs, Mapping):
        return {name: _copy(value) for name, value in outputs.items()}
    if isinstance(outputs, (tuple, list)):
        copies = [_copy(value) for value in outputs]
        # A named tuple takes its fields one by one.
        return type(outputs)(*copies) if hasattr(outputs, "_fields") else type(outputs)(copies)
    return outputs


def _device(outputs: Outputs) -> torch.device | None:
    """Where the first tensor lives; None if there is none."""
    if isinstance(outputs, Tensor):
        return outputs.device
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if isinstance(outputs, (tuple, list)):
        return next((device for device in map(_device, outputs) if device is not None), None)
    return None


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
