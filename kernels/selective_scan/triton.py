"""The selective scan on GPUs: one launch forward, two backward and small sums.

The states of a block of channels are in registers and never leave the chip but every R rows of a backward pass;
triton_kernels.py has the kernels, docs/derivations/selective_scan.md what they move. Under TRITON_INTERPRET=1 they run
on the CPU, slowly, for tests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import triton
from torch import Tensor

from kernels import triton_sums
from kernels.problem import Problem, state_dtype
from kernels.selective_scan.triton_kernels import selective_scan_backward, selective_scan_forward
from kernels.triton_aot import Compiled
from kernels.triton_launch import Launch, compile_all
from kernels.triton_matrix_launch import Blocks, contiguous, missing

INTERPRETED = not isinstance(selective_scan_forward, triton.JITFunction)
NAMES = ("x", "delta", "A", "B", "C", "D_", "initial")
# whose gradients are left in parts, for sequences or blocks of channels
SUMS = ("A", "B", "C", "D_")
# The channels of a warp's rows at most, forward, and the numbers of its tile of rows, backward; of float64 half as many
WIDEST, TILE = 64, 128
# The rows whose reads are under way at once, forward
AHEAD = {torch.float32: 4, torch.float64: 2}
# The keys of a channel that come with one read
SECTOR = 8


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    return missing(problem, INTERPRETED, "TD")


def configs(problem: Problem) -> Sequence[dict[str, int]]:
    """Candidates for the tuner, the default first.

    numbers: of the states to a thread. num_warps: of a program, which has so many channels as that allows. rows: from
    one state that is kept for the backward pass to the next, and of a tile there.

    Every program reads B and C, and leaves its part of their gradients. So the default has 64 channels, for up to 64
    keys; programs of fewer are for sequences that do not fill a GPU with those.
    """
    keys, forward = triton.next_power_of_2(problem.sizes["K"]), problem.direction == "forward"
    if keys > 16:
        wide = {"numbers": 8, "num_warps": 16, "rows": 16}
    else:
        wide = {"numbers": 8, "num_warps": 4, "rows": 16} if forward else {"numbers": 4, "num_warps": 8, "rows": 16}
    return [wide, {**wide, "num_warps": 1 if forward else wide["num_warps"] // 2}]


def forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    config: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    """(y [B, T, D], final_state [N, D, K])"""
    given = _Given(x, delta, A, B, C, D, initial_state, cu_seqlens, config, WIDEST)
    y, final = torch.empty_like(x, memory_format=torch.contiguous_format), given.state()
    given.forward(y, final, None)(x.device)
    return y, final


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    needs: tuple[bool, ...],
    config: Mapping[str, int],
) -> tuple[Tensor | None, ...]:
    """(dx, ddelta, dA, dB, dC, dD, dinitial_state), each None where `needs` says so."""
    given = _Given(x, delta, A, B, C, D, initial_state, cu_seqlens, config, TILE // config["rows"])
    kept, found = given.kept(), given.gradients(needs)
    whole, sums = given.summed(found)
    for launch in (given.forward(None, None, kept), given.backward(dy, dfinal_state, kept, found), *sums):
        launch(x.device)
    return whole


def compile_for(target: str, problem: Problem, config: Mapping[str, int]) -> list[Compiled]:
    """Compiles what the problem would launch for a GPU that need not be there, such as "sm_90" or "gfx942"."""
    batch, T, D, K, N = (problem.sizes[letter] for letter in "BTDKN")
    dtype, options = problem.dtypes["x"], problem.options
    wide = state_dtype(dtype)

    def tensor(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    x, delta = tensor(batch, T, D), tensor(batch, T, D, like=problem.dtypes["delta"])
    A, B, C = tensor(D, K, like=wide), tensor(batch, T, K), tensor(batch, T, K)
    skip = tensor(D, like=wide) if options["D"] else None
    initial = tensor(N, D, K, like=wide) if options["initial_state"] else None
    cu_seqlens = tensor(N + 1, like=torch.int32) if options["packed"] else None
    forward = problem.direction == "forward"
    given = _Given(x, delta, A, B, C, skip, initial, cu_seqlens, config, WIDEST if forward else TILE // config["rows"])
    if forward:
        launches = [given.forward(x, given.state(), None)]
    else:
        every = given.gradients((True,) * 7)
        _, sums = given.summed(every)
        launches = [given.forward(None, None, given.kept()), given.backward(x, initial, given.kept(), every), *sums]
    return compile_all(launches, target)


class _Given(Blocks):
    """The inputs, and how they are launched. most: channels to a warp."""

    def __init__(
        self, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
        initial_state: Tensor | None, cu_seqlens: Tensor | None, config: Mapping[str, int], most: int,
    ) -> None:  # fmt: skip
        self.tensors = contiguous(dict(zip(NAMES, (x, delta, A, B, C, D, initial_state))))
        self.channels, keys = A.shape
        super().__init__(x, cu_seqlens, (self.channels, keys), keys, self.channels, config)
        self.block = min(self.block, max(1, most * config["num_warps"] * 4 // self.dtype.itemsize))
        self.blocks = -(-self.channels // self.block)
        self.programs = self.sequences * self.blocks

    @property
    def registers(self) -> int:
        """As few as a quarter of all warps can have."""
        return 128

    def gradients(self, needs: Sequence[bool]) -> dict[str, Tensor | None]:
        """Where the gradients go; dB, dC in parts for blocks of channels, dA and dD in parts for sequences."""
        parts = self.blocks, self.batch, self.length, self.keys
        shapes = {"A": (self.sequences, self.channels, self.keys), "B": parts, "C": parts}
        shapes["D_"] = self.sequences, self.channels
        found: dict[str, Tensor | None] = {}
        for (name, tensor), needed in zip(self.tensors.items(), needs):
            if tensor is None or not needed:
                found[f"d{name}"] = None
            elif name in shapes:
                # one part has the input's own dtype
                dtype = tensor.dtype if shapes[name][0] == 1 else self.dtype
                found[f"d{name}"] = self.new(*shapes[name], dtype=dtype)
            else:
                found[f"d{name}"] = torch.empty_like(tensor)
        return found

    def summed(self, found: Mapping[str, Tensor | None]) -> tuple[tuple[Tensor | None, ...], list[Launch]]:
        """The gradients as they are returned, and the launches that put the sums of parts there."""
        whole, launches = [], []
        for (name, tensor), gradient in zip(self.tensors.items(), found.values()):
            if tensor is not None and gradient is not None and name in SUMS:
                parts, gradient = gradient, gradient[0] if len(gradient) == 1 else torch.empty_like(tensor)
                if len(parts) != 1:
                    launches.append(triton_sums.add(parts.flatten(1)[:, None], None, gradient.flatten()))
            whole.append(gradient)
        return tuple(whole), launches

    def forward(self, y: Tensor | None, final: Tensor | None, kept: Tensor | None) -> Launch:
        ahead = AHEAD[self.dtype]
        written = {"y": y, "final": final, "kept": kept, "AHEAD": ahead}
        launch = self.launch(selective_scan_forward, {**self.tensors, **written, **self.sizes})
        return replace(launch, steps=-(-launch.steps // ahead))

    def backward(
        self, dy: Tensor | None, dfinal: Tensor | None, kept: Tensor, found: Mapping[str, Tensor | None]
    ) -> Launch:
        read = {name: tensor for name, tensor in self.tensors.items() if name != "initial"}
        arguments = {**contiguous({"dy": dy, "dfinal": dfinal}), **read, "kept": kept, **found}
        launch = self.launch(selective_scan_backward, {**arguments, **self.sizes, "ROWS": self.batch * self.length})
        # a tile waits for its rows, and for what it needs of some keys
        waits = 1 + -(-self.keys // SECTOR)
        return replace(launch, steps=-(-launch.steps // self.config["rows"]) * waits)

    @property
    def sizes(self) -> dict[str, int]:
        return {"D": self.channels, "BD": self.block}
