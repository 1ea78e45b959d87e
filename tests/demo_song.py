"""A song of a few thousand characters, and a model small enough to read it in a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mixers.demo.settings import Settings
from mixers.demo.trainer import Trainer

TEXT = "".join(
    f"{n} green bottles hanging on the wall, and if one should fall, {n - 1} remain.\n" for n in range(99, 1, -1)
)
TINY: dict[str, Any] = {"dim": 16, "layers": 2, "batch": 4, "length": 24, "dropout": 0.2}


def until(steps: int) -> Callable[[Trainer], float]:
    """A budget in steps; the learning rate follows as if there were 12."""
    return lambda trainer: 1.0 if trainer.step_count >= steps else trainer.step_count / 12


def tiny(**options: Any) -> Settings:
    return Settings(**{**TINY, **options})
