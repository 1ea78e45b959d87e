"""Candidates to search among, whose speed is given, and bad ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autotune import Key, Record
from autotune.check import Prepared
from autotune.search import Candidate, search

EXPECTED = torch.tensor([1.0, 2.0, 3.0])


class Workshop:
    """Candidates whose speed is given, on a clock that only they advance, and a log of what was run."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def candidate(
        self, backend: str, seconds: float = 1.0, make: Callable[[], Any] | None = None, **config: Any
    ) -> Candidate:
        """make: what a call returns, by default the right thing; it may raise."""

        def call() -> Any:
            self.log.append(backend)
            self.now += seconds
            return make() if make else (EXPECTED.clone(), None)

        return Candidate(backend, config, lambda: Prepared(call))

    def search(self, key: Key, candidates: Sequence[Candidate], **options: Any) -> list[Record]:
        options = {"source": "src", "seconds": 1000.0, "rounds": 3, "clock": self.clock, **options}
        return search(key, candidates, lambda: (EXPECTED, None), agree, **options)


def agree(outputs: tuple[Tensor, None], _: object, expected: tuple[Tensor, None]) -> str | None:
    error = (outputs[0] - expected[0]).abs().max().item()
    return None if error <= 0.01 else f"y differs by {error:.2g}"


def offered(candidates: Sequence[Candidate]) -> list[tuple[str, Any]]:
    return [(c.backend, c.config) for c in candidates]


def planted() -> dict[str, tuple[Callable[[], Any], str, str]]:
    """Bad results: what makes them, the status they must get, and a part of the reason."""
    tick = itertools.count()

    def raises() -> Any:
        raise RuntimeError("out of shared memory")

    def raises_later() -> Any:
        if next(tick) >= 3:
            raise RuntimeError("out of luck")
        return EXPECTED, None

    def second_time() -> Any:
        if next(tick):
            raise RuntimeError("once only")
        return EXPECTED, None

    def third_time() -> Any:
        return EXPECTED * (math.nan if next(tick) == 2 else 1), None

    static = torch.zeros(3)

    def same_buffer() -> Any:
        return static.copy_(EXPECTED + 1e-3 * next(tick)), None

    return {
        "wrong value": (lambda: (EXPECTED + 0.5, None), "wrong", "y differs by 0.5"),
        "nan": (lambda: (EXPECTED * math.nan, None), "wrong", "y differs by nan"),
        "not deterministic": (lambda: (EXPECTED + 1e-6 * next(tick), None), "wrong", "different bits"),
        "not deterministic, one buffer": (same_buffer, "wrong", "different bits"),
        "sign of zero": (lambda: (EXPECTED, torch.tensor(0.0) * (-1) ** next(tick)), "wrong", "different bits"),
        "shape": (lambda: (torch.ones(2), None), "wrong", "cannot be compared with the reference: RuntimeError"),
        "no tensor": (lambda: None, "wrong", "cannot be compared with the reference: TypeError"),
        "nan once, while timed": (third_time, "wrong", "while it was timed, a call gave different bits"),
        "raises": (raises, "error", "RuntimeError: out of shared memory"),
        "raises the second time": (second_time, "error", "at the second call: RuntimeError: once only"),
        "raises while timed": (raises_later, "error", "while it was timed: RuntimeError: out of luck"),
    }
