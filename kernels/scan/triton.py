"""The scan on GPUs: one launch each way that moves every byte once, or three short ones that split time over programs.

A warp walks down the rows of one sequence, or of one chunk of it, 32 neighbouring numbers of a row wide (64 where a
thread has two), and every thread keeps whole columns in registers; triton_kernels.py has the kernels. Under
TRITON_INTERPRET=1 they run on the CPU, slowly, for tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import triton_aot
from kernels.memory import contiguous, side_by_side
from kernels.problem import Problem, state_dtype
from kernels.scan.triton_kernels import scan_backward, scan_chunks, scan_forward
from kernels.triton_launch import (
    CONSTANTS,
    Launch,
    Sequences,
    compile_all,
    distances,
    in_units,
    lanes,
    missing,
    stages,
    two,
    with_splits,
)

INTERPRETED = not isinstance(scan_forward, triton.JITFunction)
# From this many numbers to the rows of all sequences together, programs of four warps are still enough for any GPU
MANY_COLUMNS = 2**17


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    width = problem.sizes["D"] * (2 if problem.options["pairs"] else 1)
    if width >= 2**30:
        return [*missing(problem.device, INTERPRETED), f"rows of {width} numbers; at most {2**30 - 1}"]
    return missing(problem.device, INTERPRETED)


def configs(problem: Problem) -> Sequence[dict[str, int]]:
    """Candidates for the tuner, the default first.

    BT: rows of a tile. num_warps: warps side by side. num_stages: tiles in work or on their way. The rows named here
    are for 4 bytes to a thread; where a thread's numbers are wider there are fewer. A warp then takes at most 9 KiB of
    shared memory, so that at least a quarter of the warps that a GPU can hold are resident. split: steps of a chunk,
    where time is split over programs; without it the state is carried through time.
    The default is one warp to a program, or four where that leaves programs enough (see MANY_COLUMNS); it is carried
    unless there are few columns and long sequences (see `with_splits`).
    """
    pairs = problem.options["pairs"]
    numbers = 2 if two(pairs, _sequence(problem)) else 1
    sizes = [dtype.itemsize * numbers for dtype in problem.dtypes.values()]
    if problem.direction == "forward":
        narrow, wide, other = (8, 1, 5), (8, 4, 4), (16, 1, 2)
    else:
        narrow, wide, other = (8, 1, 3), (8, 4, 3), (4, 1, 5)
    columns = problem.sizes["N"] * problem.sizes["D"] * (2 if pairs else 1)
    order = (wide, narrow, other) if columns >= MANY_COLUMNS else (narrow, wide, other)
    found = {shape: _config(*shape, sizes) for shape in order}
    return with_splits(list(found.values()), found[narrow], problem, columns=32 * numbers)


def _config(rows: int, num_warps: int, num_stages: int, sizes: Sequence[int]) -> dict[str, int]:
    """sizes: the bytes of a thread's numbers in a row of each stream."""
    # A warp moves 512 bytes at a time, 16 to a thread: no tile may be smaller
    return {"BT": max(rows * 4 // max(sizes), 16 // min(sizes)), "num_warps": num_warps, "num_stages": num_stages}


def forward(
    a: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    reverse: bool,
    config: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    """h like x, and final_state [N, D] or [N, D, 2] in the dtype of states."""
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = x.new_empty((sequences, *x.shape[2:]), dtype=state_dtype(x.dtype))
    given = _Given(x, cu_seqlens, reverse, config, lanes(x.device))
    for launch in given.forward(a, x, initial_state, h, final_state):
        launch(x.device)
    return h, final_state


def backward(
    dh: Tensor | None,
    dfinal_state: Tensor | None,
    a: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    reverse: bool,
    needs: tuple[bool, ...],
    config: Mapping[str, int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """da like a, dx like h and dinitial_state, each None where `needs` says so; what is not needed is not written."""
    da = torch.empty_like(a, memory_format=torch.contiguous_format) if needs[0] else None
    dx = torch.empty_like(h, memory_format=torch.contiguous_format) if needs[1] else None
    dinitial = None
    if needs[2] and initial_state is not None:
        dinitial = torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    given = _Given(h, cu_seqlens, reverse, config, lanes(h.device))
    for launch in given.backward(dh, dfinal_state, a, h, initial_state, da, dx, dinitial):
        launch(h.device)
    return da, dx, dinitial


def compile_for(target: str, problem: Problem, config: Mapping[str, int]) -> list[triton_aot.Compiled]:
    """Compiles what the problem would launch for a GPU that need not be there, such as "sm_90" or "gfx942".

    Backward with every gradient, and with one of the final state where there is an initial state.
    """
    sizes, dtype = problem.sizes, _sequence(problem)
    pair = [2] if problem.options["pairs"] else []

    def sequence(like: torch.dtype) -> Tensor:
        return torch.empty([sizes["B"], sizes["T"], sizes["D"], *pair], dtype=like, device="meta")

    def state() -> Tensor:
        return torch.empty([sizes["N"], sizes["D"], *pair], dtype=state_dtype(dtype), device="meta")

    initial = state() if problem.options["initial_state"] else None
    packed = torch.empty(sizes["N"] + 1, dtype=torch.int32, device="meta") if problem.options["packed"] else None
    a, like_x = sequence(problem.dtypes["a"]), sequence(dtype)
    given = _Given(like_x, packed, problem.options["reverse"], config, triton_aot.lanes(target))
    if problem.direction == "forward":
        return compile_all(given.forward(a, like_x, initial, like_x, state()), target)
    return compile_all(given.backward(like_x, initial, a, like_x, initial, a, like_x, initial), target)


class _Given:
    """What sequences like `like` [B, T, D] or [B, T, D, 2] are launched with."""

    def __init__(
        self, like: Tensor, cu_seqlens: Tensor | None, reverse: bool, config: Mapping[str, int], lanes: int
    ) -> None:
        self.like, self.reverse, self.config, self.lanes = like, reverse, config, lanes
        self.sequences = Sequences.of(like, cu_seqlens, config)
        self.pairs, self.state = like.ndim == 4, state_dtype(like.dtype)
        self.width = like.shape[2] * (2 if self.pairs else 1)

    def forward(self, a: Tensor, x: Tensor, initial: Tensor | None, h: Tensor, final: Tensor) -> list[Launch]:
        read: dict[str, Tensor | None] = {"a": side_by_side(a), "x": side_by_side(x)}
        initial = contiguous(initial)
        launches, entering = self.chunks(read, initial, backward=False)
        tensors = {**read, "initial": initial, "entering": entering, "h": h, "final": final}
        rows = distances(read) | {"h_b": self.batch_stride(h)}
        return [*launches, self.launch(scan_forward, tensors, rows, REVERSE=self.reverse, PIECES=False)]

    def backward(
        self,
        dh: Tensor | None,
        dfinal: Tensor | None,
        a: Tensor,
        h: Tensor,
        initial: Tensor | None,
        da: Tensor | None,
        dx: Tensor | None,
        dinitial: Tensor | None,
    ) -> list[Launch]:
        read: dict[str, Tensor | None] = {"a": side_by_side(a), "dh": side_by_side(dh), "h": side_by_side(h)}
        dfinal = contiguous(dfinal)
        launches, entering = self.chunks({"a": read["a"], "x": read["dh"]}, dfinal, backward=True)
        states = {"dfinal": dfinal, "entering": entering, "initial": contiguous(initial), "dinitial": dinitial}
        tensors = {**read, **states, "da": da, "dx": dx}
        rows = distances(read) | {"out_b": self.batch_stride(h)}
        return [*launches, self.launch(scan_backward, tensors, rows, REVERSE=self.reverse)]

    def chunks(
        self, read: Mapping[str, Tensor | None], first: Tensor | None, backward: bool
    ) -> tuple[list[Launch], Tensor | None]:
        """The launches that make the state after every chunk that another one follows, and where they leave it. Nothing
        where time is carried."""
        sequences, chunk = self.sequences, self.sequences.chunk
        if chunk is None:
            return [], None
        # a walk against time meets its chunks from the last row on
        up = self.reverse == backward
        rows = 1 if sequences.cu_seqlens is not None else sequences.batch, -1, *self.like.shape[2:]
        product, ending, after = (
            self.like.new_empty((sequences.pieces, *self.like.shape[2:]), dtype=self.state) for _ in range(3)
        )
        made = {**read, "product": product, "ending": ending}
        first_launch = self.launch(scan_chunks, made, distances(read), REVERSE=not up, BACKWARD=backward)

        steps = {"a": product.view(rows), "x": ending.view(rows)}
        tensors = {**steps, "initial": first, "entering": None, "h": after, "final": None}
        size = self.state.itemsize * (2 if self.pairs else 1)
        config = _config(8, 1, 4, [size])
        over = Sequences(sequences.batch, steps["a"].shape[1] - 1, None, None)
        packed = sequences.cu_seqlens is not None
        second = self.launch(
            scan_forward,
            tensors,
            distances(steps) | {"h_b": self.batch_stride(steps["a"])},
            config=config,
            dtype=self.state,
            sequences=sequences if packed else over,
            programs=sequences.count,
            REVERSE=False,
            PIECES=packed,
        )
        return [first_launch, second], after

    def batch_stride(self, contiguous: Tensor) -> int:
        return 0 if contiguous.shape[0] == 1 else contiguous.shape[1] * self.width

    def launch(
        self,
        kernel: Any,
        tensors: Mapping[str, Tensor | None],
        distances: Mapping[str, int],
        *,
        config: Mapping[str, int] | None = None,
        dtype: torch.dtype | None = None,
        sequences: Sequences | None = None,
        programs: int | None = None,
        **constants: bool,
    ) -> Launch:
        """A launch of so many programs for every block of columns; by default one for each piece, with the config."""
        config, sequences = config or self.config, sequences or self.sequences
        both = two(self.pairs, dtype or self.like.dtype)
        columns = config["num_warps"] * self.lanes * (2 if both else 1)
        arguments: dict[str, Any] = {
            **tensors,
            **in_units(self.width, distances),
            **sequences.arguments,
            **constants,
            "PAIRS": self.pairs,
            "TWO": both,
            "STATE": CONSTANTS[self.state],
            "BT": config["BT"],
            "BD": columns,
            "STAGES": stages(config, self.lanes),
        }
        programs = (sequences.pieces if programs is None else programs) * -(-self.width // columns)
        return Launch(kernel, programs, arguments, config["num_warps"])


def _sequence(problem: Problem) -> torch.dtype:
    # The backward pass is posed by the residuals a, h
    return problem.dtypes["x" if "x" in problem.dtypes else "h"]
