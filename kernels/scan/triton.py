"""The scan on GPUs: one launch each way that moves every byte once, or three short ones that split time over programs.

A warp walks down the rows of one sequence, or of one chunk of it, 32 neighbouring numbers of a row wide (64 where a
thread has two), and every thread keeps whole columns in registers; triton_kernels.py has the kernels. Under
TRITON_INTERPRET=1 they run on the CPU, slowly, for tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from kernels import triton_aot, triton_rows_launch
from kernels.memory import contiguous, side_by_side
from kernels.problem import Problem, state_dtype
from kernels.scan.triton_kernels import scan_backward, scan_chunks, scan_forward
from kernels.triton_launch import Launch, compile_all, distances, lanes
from kernels.triton_rows_launch import Rows, Sequences, tiles, two

INTERPRETED = not isinstance(scan_forward, triton.JITFunction)


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    return triton_rows_launch.cannot(problem, INTERPRETED)


def configs(problem: Problem) -> Sequence[dict[str, int]]:
    """Candidates for the tuner, the default first.

    BT: rows of a tile. num_warps: warps side by side. num_stages: tiles in work or on their way. The rows named here
    are for 4 bytes to a thread; where a thread's numbers are wider there are fewer. A warp then takes at most 9 KiB of
    shared memory, so that at least a quarter of the warps that a GPU can hold are resident. split: steps of a chunk,
    where time is split over programs; without it the state is carried through time.
    `triton_rows_launch.configs` has their order.
    """
    numbers = 2 if two(problem.options["pairs"], _sequence(problem)) else 1
    sizes = [dtype.itemsize * numbers for dtype in problem.dtypes.values()]
    if problem.direction == "forward":
        shapes = (8, 1, 5), (8, 4, 4), (16, 1, 2)
    else:
        shapes = (8, 1, 3), (8, 4, 3), (4, 1, 5)
    narrow, wide, other = (tiles(*shape, sizes) for shape in shapes)
    return triton_rows_launch.configs(narrow, wide, other, problem, numbers)


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
        self.reverse, pairs = reverse, like.ndim == 4
        width, sequences = like.shape[2] * (2 if pairs else 1), Sequences.of(like, cu_seqlens, config)
        self.rows = Rows(width, pairs, like.dtype, sequences, config, lanes)

    def forward(self, a: Tensor, x: Tensor, initial: Tensor | None, h: Tensor, final: Tensor) -> list[Launch]:
        read: dict[str, Tensor | None] = {"a": side_by_side(a), "x": side_by_side(x)}
        initial = contiguous(initial)
        launches, entering = self.chunks(read, initial, x, backward=False)
        tensors = {**read, "initial": initial, "entering": entering, "h": h, "final": final}
        strides = distances(read) | {"h_b": self.rows.batch_stride()}
        return [*launches, self.rows.launch(scan_forward, tensors, strides, REVERSE=self.reverse, PIECES=False)]

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
        launches, entering = self.chunks({"a": read["a"], "x": read["dh"]}, dfinal, h, backward=True)
        states = {"dfinal": dfinal, "entering": entering, "initial": contiguous(initial), "dinitial": dinitial}
        tensors = {**read, **states, "da": da, "dx": dx}
        strides = distances(read) | {"out_b": self.rows.batch_stride()}
        return [*launches, self.rows.launch(scan_backward, tensors, strides, REVERSE=self.reverse)]

    def chunks(
        self, read: Mapping[str, Tensor | None], first: Tensor | None, like: Tensor, backward: bool
    ) -> tuple[list[Launch], Tensor | None]:
        """The launches that make the states between chunks, and where those are; nothing where time is carried."""
        if self.rows.sequences.chunk is None:
            return [], None
        between = Between.of(self.rows, like)
        made = {**read, "product": between.product, "ending": between.ending}
        # A walk against time meets its chunks from the last row on
        constants = {"REVERSE": self.reverse != backward, "BACKWARD": backward}
        ends = self.rows.launch(scan_chunks, made, distances(read), **constants)
        return [ends, between.launch(first)], between.after


@dataclass(frozen=True)
class Between:
    """The states between chunks. Of each piece in the order of the walk: the product of its decays and its last state
    when it starts from 0, both made elsewhere, and the state after it."""

    product: Tensor
    ending: Tensor
    after: Tensor
    rows: Rows

    @classmethod
    def of(cls, rows: Rows, like: Tensor) -> Between:
        """Uninitialised, for pieces of sequences like this one."""
        shape = rows.sequences.pieces, *like.shape[2:]
        product, ending, after = (like.new_empty(shape, dtype=state_dtype(like.dtype)) for _ in range(3))
        return cls(product, ending, after, rows)

    def launch(self, first: Tensor | None) -> Launch:
        """Scans over the pieces of each sequence but its last one, which nothing follows."""
        sequences, packed = self.rows.sequences, self.rows.sequences.cu_seqlens is not None
        batch = 1 if packed else sequences.batch
        steps: dict[str, Tensor | None] = {
            "a": self.product.view(batch, -1, *self.product.shape[1:]),
            "x": self.ending.view(batch, -1, *self.ending.shape[1:]),
        }
        chunks = self.product.shape[0] // batch
        over = sequences if packed else Sequences(batch, chunks - 1, None, None)
        size = self.product.dtype.itemsize * (2 if self.rows.pairs else 1)
        rows = replace(self.rows, dtype=self.product.dtype, sequences=over, config=tiles(8, 1, 4, [size]))
        strides = distances(steps) | {"h_b": 0 if batch == 1 else chunks * rows.width}
        tensors = {**steps, "initial": first, "entering": None, "h": self.after, "final": None}
        return rows.launch(scan_forward, tensors, strides, per_sequence=True, REVERSE=False, PIECES=packed)


def _sequence(problem: Problem) -> torch.dtype:
    # The backward pass is posed by the residuals a, h
    return problem.dtypes["x" if "x" in problem.dtypes else "h"]
