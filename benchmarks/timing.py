"""How a row is timed: for how long, in how many rounds, and where a round waits for the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from autotune.device import synchronizer


@dataclass(frozen=True)
class Budget:
    """For each row: about `row` seconds, between `fewest` and `most` rounds, and none where a call takes over `call`.

    sample: seconds that a round lasts at least; shorter calls are repeated within it. warm: that calls are queued for
    before the first round. beside: of a test with peers.
    """

    row: float
    fewest: int
    most: int
    call: float
    sample: float
    warm: float
    beside: float

    def iterations(self, once: float) -> int:
        return max(round(self.sample / once), 1)

    def rounds(self, seconds: float, total: float) -> int:
        """How many that take so long each go into the total."""
        return min(max(round(total / seconds), self.fewest), self.most)


# Calls that return when they are done; and calls that are queued, on a device whose time is dear
DIRECT = Budget(row=0.4, fewest=3, most=40, call=2.0, sample=1e-3, warm=0.0, beside=3.0)
QUEUED = Budget(row=0.1, fewest=3, most=20, call=0.2, sample=4e-3, warm=2e-2, beside=0.4)
# A call is skipped where a shorter length lets expect that it takes so many times as long as it may
SURELY = 2.0


def budget_of(device: torch.device) -> Budget:
    return DIRECT if synchronizer(device) is None else QUEUED


def too_long(device: torch.device) -> str:
    return f"more than {budget_of(device).call:g} s; --full times it"


class LastWaits:
    """A call of which every `iterations`-th waits for the device: those of a round are queued one after the other."""

    def __init__(self, run: Callable[[], object], wait: Callable[[], None], iterations: int) -> None:
        self.run, self.wait, self.iterations, self.calls = run, wait, iterations, 0

    def __call__(self) -> None:
        self.run()
        self.calls += 1
        if self.calls % self.iterations == 0:
            self.wait()


def seconds_of(run: Callable[[], object], wait: Callable[[], None] | None, calls: int = 1) -> float:
    """Of a call, when so many are queued and then waited for."""
    start = time.perf_counter()
    for _ in range(calls):
        run()
    if wait is not None:
        wait()
    return (time.perf_counter() - start) / calls


def warmed_up(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, the second on a CPU; where calls are queued, of many of them. The first compiles what there is
    to compile."""
    wait, budget = synchronizer(device), budget_of(device)
    seconds_of(run, wait)
    once = seconds_of(run, wait)
    return seconds_of(run, wait, max(int(budget.warm / once), 1)) if wait is not None and once < budget.call else once
