"""How Triton kernels of recurrences with a vector state are launched: on rows, carried through time or split.

triton_rows.py has what the kernels share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.cards import LONG
from kernels.problem import Problem, state_dtype
from kernels.triton_launch import CONSTANTS, Launch, in_units, missing, multiprocessors, stages

# From so many steps on, chunks of 256 steps: the launch over chunks is then no longer a walk than the other two
VERY_LONG = 2**15
# From this many numbers to the rows of all sequences together, programs of four warps are still enough for any GPU
MANY_COLUMNS = 2**17


def cannot(problem: Problem, interpreted: bool) -> list[str]:
    """Why kernels on rows [B, T, D] or [B, T, D, 2] cannot run the problem; empty if they can."""
    reasons, width = missing(problem.device, interpreted), _width(problem)
    return [*reasons, f"rows of {width} numbers; at most {2**30 - 1}"] if width >= 2**30 else reasons


def configs(
    narrow: dict[str, int], wide: dict[str, int], other: dict[str, int], problem: Problem, numbers: int
) -> list[dict[str, int]]:
    """Candidates that carry the state through time, and beside them `narrow` with chunks of 64 and of 256 steps.

    narrow: one warp to a program, which has so many numbers of a row to a thread; wide: four.

    The rule: `wide` first where that leaves programs enough (MANY_COLUMNS). Before that, time split where sequences are
    LONG and the programs of `narrow` are fewer than the GPU's multiprocessors; then chunks of 256 steps first where
    sequences are VERY_LONG. A chunk is never longer than the rows.
    """
    sizes, width = problem.sizes, _width(problem)
    mean_length = sizes["B"] * sizes["T"] // sizes["N"]
    carried = [wide, narrow] if sizes["N"] * width >= MANY_COLUMNS else [narrow, wide]
    if other not in carried:
        carried.append(other)
    chunks = [256, 64] if mean_length >= VERY_LONG else [64, 256]
    split = [{**narrow, "split": rows} for rows in chunks if rows < sizes["T"]]
    few = sizes["N"] * -(-width // (32 * numbers)) < multiprocessors(problem.device)
    return split + carried if few and mean_length >= LONG else carried + split


def _width(problem: Problem) -> int:
    return problem.sizes["D"] * (2 if problem.options["pairs"] else 1)


def two(pairs: bool, dtype: torch.dtype) -> bool:
    """Whether a thread has two numbers of a row: the parts of a pair, or two numbers of 16 bits."""
    return pairs or dtype.itemsize == 2


@dataclass(frozen=True)
class Sequences:
    """How many sequences there are, how many rows together, and into how many chunks of C steps they are cut."""

    batch: int
    length: int
    cu_seqlens: Tensor | None
    chunk: int | None

    @classmethod
    def of(cls, x: Tensor, cu_seqlens: Tensor | None, config: Mapping[str, int]) -> Sequences:
        """Of rows x [B, T, ...]; time is carried where the config says so, and where one chunk would have all rows."""
        chunk = config.get("split", 0)
        if chunk >= x.shape[1]:
            chunk = 0
        assert chunk % config["BT"] == 0, f"chunks of {chunk} steps in tiles of {config['BT']}"
        return cls(x.shape[0], x.shape[1], None if cu_seqlens is None else cu_seqlens.contiguous(), chunk or None)

    @property
    def count(self) -> int:
        return self.batch if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def pieces(self) -> int:
        """Chunks of all sequences; where their lengths are unknown, no fewer than that. Sequences, if carried."""
        if self.chunk is None:
            return self.count
        if self.cu_seqlens is None:
            return self.batch * -(-self.length // self.chunk)
        return self.length // self.chunk + self.count

    @property
    def arguments(self) -> dict[str, Any]:
        return {"cu_seqlens": self.cu_seqlens, "T": self.length, "N": self.count, "C": self.chunk}


@dataclass(frozen=True)
class Rows:
    """How kernels are launched on rows of `width` numbers of this dtype: one program for each piece and each block of
    columns, which a warp has 32 threads for (AMD: 64)."""

    width: int
    pairs: bool
    dtype: torch.dtype
    sequences: Sequences
    config: Mapping[str, int]
    lanes: int

    def launch(
        self,
        kernel: Any,
        tensors: Mapping[str, Tensor | None],
        distances: Mapping[str, int],
        *,
        per_sequence: bool = False,
        **constants: Any,
    ) -> Launch:
        both, num_warps = two(self.pairs, self.dtype), self.config["num_warps"]
        columns, units = num_warps * self.lanes * (2 if both else 1), in_units(self.width, distances)
        arguments: dict[str, Any] = {
            **tensors,
            **units,
            "W": self.width // units["UNIT"],
            **self.sequences.arguments,
            **constants,
            "PAIRS": self.pairs,
            "TWO": both,
            "STATE": CONSTANTS[state_dtype(self.dtype)],
            "BT": self.config["BT"],
            "BD": columns,
            "STAGES": stages(self.config, self.lanes),
        }
        pieces = self.sequences.count if per_sequence else self.sequences.pieces
        # Without a bound NVIDIA's assembler spills some of the wide registers for more than a quarter of all warps
        registers = 128 if state_dtype(self.dtype) == torch.float64 else None
        return Launch(kernel, pieces * -(-self.width // columns), arguments, num_warps, registers=registers)

    def batch_stride(self) -> int:
        """Of contiguous rows."""
        return 0 if self.sequences.batch == 1 else self.sequences.length * self.width


def tiles(rows: int, num_warps: int, num_stages: int, sizes: Iterable[int]) -> dict[str, int]:
    """A config for tiles of so many rows, if a thread's numbers of a row are 4 bytes, and fewer if they are wider.

    sizes: those bytes, for each stream.
    """
    # A warp moves 512 bytes at a time, 16 to a thread: no tile may be smaller
    sizes = list(sizes)
    return {"BT": max(rows * 4 // max(sizes), 16 // min(sizes)), "num_warps": num_warps, "num_stages": num_stages}
