"""What the scripts that hold speeds to limits share: a row with its verdict, a training step, interleaved medians."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import autotune
from autotune.measure import measure

ROUNDS = 25


@dataclass(frozen=True)
class Row:
    """limit: None for what is only reported."""

    what: str
    value: float
    limit: float | None
    unit: str
    detail: str

    @property
    def missed(self) -> bool:
        return self.limit is not None and self.value > self.limit

    def __str__(self) -> str:
        verdict = "" if self.limit is None else "MISSED" if self.missed else "ok"
        limit = "" if self.limit is None else f"of {self.limit:5.2f}"
        return f"{verdict:6}  {self.value:7.2f} {self.unit:2} {limit:8}  {self.what}  ({self.detail})"


def trainer(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """Forward and backward with a gradient for every input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    gradient = torch.rand_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, gradient)


def medians(runs: list[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of each, timed interleaved, so that a busy machine slows down all of them."""
    timings = measure(runs, rounds=rounds)
    for timing in timings:
        if timing.error is not None:
            raise timing.error
    return [timing.median for timing in timings]


def main(description: str | None, parts: Iterable[Callable[[int], Iterator[Row]]]) -> int:
    """Prints every row as soon as it is known; 1 if a limit is missed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = parser.parse_args().rounds
    print(where_and_how(rounds))
    missed = 0
    for part in parts:
        for row in part(rounds):
            print(row, flush=True)
            missed += row.missed
    return 1 if missed else 0


def where_and_how(rounds: int) -> str:
    device = autotune.fingerprint(torch.device("cpu"))
    return f"{device}, torch {torch.__version__}, {rounds} interleaved rounds, medians"
