"""Candidates that tests of the look-up choose from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import autotune
from autotune import Key

Offer = tuple[str, dict[str, int]]
NAIVE: Offer = ("naive", {})
COMPILED: Offer = ("compiled", {"chunk": 64})
NATIVE: Offer = ("native", {"block": 8})
ALL = [NAIVE, COMPILED, NATIVE]


def chosen(key: Key, candidates: Sequence[Any] = ALL, source: str = "src") -> tuple[str, str] | None:
    choice = autotune.choose(key, candidates, source)
    return None if choice is None else (choice.backend, choice.origin)
