"""HGRN's recurrence on GPUs: one launch forward, and backward one and a small one that adds what programs have summed.

Where time is split over programs, two short launches more. The gates are computed in registers, backward again: i, f, h
and their gradients are all that is in memory. See kernels/scan/triton.py, whose walk down the rows this is, and
triton_kernels.py. Under TRITON_INTERPRET=1 the kernels run on the CPU, slowly, for tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import triton_aot, triton_rows_launch, triton_sums
from kernels.hgru.triton_kernels import hgru_backward, hgru_chunks, hgru_forward
from kernels.memory import contiguous, side_by_side
from kernels.problem import Problem, state_dtype
from kernels.scan.triton import Between
from kernels.triton_launch import Launch, compile_all, distances, lanes
from kernels.triton_rows_launch import Rows, Sequences, tiles, two

INTERPRETED = not isinstance(hgru_forward, triton.JITFunction)


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    return triton_rows_launch.cannot(problem, INTERPRETED)


def configs(problem: Problem) -> Sequence[dict[str, int]]:
    """Candidates for the tuner, the default first; named and ordered as those of the scan."""
    pairs, dtype = problem.options["pairs"], problem.dtypes["i"]
    numbers = 2 if two(pairs, dtype) else 1
    # Of i and h, and of f, which has one number for a pair
    sizes = [dtype.itemsize * numbers, dtype.itemsize * (1 if pairs else numbers)]
    if problem.direction == "forward":
        found = [tiles(8, *rest, sizes) for rest in ((1, 5), (4, 4), (1, 3))]
    else:
        # Gates and gradients of so few rows leave registers for other warps; of pairs there is more on its way, which
        # those of float64 have no registers for
        tile, stages = (2 if dtype.itemsize == 8 else 4), (3 if pairs else 4)
        if pairs and dtype.itemsize == 8:
            stages = 2
        found = [{"BT": tile, "num_warps": warps, "num_stages": n} for warps, n in ((1, stages), (4, stages), (1, 2))]
    narrow, wide, other = found
    return triton_rows_launch.configs(narrow, wide, other, problem, numbers)


def forward(
    i: Tensor,
    f: Tensor,
    lower_bound: Tensor | None,
    theta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    activation: str,
    reverse: bool,
    config: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    """h like i, and final_state [N, D] or [N, D, 2] in the dtype of states."""
    h = torch.empty_like(i, memory_format=torch.contiguous_format)
    given = _Given(i, f, lower_bound, theta, initial_state, cu_seqlens, activation, reverse, config, lanes(i.device))
    final_state = i.new_empty((given.rows.sequences.count, *i.shape[2:]), dtype=state_dtype(i.dtype))
    for launch in given.forward(h, final_state):
        launch(i.device)
    return h, final_state


def backward(
    dh: Tensor | None,
    dfinal_state: Tensor | None,
    i: Tensor,
    f: Tensor,
    h: Tensor,
    lower_bound: Tensor | None,
    theta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    activation: str,
    reverse: bool,
    needs: tuple[bool, ...],
    config: Mapping[str, int],
) -> tuple[Tensor | None, ...]:
    """(di, df, dlower_bound, dtheta, dinitial_state), each like its input, or None where `needs` says so."""
    found = tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed and tensor is not None else None
        for tensor, needed in zip((i, f, lower_bound, theta, initial_state), needs)
    )
    given = _Given(i, f, lower_bound, theta, initial_state, cu_seqlens, activation, reverse, config, lanes(i.device))
    for launch in given.backward(dh, dfinal_state, h, *found):
        launch(i.device)
    return found


def compile_for(target: str, problem: Problem, config: Mapping[str, int]) -> list[triton_aot.Compiled]:
    """Compiles what the problem would launch for a GPU that need not be there, such as "sm_90" or "gfx942".

    Backward with every gradient, and with one of the final state where there is an initial state.
    """
    sizes, options, dtype = problem.sizes, problem.options, problem.dtypes["i"]
    pair, wide = [2] if options["pairs"] else [], state_dtype(dtype)

    def tensor(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    B, T, D, N = (sizes[letter] for letter in "BTDN")
    i, f = tensor(B, T, D, *pair), tensor(B, T, D)
    bound, theta = (tensor(D, like=wide) if options[name] else None for name in ("lower_bound", "theta"))
    state = tensor(N, D, *pair, like=wide)
    initial = state if options["initial_state"] else None
    packed = tensor(N + 1, like=torch.int32) if options["packed"] else None
    rest = packed, options["activation"], options["reverse"], config, triton_aot.lanes(target)
    given = _Given(i, f, bound, theta, initial, *rest)
    if problem.direction == "forward":
        return compile_all(given.forward(i, state), target)
    return compile_all(given.backward(i, initial, i, i, f, bound, theta, initial), target)


class _Given:
    """The inputs, and how they are launched."""

    def __init__(
        self, i: Tensor, f: Tensor, lower_bound: Tensor | None, theta: Tensor | None, initial_state: Tensor | None,
        cu_seqlens: Tensor | None, activation: str, reverse: bool, config: Mapping[str, int], lanes: int,
    ) -> None:  # fmt: skip
        pairs, self.channels = i.ndim == 4, i.shape[2]
        self.i, self.f = side_by_side(i), side_by_side(f)
        self.fixed = {"lower_bound": contiguous(lower_bound), "theta": contiguous(theta)}
        self.initial, self.reverse, self.activation = contiguous(initial_state), reverse, activation
        width, sequences = self.channels * (2 if pairs else 1), Sequences.of(i, cu_seqlens, config)
        self.rows = Rows(width, pairs, i.dtype, sequences, config, lanes)

    def forward(self, h: Tensor, final: Tensor) -> list[Launch]:
        read: dict[str, Tensor | None] = {"i": self.i, "f": self.f}
        launches, entering = self.chunks(self.i, self.initial, backward=False)
        states = {"initial": self.initial, "entering": entering, "h": h, "final": final}
        return [*launches, self.launch(hgru_forward, read, states, {"h_b": self.rows.batch_stride()})]

    def backward(
        self,
        dh: Tensor | None,
        dfinal: Tensor | None,
        h: Tensor,
        di: Tensor | None,
        df: Tensor | None,
        dlower_bound: Tensor | None,
        dtheta: Tensor | None,
        dinitial: Tensor | None,
    ) -> list[Launch]:
        dh, dfinal = side_by_side(dh), contiguous(dfinal)
        launches, entering = self.chunks(dh, dfinal, backward=True)
        partial = None
        if dlower_bound is not None or dtheta is not None:
            shape = self.rows.sequences.pieces, 2, self.channels
            partial = self.i.new_empty(shape, dtype=state_dtype(h.dtype))
        read = {"dh": dh, "i": self.i, "f": self.f, "h": side_by_side(h)}
        rest = {"dfinal": dfinal, "entering": entering, "initial": self.initial, "dinitial": dinitial, "di": di}
        rest |= {"df": df, "partial": partial}
        summed = {"BOUND": dlower_bound is not None, "THETA": dtheta is not None}
        rows = 0 if h.shape[0] == 1 else h.shape[1]
        strides = {"di_b": self.rows.batch_stride(), "df_b": rows * self.channels, "df_t": self.channels}
        launches.append(self.launch(hgru_backward, read, rest, strides, **summed))
        if partial is not None:
            launches.append(triton_sums.add(partial, dlower_bound, dtheta))
        return launches

    def chunks(self, inputs: Tensor | None, first: Tensor | None, backward: bool) -> tuple[list[Launch], Tensor | None]:
        """The launches that make the states between chunks, and where those are; nothing where time is carried."""
        if self.rows.sequences.chunk is None:
            return [], None
        between = Between.of(self.rows, self.i)
        made = {"product": between.product, "ending": between.ending}
        # A walk against time meets its chunks from the last row on
        constants = {"REVERSE": self.reverse != backward, "BACKWARD": backward}
        ends = self.launch(hgru_chunks, {"i": inputs, "f": self.f}, made, {}, **constants)
        return [ends, between.launch(first)], between.after

    def launch(
        self,
        kernel: Any,
        read: Mapping[str, Tensor | None],
        rest: Mapping[str, Tensor | None],
        strides: Mapping[str, int],
        **constants: bool,
    ) -> Launch:
        tensors = {**read, **rest, **self.fixed}
        facts: dict[str, Any] = {"REVERSE": self.reverse, "ACTIVATION": self.activation, **constants}
        # G: what is in a row of f
        strides = {**distances(read), **strides, "G": self.channels}
        return self.rows.launch(kernel, tensors, strides, **facts)
