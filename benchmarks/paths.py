"""What a call costs that is not the plain one, and what threads gain: `python benchmarks/paths.py`. Exit code 1 for a
miss.

The plain call is of one batch of sequences of equal length, from no state, forwards, in a width that fits all vectors.
What is compared moves as many numbers (of complex gates fewer) and is timed interleaved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from limits import Row, main, medians, trainer
from torch import Tensor

from kernels.hgru import hgru
from kernels.scan import scan

B, T, D = 4, 2048, 1024
LIMIT = 1.5
# uneven, and all of B·T rows
CUTS = (0, 1, 300, 301, 2000, 2000, 5117, B * T)


def subjects(op: str) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """By name: a function of tensors, and the tensors; the plain call first."""
    function: Callable[..., Any] = scan if op == "scan" else hgru
    draw: Callable[..., Tensor] = torch.rand if op == "scan" else torch.randn
    angle: dict[str, Tensor] = {} if op == "scan" else {"theta": torch.rand(D // 2)}

    def call(*tensors: Tensor, **options: Any) -> Tensor:
        return function(*tensors, **options)[0]

    def from_state(first: Tensor, second: Tensor, state: Tensor) -> Tensor:
        return function(first, second, initial_state=state)[0]

    def drawn(*shape: int) -> list[Tensor]:
        return [draw(shape), draw(shape)]

    pairs = [draw(B, T, D // 2, 2) for _ in range(2)]
    if op == "hgru":
        # one gate a pair
        pairs[1] = draw(B, T, D // 2)
    packed = partial(call, cu_seqlens=torch.tensor(CUTS))
    return {
        "plain": (call, drawn(B, T, D)),
        f"D = {D - 1}": (call, drawn(B, T, D - 1)),
        "packed": (packed, drawn(1, B * T, D)),
        "reverse": (partial(call, reverse=True), drawn(B, T, D)),
        "initial state": (from_state, [*drawn(B, T, D), torch.randn(B, D)]),
        "complex": (partial(call, **angle), pairs),
    }


def slow_paths(rounds: int) -> Iterator[Row]:
    for op in ("scan", "hgru"):
        found = subjects(op)
        for what, make in (("forward", partial), ("forward + backward", trainer)):
            runs = [make(function, *tensors) for function, tensors in found.values()]
            plain, *others = medians(runs, rounds)
            ratios = {name: seconds / plain for name, seconds in zip([*found][1:], others)}
            detail = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            detail = f"{detail}; plain {plain * 1e3:.2f} ms"
            yield Row(f"{op} {what}, slowest path / plain, {[B, T, D]}", max(ratios.values()), LIMIT, "×", detail)


def threads(rounds: int) -> Iterator[Row]:
    """How many times as fast all threads are as one; nothing where there is one."""
    count = torch.get_num_threads()
    if count == 1:
        return
    given = [torch.rand(B, T, D) for _ in range(2)]
    add_out = torch.empty(B, T, D)
    subjects: dict[str, Callable[[], object]] = {"torch.add": lambda: torch.add(*given, out=add_out)}
    for op, function in (("scan", scan), ("hgru", hgru)):
        call = partial(lambda function, *tensors: function(*tensors)[0], function)
        subjects[f"{op} forward"] = partial(call, *given)
        subjects[f"{op} forward + backward"] = trainer(call, *given)

    def on(number: int, run: Callable[[], object]) -> Callable[[], object]:
        def threaded() -> object:
            torch.set_num_threads(number)
            return run()

        return threaded

    try:
        runs = [on(number, run) for run in subjects.values() for number in (1, count)]
        seconds = medians(runs, rounds)
    finally:
        torch.set_num_threads(count)
    for name, one, all_ in zip(subjects, seconds[::2], seconds[1::2]):
        detail = f"{one * 1e3:.2f} ms on one, {all_ * 1e3:.2f} ms on {count}"
        yield Row(f"{name}, gain of {count} threads, {[B, T, D]}", one / all_, None, "×", detail)


if __name__ == "__main__":
    sys.exit(main(__doc__, (slow_paths, threads)))
