"""What training keeps in memory: `python benchmarks/memory.py`. Exit code 1 if a peak is not linear in T.

kept: bytes a token and layer that the graph holds between the passes, without parameters. peak: what the resident set
grows by in a forward and a backward pass of all layers, a token, in a process of its own that has run them before.
"""

from __future__ import annotations

import argparse
import resource
import sys
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

import autotune
import mixers

DIM = 256
LENGTHS = (4096, 8192)
LONG = 65536
# how much a peak may grow when T doubles. Memory that was free before a pass counts for nothing, and blocks that wait
# for their next use count though nothing needs them: 2 is not met to the percent, and what grows with T² is far off
LIMIT = 2.5


@dataclass(frozen=True)
class Row:
    """Layers one after the other. peaks: taken at these lengths."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    layers: int = 1
    peaks: tuple[int, ...] = LENGTHS

    def __str__(self) -> str:
        options = [f"{name}={value}" for name, value in self.options.items()]
        return ", ".join([" ".join([self.name, *options]), *([f"{self.layers} layers"] if self.layers > 1 else [])])

    def build(self) -> nn.ModuleList:
        return nn.ModuleList(mixers.build(self.name, DIM, **self.options) for _ in range(self.layers))


ROWS = (
    Row("hgrn", layers=4),
    Row("hgrn", {"recompute": True}, layers=4),
    Row("hgrn", {"complex": False}, layers=4),
    Row("hgrn", {"complex": False, "recompute": True}, layers=4),
    Row("attention"),
    Row("mamba"),
    *(Row(name, peaks=(*LENGTHS, LONG)) for name in ("gla", "mamba2", "deltanet", "gated_deltanet")),
)


def forward(layers: nn.ModuleList, length: int) -> Tensor:
    y = torch.randn(1, length, DIM, requires_grad=True)
    for layer in layers:
        y = layer(y)[0]
    return y


def kept(row: Row, length: int = 2048) -> float:
    """Bytes of different storages a token and layer."""
    layers = row.build()
    parameters, seen = {p.untyped_storage().data_ptr() for p in layers.parameters()}, {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            # the tensor too, so that no other comes to lie where it was
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(layers, length)
    return sum(size for size, _ in seen.values()) / (length * row.layers)


def peak(row: Row, length: int) -> float:
    """Bytes a token that the resident set grows by."""
    layers = row.build()
    forward(layers, 64).square().mean().backward()
    before = resident()
    forward(layers, length).square().mean().backward()
    return (resident() - before) / length


def resident() -> int:
    """The largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(f"{autotune.fingerprint(torch.device('cpu'))}, torch {torch.__version__}, float32, B = 1, dim {DIM}")
    print(f"{'':44}{'kept, a layer':>20}{'peak, KiB a token at T =':>30}{'growth':>10}")
    print(f"{'':44}{'KiB a token':>12}{'/ dim':>8}{''.join(f'{T:10,}' for T in (*LENGTHS, LONG))}")
    others = [Row(name, peaks=()) for name in mixers.names() if name not in {row.name for row in ROWS}]
    missed = 0
    # a process for each, forked: a new interpreter would take longer to start than most of them take
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for row in (*ROWS, *others):
            held = pool.apply(kept, (row,))
            peaks = [pool.apply(peak, (row, length)) for length in row.peaks]
            line = f"{row!s:44}{held / 1024:12.2f}{held / (4 * DIM):8.1f}"
            line += "".join(f"{bytes_ / 1024:10.1f}" for bytes_ in peaks).ljust(30)
            if peaks:
                growth = 2 * peaks[1] / peaks[0]
                missed += growth > LIMIT
                line += f"{growth:8.2f} × {'ok' if growth <= LIMIT else f'MISSED, limit {LIMIT}'}"
            print(line, flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
