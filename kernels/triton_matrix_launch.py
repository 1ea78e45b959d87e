"""How Triton kernels of recurrences with a matrix state are launched: one launch forward, two backward and small sums.

Under TRITON_INTERPRET=1 they run on the CPU, slowly, for tests. triton_matrix.py has what the kernels share.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.memory import contiguous as one_contiguous
from kernels.problem import Problem, state_dtype
from kernels.triton_aot import Compiled
from kernels.triton_launch import CONSTANTS, Launch, compile_all
from kernels.triton_launch import missing as no_triton

# The bytes of the keys of a state, some columns of which must fit into a program's registers
MOST_BYTES = 2048
# A thread's
REGISTERS = {torch.float32: 168, torch.float64: 255}


def cannot(problem: Problem, interpreted: bool) -> list[str]:
    """Why kernels of a recurrence with heads cannot run the problem; empty if they can."""
    return missing(problem, interpreted, "TVH")


def missing(problem: Problem, interpreted: bool, axes: str) -> list[str]:
    """What keeps Triton from the problem: the device, more keys than registers have room for, or one of the axes."""
    device, sizes = problem.device, problem.sizes
    reasons = no_triton(device, interpreted)
    most = MOST_BYTES // state_dtype(next(iter(problem.dtypes.values()))).itemsize
    if sizes["K"] > most:
        reasons.append(f"axis K is {sizes['K']}; at most {most}")
    # within a state, numbers are counted in 32 bits
    columns = "V" if "V" in axes else "D"
    if sizes["K"] * sizes[columns] >= 2**31:
        reasons.append(f"axes K, {columns} are {sizes['K']}, {sizes[columns]}; their product at most {2**31 - 1}")
    reasons += [f"axis {axis} is {sizes[axis]}; at most {2**30 - 1}" for axis in axes if sizes[axis] >= 2**30]
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


class Blocks:
    """How states are shared out: to a program all keys, and so many columns as the config has room for, of one state.

    like: a sequence [B, T, ...]. shape: of a sequence's states, [..., K, columns] or the other way round.
    """

    def __init__(
        self, like: Tensor, cu_seqlens: Tensor | None, shape: tuple[int, ...], keys: int, columns: int,
        config: Mapping[str, int],
    ) -> None:  # fmt: skip
        self.like, self.config, self.dtype = like, config, state_dtype(like.dtype)
        self.shape, self.keys, self.cu_seqlens = shape, keys, one_contiguous(cu_seqlens)
        self.batch, self.length = like.shape[:2]
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.BK = triton.next_power_of_2(keys)
        room = max(1, config["numbers"] * config["num_warps"] * 32 // self.BK)
        self.block = min(triton.next_power_of_2(columns), room * 4 // self.dtype.itemsize or 1)
        self.blocks = -(-columns // self.block)
        self.programs = self.sequences * math.prod(shape[:-2]) * self.blocks

    @property
    def registers(self) -> int:
        """Of a thread, at most."""
        return REGISTERS[self.dtype]

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.like.new_empty(shape, dtype=dtype or self.dtype)

    def state(self) -> Tensor:
        """Of every sequence."""
        return self.new(self.sequences, *self.shape)

    def kept(self) -> Tensor:
        """The state before every R-th row of each sequence; where their lengths are unknown, room for no fewer."""
        rows = self.config["rows"]
        count = self.batch * -(-self.length // rows)
        if self.cu_seqlens is not None:
            count = self.length // rows + self.sequences
        return self.new(count, *self.shape)

    def launch(self, kernel: Any, arguments: Mapping[str, Any]) -> Launch:
        shared = {
            "cu_seqlens": self.cu_seqlens,
            "T": self.length,
            "K": self.keys,
            "STATE": CONSTANTS[self.dtype],
            "R": self.config["rows"],
            "BK": self.BK,
        }
        # one stage: what a program has left in memory it reads again, so no load may move before a store; and without a
        # bound NVIDIA's assembler spills some registers so that more threads are resident
        return Launch(
            kernel,
            self.programs,
            {**arguments, **shared},
            self.config["num_warps"],
            num_stages=1,
            registers=self.registers,
            steps=self.batch * self.length // self.sequences,
        )


class Recurrence(Blocks):
    """The inputs of an op with a matrix state, its two kernels, and how they are launched.

    rows: q, k, v, log_decay [B, T, H, J] and the op's others, by name. parameters: [H, K]; their gradients are sums
    over values and sequences, float32 or wider.
    config: numbers of the state to a thread, num_warps of a program, and the rows from one kept state to the next.
    """

    def __init__(
        self,
        kernels: tuple[Any, Any],
        rows: Mapping[str, Tensor | None],
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        config: Mapping[str, int],
        parameters: Mapping[str, Tensor | None] | None = None,
    ) -> None:
        self.kernels, self.scale = kernels, scale
        self.rows, self.parameters = contiguous(rows), contiguous(parameters or {})
        self.initial = one_contiguous(initial_state)
        q, v = self.rows["q"], self.rows["v"]
        assert q is not None
        assert v is not None
        self.heads, keys, self.values = q.shape[2], q.shape[3], v.shape[3]
        super().__init__(v, cu_seqlens, (self.heads, keys, self.values), keys, self.values, config)

    def run_forward(self) -> tuple[Tensor, Tensor]:
        """(y [B, T, H, V], final_state [N, H, K, V])"""
        y, final = self.new(*self.like.shape, dtype=self.like.dtype), self.state()
        self.forward(y, final, None)(y.device)
        return y, final

    def run_backward(
        self, dy: Tensor | None, dfinal_state: Tensor | None, needs: Mapping[str, bool]
    ) -> dict[str, Tensor | None]:
        """The gradients of the rows, "initial" and the parameters that are needed and that there are."""
        kept = self.kept()
        self.forward(None, None, kept)(kept.device)
        found = self.gradients(needs)
        self.backward(dy, dfinal_state, kept, found)(kept.device)
        return self.summed(found)

    def compiled(self, target: str, direction: str) -> list[Compiled]:
        """What one direction would launch; backward with every gradient, and with one of the final state where there
        is an initial state."""
        if direction == "forward":
            return compile_all([self.forward(self.like, self.state(), None)], target)
        every = dict.fromkeys((*self.rows, "initial", *self.parameters), True)
        backward = self.backward(self.like, self.initial, self.kept(), self.gradients(every))
        return compile_all([self.forward(None, None, self.kept()), backward], target)

    def gradients(self, needs: Mapping[str, bool]) -> dict[str, Tensor | None]:
        """Where the gradients go; sums over all values, in one part for each block of them."""
        found: dict[str, Tensor | None] = {}
        for name, tensor in self.rows.items():
            if tensor is None or not needs[name]:
                found[f"d{name}"] = None
            elif name == "v":
                found["dv"] = self.new(*tensor.shape, dtype=tensor.dtype)
            else:
                found[f"d{name}"] = self.new(
                    self.blocks, *tensor.shape, dtype=tensor.dtype if self.blocks == 1 else self.dtype
                )
        found["dinitial"] = self.state() if self.initial is not None and needs["initial"] else None
        for name, tensor in self.parameters.items():
            parts = self.blocks, self.sequences, self.heads, self.keys
            found[f"d{name}"] = self.new(*parts) if tensor is not None and needs[name] else None
        return found

    def summed(self, found: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        whole = {"v": found["dv"], "initial": found["dinitial"]}
        for name, tensor in self.rows.items():
            parts = found[f"d{name}"]
            if name == "v":
                continue
            if parts is None or tensor is None:
                whole[name] = None
            else:
                # one block's part has the row's own dtype
                whole[name] = parts[0] if len(parts) == 1 else parts.sum(0).to(tensor.dtype)
        for name in self.parameters:
            parts = found[f"d{name}"]
            whole[name] = None if parts is None else parts.sum((0, 1))
        return whole

    def forward(self, y: Tensor | None, final: Tensor | None, kept: Tensor | None) -> Launch:
        given = {**self.rows, **self.parameters, "initial": self.initial}
        return self._launch(self.kernels[0], {**given, "y": y, "final": final, "kept": kept})

    def backward(
        self, dy: Tensor | None, dfinal: Tensor | None, kept: Tensor, found: Mapping[str, Tensor | None]
    ) -> Launch:
        scratch = self.new(self.programs, self.config["rows"], self.BK, self.block)
        arguments = {**contiguous({"dy": dy, "dfinal": dfinal}), **self.rows, **self.parameters, "kept": kept}
        sizes = {"ROWS": self.batch * self.length} | ({"N": self.sequences} if self.parameters else {})
        return self._launch(self.kernels[1], {**arguments, "scratch": scratch, **found, **sizes})

    def _launch(self, kernel: Any, arguments: dict[str, Any]) -> Launch:
        log_decay = self.rows["log_decay"]
        arguments |= {
            # a number known to the compiler has all its digits, an argument those of float32
            "SCALE": self.scale,
            "H": self.heads,
            "V": self.values,
            "PER_KEY": log_decay is not None and log_decay.shape[3] > 1,
            "BV": self.block,
        }
        return self.launch(kernel, arguments)


def contiguous(tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: one_contiguous(tensor) for name, tensor in tensors.items()}


def shapes(problem: Problem, keyed: Sequence[str], narrow: Sequence[str] = ()) -> dict[str, Tensor | None]:
    """Tensors without memory as a problem has them: q, k, v, the other rows [B, T, H, K] in `keyed` and [B, T, H] in
    `narrow`, log_decay, initial_state and cu_seqlens."""
    B, T, H, K, V, N = (problem.sizes[letter] for letter in "BTHKVN")
    dtype, options = problem.dtypes["q"], problem.options

    def tensor(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    wide = state_dtype(dtype)
    return {
        **{name: tensor(B, T, H, K) for name in ("q", "k", *keyed)},
        "v": tensor(B, T, H, V),
        **{name: tensor(B, T, H, like=problem.dtypes[name]) for name in narrow},
        "log_decay": tensor(B, T, H, problem.sizes["J"], like=wide) if options["log_decay"] else None,
        "initial_state": tensor(N, H, K, V, like=wide) if options["initial_state"] else None,
        "cu_seqlens": tensor(N + 1, like=torch.int32) if options["packed"] else None,
    }
