"""Gated linear attention on GPUs as its loop over time: one launch forward, two backward and small sums.

The state is in registers and never leaves the chip but every R rows of a backward pass; triton_kernels.py has the
kernels. Under TRITON_INTERPRET=1 they run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import triton_aot
from kernels.gla.triton_kernels import gla_backward, gla_forward
from kernels.problem import Problem, state_dtype

INTERPRETED = not isinstance(gla_forward, triton.JITFunction)
CONSTANTS = {torch.float32: triton.language.float32, torch.float64: triton.language.float64}
# The bytes of the keys of a state, some columns of which must fit into a program's registers
MOST_BYTES = 2048
# A thread's
REGISTERS = {torch.float32: 168, torch.float64: 255}


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    device, sizes = problem.device, problem.sizes
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return [f"needs a CUDA or HIP device, the tensors are on {device.type}"]
    reasons = []
    most = MOST_BYTES // state_dtype(problem.dtypes["q"]).itemsize
    if sizes["K"] > most:
        reasons.append(f"axis K is {sizes['K']}; at most {most}")
    if max(sizes["T"], sizes["V"], sizes["H"]) >= 2**30:
        reasons.append(f"an axis of {max(sizes['T'], sizes['V'], sizes['H'])}; at most {2**30 - 1}")
    if device.type == "cuda" and torch.cuda.is_available() and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            reasons.append(f"needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}")
    return reasons


def configs(problem: Problem) -> Sequence[dict[str, int]]:
    """Candidates for the tuner, the default first.

    numbers: of the state to a thread. num_warps: of a program, which has so many values as that allows. rows: from one
    state that is kept for the backward pass to the next.
    """
    if problem.direction == "forward":
        return [
            {"numbers": 8, "num_warps": 4, "rows": 32},
            {"numbers": 16, "num_warps": 2, "rows": 32},
            {"numbers": 8, "num_warps": 1, "rows": 32},
        ]
    return [{"numbers": 8, "num_warps": 4, "rows": 32}, {"numbers": 8, "num_warps": 2, "rows": 32}]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    config: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V], final_state [N, H, K, V])"""
    given = _Given(q, k, v, log_decay, initial_state, bonus, cu_seqlens, scale, config)
    y, final = torch.empty_like(v, memory_format=torch.contiguous_format), given.state()
    given.forward(y, final, None)(q.device)
    return y, final


def backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    bonus: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    scale: float,
    needs: tuple[bool, ...],
    config: Mapping[str, int],
) -> tuple[Tensor | None, ...]:
    """(dq, dk, dv, dlog_decay, dinitial_state, dbonus), each None where `needs` says so."""
    given = _Given(q, k, v, log_decay, initial_state, bonus, cu_seqlens, scale, config)
    kept = given.kept()
    given.forward(None, None, kept)(q.device)
    found = given.gradients(needs)
    given.backward(dy, dfinal_state, kept, found)(q.device)
    return given.summed(found)


def compile_for(target: str, problem: Problem, config: Mapping[str, int]) -> list[triton_aot.Compiled]:
    """Compiles what the problem would launch for a GPU that need not be there, such as "sm_90" or "gfx942".

    Backward with every gradient, and with one of the final state where there is an initial state.
    """
    sizes, options, dtype = problem.sizes, problem.options, problem.dtypes["q"]
    wide, (B, T, H, K, V, N) = state_dtype(dtype), (sizes[letter] for letter in "BTHKVN")

    def tensor(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    log_decay = tensor(B, T, H, sizes["J"], like=wide) if options["log_decay"] else None
    initial = tensor(N, H, K, V, like=wide) if options["initial_state"] else None
    bonus = tensor(H, K, like=wide) if options["bonus"] else None
    cu_seqlens = tensor(N + 1, like=torch.int32) if options["packed"] else None
    q, v = tensor(B, T, H, K), tensor(B, T, H, V)
    given = _Given(q, q, v, log_decay, initial, bonus, cu_seqlens, 0.125, config)
    if problem.direction == "forward":
        launches = [given.forward(v, given.state(), None)]
    else:
        launches = [given.forward(None, None, given.kept())]
        launches.append(given.backward(v, initial, given.kept(), given.gradients((True,) * 6)))
    nvidia = target.startswith("sm_")
    return [
        triton_aot.compile_kernel(a.kernel, a.arguments, target, programs=a.programs, **a.options(nvidia))
        for a in launches
    ]


@dataclass(frozen=True)
class Launch:
    """A kernel and everything that it is launched with."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    num_warps: int
    registers: int

    def options(self, nvidia: bool) -> dict[str, int]:
        # one stage: what a program has left in memory it reads again, so no load may move before a store
        options = {"num_warps": self.num_warps, "num_stages": 1}
        # without a bound NVIDIA's assembler spills some registers so that more threads are resident
        return {**options, "maxnreg": self.registers} if nvidia else options

    def __call__(self, device: torch.device) -> None:
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[(self.programs,)](**self.arguments, **self.options(torch.version.hip is None))


class _Given:
    """The inputs, and how they are launched."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, initial_state: Tensor | None,
        bonus: Tensor | None, cu_seqlens: Tensor | None, scale: float, config: Mapping[str, int],
    ) -> None:  # fmt: skip
        names = ("q", "k", "v", "log_decay", "initial", "bonus", "cu_seqlens")
        given = (q, k, v, log_decay, initial_state, bonus, cu_seqlens)
        self.tensors = {name: None if t is None else t.contiguous() for name, t in zip(names, given)}
        self.like, self.log_decay, self.bonus, self.scale, self.config = v, log_decay, bonus, scale, config
        self.dtype = state_dtype(q.dtype)
        self.batch, self.length, self.heads, self.keys = q.shape
        self.values = v.shape[3]
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.per_key = log_decay is not None and log_decay.shape[3] > 1
        self.BK = triton.next_power_of_2(self.keys)
        room = max(1, config["numbers"] * config["num_warps"] * 32 // self.BK)
        self.BV = min(triton.next_power_of_2(self.values), room * 4 // self.dtype.itemsize or 1)
        self.blocks = -(-self.values // self.BV)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.like.new_empty(shape, dtype=dtype or self.dtype)

    def state(self) -> Tensor:
        return self.new(self.sequences, self.heads, self.keys, self.values)

    def kept(self) -> Tensor:
        """The state before every R-th row of each sequence; where their lengths are unknown, room for no fewer."""
        rows = self.config["rows"]
        count = self.batch * -(-self.length // rows)
        if self.tensors["cu_seqlens"] is not None:
            count = self.length // rows + self.sequences
        return self.new(count, self.heads, self.keys, self.values)

    def gradients(self, needs: tuple[bool, ...]) -> dict[str, Tensor | None]:
        """Where the gradients go; sums over all values, in one part for each block of them."""
        narrow = self.like.dtype if self.blocks == 1 else self.dtype
        rows, decays = (self.blocks, self.batch, self.length, self.heads), self.keys if self.per_key else 1
        decay = self.log_decay is not None and needs[3]
        return {
            "dq": self.new(*rows, self.keys, dtype=narrow) if needs[0] else None,
            "dk": self.new(*rows, self.keys, dtype=narrow) if needs[1] else None,
            "dv": self.new(*rows[1:], self.values, dtype=self.like.dtype) if needs[2] else None,
            "dlog_decay": self.new(*rows, decays) if decay else None,
            "dinitial": self.state() if self.tensors["initial"] is not None and needs[4] else None,
            "dbonus": self.new(self.blocks, self.sequences, self.heads, self.keys)
            if self.bonus is not None and needs[5]
            else None,
        }

    def summed(self, found: Mapping[str, Tensor | None]) -> tuple[Tensor | None, ...]:
        dq, dk, dlog_decay = (
            None if g is None else (g[0] if self.blocks == 1 else g.sum(0))
            for g in map(found.get, ("dq", "dk", "dlog_decay"))
        )
        dbonus = None if found["dbonus"] is None else found["dbonus"].sum((0, 1))
        dq, dk = (None if g is None else g.to(self.like.dtype) for g in (dq, dk))
        return dq, dk, found["dv"], dlog_decay, found["dinitial"], dbonus

    def forward(self, y: Tensor | None, final: Tensor | None, kept: Tensor | None) -> Launch:
        return self._launch(gla_forward, {**self.tensors, "y": y, "final": final, "kept": kept})

    def backward(
        self, dy: Tensor | None, dfinal: Tensor | None, kept: Tensor, found: Mapping[str, Tensor | None]
    ) -> Launch:
        programs = self.sequences * self.heads * self.blocks
        scratch = self.new(programs, self.config["rows"], self.BK, self.BV)
        given = {name: None if t is None else t.contiguous() for name, t in (("dy", dy), ("dfinal", dfinal))}
        sizes = {"ROWS": self.batch * self.length, "N": self.sequences}
        read = {name: t for name, t in self.tensors.items() if name != "initial"}
        return self._launch(gla_backward, {**given, **read, "kept": kept, "scratch": scratch, **found, **sizes})

    def _launch(self, kernel: Any, arguments: dict[str, Any]) -> Launch:
        arguments |= {
            # a number known to the compiler has all its digits, an argument those of float32
            "SCALE": self.scale,
            "T": self.length,
            "H": self.heads,
            "K": self.keys,
            "V": self.values,
            "PER_KEY": self.per_key,
            "STATE": CONSTANTS[self.dtype],
            "R": self.config["rows"],
            "BK": self.BK,
            "BV": self.BV,
        }
        programs = self.sequences * self.heads * self.blocks
        return Launch(kernel, programs, arguments, self.config["num_warps"], REGISTERS[self.dtype])
