"""Every target for speed on a CPU, with its verdict: `python benchmarks/targets.py`. Exit code 1 for a miss.

The rows are those of acceptance.py, hgru.py, peers.py, paths.py and startup.py, in one process; what is compared is
timed interleaved. Under a part with a row that misses its target stands a measurement of where the time goes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import acceptance
import hgru
import paths
import peers
import startup
import where
from limits import ROUNDS, Row, where_and_how


@dataclass(frozen=True)
class Part:
    """rows(rounds): yields them as they are measured. why(rounds): lines about where the time goes."""

    rows: Callable[[int], Iterator[Row]]
    why: Callable[[int], Iterator[str]] | None = None


PARTS = {
    "scan": Part(acceptance.ratios, where.scan),
    "short scan": Part(acceptance.small, where.small_scan),
    "hgru": Part(hgru.streaming, where.hgru),
    "hgru in cache": Part(hgru.in_cache, where.hgru_in_cache),
    "layer": Part(hgru.layers, where.layers),
    "decoding": Part(hgru.decoding, where.decoding),
    # the slowest of several paths: its row names them all
    "paths": Part(paths.slow_paths),
    "threads": Part(paths.threads),
    "calls": Part(acceptance.overheads),
    "import": Part(startup.importing, lambda _: startup.slowest_imports()),
    "compile": Part(startup.compiling),
    "peers": Part(peers.ratios, where.beside_peers),
}


class Table:
    """What was measured so far, told line by line."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.held: list[str] = []
        self.missed: list[str] = []

    def measure(self, name: str, rounds: int) -> None:
        self.tell(f"{name}:")
        part, missed = PARTS[name], len(self.missed)
        for row in part.rows(rounds):
            self.tell(f"  {row}")
            if row.limit is not None:
                (self.missed if row.missed else self.held).append(f"{name} ({row.what})")
        if len(self.missed) > missed and part.why:
            for line in part.why(rounds):
                self.tell(f"          {line}")

    def verdict(self) -> str:
        missed = "; ".join(self.missed) or "none"
        return f"{len(self.held)} of {len(self.held) + len(self.missed)} targets are met; missed: {missed}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--part", action="append", choices=list(PARTS), help="repeat it; by default all")
    given = parser.parse_args()
    print(where_and_how(given.rounds))
    table = Table(partial(print, flush=True))
    for name in given.part or PARTS:
        table.measure(name, given.rounds)
    print(table.verdict())
    return 1 if table.missed else 0


if __name__ == "__main__":
    sys.exit(main())
