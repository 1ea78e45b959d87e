"""The timer that tests of a sweep are given, and the facts that every row is filed with."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import machine
import pytest
import torch
from timing import SURELY, LastWaits, budget_of, seconds_of, too_long, warmed_up

import autotune
from autotune.device import synchronizer


@dataclass
class Timer:
    """Times one call and files it with the facts that describe it. With --benchmark-disable it only calls it once."""

    benchmark: Any
    device: torch.device
    full: bool
    # for each subject the last length and the seconds of a call
    calls: dict[tuple[str, ...], tuple[int, float]]

    def __call__(self, run: Callable[[], object], facts: Mapping[str, Any]) -> None:
        wait, budget = synchronizer(self.device), budget_of(self.device)
        if self.benchmark.disabled:
            self.benchmark.pedantic(seconds_of, args=(run, wait))
            return
        if not self.full:
            self.expect(facts)
        once = warmed_up(run, self.device)
        self.calls[_subject(facts)] = (facts["length"], once)
        if once > budget.call and not self.full:
            pytest.skip(f"{self.benchmark.name}: a call takes {once:.1f} s, {too_long(self.device)}")
        iterations = budget.iterations(once)
        rounds = budget.rounds(once * iterations, budget.row)
        self.benchmark.extra_info.update({**facts, **about(self.device), **limits(self.device, facts["dtype"])})
        timed = run if wait is None else LastWaits(run, wait, iterations)
        self.benchmark.pedantic(timed, rounds=rounds, iterations=iterations)

    def expect(self, facts: Mapping[str, Any]) -> None:
        """Skips what would take far too long, by the time of the same at a shorter length: nothing is less than linear
        in its length from some hundred tokens on."""
        length, once = self.calls.get(_subject(facts), (1, 0.0))
        seconds = once * facts["length"] / length
        if length > 1 and seconds > SURELY * budget_of(self.device).call:
            long = too_long(self.device)
            pytest.skip(f"{self.benchmark.name}: a call would take {seconds:.2g} s by T = {length:,}, {long}")


def _subject(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """What is timed, at whatever length."""
    return tuple(str(facts.get(name)) for name in ("kind", "name", "variant", "direction", "dtype", "sizes", "backend"))


def about(device: torch.device) -> dict[str, Any]:
    """Where and with what a row was measured."""
    return {
        "device": autotune.fingerprint(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": str(torch.__version__),
            "triton": _version("triton"),
            "python": platform.python_version(),
            "version": _version("sequence-mixers"),
        },
    }


def limits(device: torch.device, dtype: str) -> dict[str, float]:
    """What the device can do at most, measured once a session."""
    return {
        "limit_bytes_s": machine.bytes_per_second(device),
        "limit_flops_s": machine.flops_per_second(device, getattr(torch, dtype)),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
