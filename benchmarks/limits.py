"""What the scripts that hold speeds to limits share: a row with its verdict, a training step, interleaved medians."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import autotune
from autotune.measure import measure


@dataclass(frozen=True)
class Row:
    what: str
    value: float
    limit: float
    unit: str
    detail: str

    def __str__(self) -> str:
        verdict = "ok    " if self.value <= self.limit else "MISSED"
        return f"{verdict}  {self.value:7.2f} {self.unit:2} of {self.limit:5.2f}  {self.what}  ({self.detail})"


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
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    print(
        f"{autotune.fingerprint(torch.device('cpu'))}, torch {torch.__version__}, {rounds} interleaved rounds, medians"
    )
    missed = 0
    for part in parts:
        for row in part(rounds):
            print(row, flush=True)
            missed += row.value > row.limit
    return 1 if missed else 0
