"""The limits that the scan's speed and a look-up must keep: `python benchmarks/acceptance.py`. Exit code 1 for a miss.

What is compared is timed interleaved, so that a busy machine slows down both sides.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from limits import Row, main, medians, trainer
from torch import Tensor

import autotune
from kernels.scan import OP, native, scan

SHAPE = (8, 2048, 1024)
# What forward and backward move, of what an addition does: a, x and h, then a, h, dh, da and dx.
TENSORS = 8 / 3
RECORDS = 100_000


def ratios(rounds: int) -> Iterator[Row]:
    """Bandwidth: against torch.add moving as many bytes."""
    a, x, add_out, h = (torch.rand(SHAPE) for _ in range(4))
    final = torch.empty(SHAPE[0], SHAPE[2])
    config = OP.choose(OP.problem_of("forward", (a, x, None, None, False, "native")), "native").config

    def add() -> Tensor:
        return torch.add(a, x, out=add_out)

    def preallocated() -> None:
        native.forward_out(a, x, None, None, h, final, reverse=False, config=config)

    runs = [add, preallocated, lambda: outputs(a, x), trainer(outputs, a, x)]
    add_s, out_s, public_s, train_s = medians(runs, rounds)

    def over(seconds: float) -> str:
        return f"{seconds * 1e3:.2f} ms, add {add_s * 1e3:.2f} ms"

    shape = f"{list(SHAPE)} float32"
    yield Row(f"scan forward into preallocated outputs / add, {shape}", out_s / add_s, 1.2, "×", over(out_s))
    yield Row(f"scan forward, allocating / add, {shape}", public_s / add_s, 1.6, "×", over(public_s))
    detail = f"{train_s * 1e3:.2f} ms, 8/3 of add {add_s * 1e3:.2f} ms"
    yield Row(f"scan forward + backward / add, {shape}", train_s / (TENSORS * add_s), 1.3, "×", detail)


def small(rounds: int) -> Iterator[Row]:
    a, x = torch.rand(1, 2048, 256), torch.rand(1, 2048, 256)
    seconds = medians([lambda: outputs(a, x), trainer(outputs, a, x)], 4 * rounds)
    for what, limit, each in zip(("forward", "forward + backward"), (0.15, 0.8), seconds):
        yield Row(f"scan {what}, {list(a.shape)} float32", 1e3 * each, limit, "ms", "allocating")


def narrow(rounds: int) -> Iterator[Row]:
    """bfloat16 takes no longer than float32."""
    a, x = torch.rand(SHAPE), torch.rand(SHAPE)
    pairs = [(a, x), (a.bfloat16(), x.bfloat16())]
    for what, make in (("forward", partial), ("forward + backward", trainer)):
        fast, slow = medians([make(outputs, *pair) for pair in pairs], rounds)
        detail = f"{slow * 1e3:.2f} ms, float32 {fast * 1e3:.2f} ms"
        yield Row(f"scan {what} in bfloat16 / float32, {list(SHAPE)}", slow / fast, 1.0, "×", detail)


def outputs(a: Tensor, x: Tensor) -> Tensor:
    return scan(a, x)[0]


def overheads(rounds: int) -> Iterator[Row]:
    """Seconds a call on a problem so small that nothing else takes time."""
    a, x = torch.rand(1, 1, 8), torch.rand(1, 1, 8)
    leaves = [a.clone().requires_grad_(), x.clone().requires_grad_()]
    chosen = OP.choose(OP.problem_of("forward", (a, x, None, None, False, "auto")))
    raw = OP.backend(chosen.backend.name).function("forward")

    runs: list[Callable[[], object]] = [
        lambda: raw(a, x, None, None, reverse=False, config=chosen.config),
        lambda: scan(a, x),
        lambda: scan(a, x, backend=chosen.backend.name),
        lambda: scan(*leaves),
    ]
    raw_s, auto_s, named_s, grad_s = (1e6 * seconds for seconds in medians(runs, rounds))
    detail = f"raw {chosen.backend.name} {raw_s:.1f} µs"
    yield Row("auto over the raw backend, without grad", auto_s - raw_s, 10, "µs", f"{auto_s:.1f} µs, {detail}")
    yield Row("auto over the raw backend, with grad", grad_s - raw_s, 20, "µs", f"{grad_s:.1f} µs, {detail}")
    yield Row("auto over naming the backend", auto_s - named_s, 4, "µs", f"{auto_s:.1f} µs, named {named_s:.1f} µs")


def lookups(rounds: int) -> Iterator[Row]:
    """A known key among a hundred thousand records of the device, and a key of one token."""
    a, x = torch.rand(1, 512, 8), torch.rand(1, 512, 8)
    known = OP.key(OP.problem_of("forward", (a, x, None, None, False, "auto")))
    keys = {"T = 512": known, "T = 1": replace(known, length=1)}
    others = [replace(known, sizes=(("B", n // 1000), ("D", 1 + n % 1000))) for n in range(RECORDS)]
    offers: list[tuple[str, autotune.Config]] = [("naive", {}), ("native", {"block": 2048})]
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "table.jsonl"
        made = autotune.Record(known, "native", {"block": 2048}, "ok", 1e-3, 1e-5, 9, source=OP.source("cpu"))
        table.write_text("".join(f"{replace(made, key=key).to_line()}\n" for key in [*others, *keys.values()]))
        with autotune.using(table):
            for what, key in keys.items():
                (seconds,) = medians([lambda key=key: autotune.choose(key, offers, OP.source("cpu"))], rounds)  # type: ignore[misc]
                found = autotune.choose(key, offers, OP.source("cpu"))
                assert found is not None
                assert found.origin == "exact"
                yield Row(
                    f"looking up a known key, {what}", 1e6 * seconds, 2, "µs", f"{RECORDS:,} records in the table"
                )


if __name__ == "__main__":
    sys.exit(main(__doc__, (ratios, small, narrow, overheads, lookups)))
