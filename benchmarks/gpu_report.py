"""The rows of benchmarks/gpu.py: timed, printed and saved as they come."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timing import seconds_of

import autotune
from autotune.device import synchronizer

Run = Callable[[], object]


@dataclass
class Report:
    """Rows, printed and saved as they come. compiles: the number of this process and of all, where nothing is timed and
    each calls its part of everything once."""

    device: torch.device
    out: Path | None
    deadline: float
    compiles: tuple[int, int] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    met: int = 0

    def mine(self) -> bool:
        """Whether the next part is this process's."""
        self.met += 1
        return self.compiles is None or self.met % self.compiles[1] == self.compiles[0]

    @property
    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def add(self, line: str, **facts: Any) -> None:
        if self.compiles is not None:
            return
        print(line, flush=True)
        self.rows.append(facts)
        if self.out is not None:
            about = {"device": autotune.fingerprint(self.device), "torch": str(torch.__version__)}
            self.out.write_text(json.dumps({**about, "rows": self.rows}, indent=1), encoding="utf-8")

    def seconds(self, run: Run) -> float:
        """The median of a call. It is called before, and compiles what there is to compile."""
        first = seconds_of(run, synchronizer(self.device))
        if self.compiles is not None:
            return first
        if self.device.type == "cpu":
            return seconds_of(run, None)
        import triton.testing

        return 1e-3 * triton.testing.do_bench(run, warmup=5, rep=30, return_mode="median")


def copied(report: Report, mib: int) -> float:
    """Bytes a second of a copy, read and written."""
    a = torch.rand(mib << 18, device=report.device)
    b = torch.empty_like(a)
    rate = 2 * a.nbytes / report.seconds(lambda: b.copy_(a))
    report.add(f"a copy of {mib} MiB: {rate / 1e9:,.0f} GB/s", kind="copy", bytes_s=rate)
    return rate
