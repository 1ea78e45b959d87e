"""How the Triton kernels of gated linear attention in chunks are launched: two launches forward, three backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.cards import LONG
from kernels.gla.triton_chunk_kernels import gla_gradients, gla_outputs, gla_states
from kernels.problem import Problem
from kernels.triton_aot import Compiled
from kernels.triton_launch import Launch, compile_all
from kernels.triton_matrix_launch import contiguous

MOST_KEYS = 256
# By chunk: the keys and values that a program has at a time, at most, which registers have room for
BLOCKS = {
    16: {gla_states: (32, 64), gla_outputs: (16, 64), gla_gradients: (32, 32)},
    32: {gla_states: (32, 64), gla_outputs: (16, 64), gla_gradients: (16, 32)},
}
# The same of programs that are `wide`, with 256 threads: fewer of them read the same rows
WIDE = {gla_states: (32, 128), gla_outputs: (16, 128), gla_gradients: (64, 32)}
# A thread's: without a bound NVIDIA's assembler spills some so that more threads are resident
REGISTERS = 255


def cannot(problem: Problem) -> list[str]:
    """What only the loop over time does: float64, which tl.dot has no fast form of, very many keys or heads."""
    reasons = []
    if problem.dtypes["q"] == torch.float64:
        reasons.append("float64")
    if problem.sizes["K"] > MOST_KEYS:
        reasons.append(f"axis K is {problem.sizes['K']}; at most {MOST_KEYS}")
    # within a chunk, numbers are counted in 32 bits
    if problem.sizes["H"] * max(problem.sizes["K"], problem.sizes["V"]) * max(BLOCKS) >= 2**31:
        reasons.append(f"axis H is {problem.sizes['H']}; its rows do not fit 2^31 numbers to a chunk")
    return reasons


def configs(problem: Problem) -> Sequence[dict[str, int]]:
    """Candidates for the tuner, the default first; none where only the loop over time can run.

    chunk: rows of a chunk. num_warps: of a program; on NVIDIA GPUs those that are `wide` have twice as many.
    """
    if cannot(problem):
        return []
    found = [{"chunk": 32, "num_warps": 4}, {"chunk": 16, "num_warps": 2}]
    # With few keys the gradients of longer chunks spill beside a bonus
    spills = problem.direction == "backward" and problem.options["bonus"] and problem.sizes["K"] <= 32
    return found[1:] if spills else found


def first(problem: Problem) -> bool:
    """The rule: chunks before the loop over time where sequences are LONG."""
    sizes = problem.sizes
    return sizes["B"] * sizes["T"] >= LONG * sizes["N"]


class Chunks:
    """The inputs of gla in chunks of config["chunk"] rows, and its launches.

    nvidia: what the kernels are compiled for; there a product of float32 matrices is three of TF32.
    """

    def __init__(
        self,
        rows: Mapping[str, Tensor | None],
        initial_state: Tensor | None,
        bonus: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        config: Mapping[str, int],
        nvidia: bool | None = None,
    ) -> None:
        self.rows, self.scale, self.config = contiguous(rows), scale, config
        given = {"initial": initial_state, "bonus": bonus, "cu_seqlens": cu_seqlens}
        self.initial, self.bonus, self.cu_seqlens = contiguous(given).values()
        q, v = self.rows["q"], self.rows["v"]
        assert q is not None
        assert v is not None
        self.like, self.values = v, v.shape[3]
        self.batch, self.length, self.heads, self.keys = q.shape
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        chunk = config["chunk"]
        # where lengths are unknown no fewer than there are
        self.chunks = self.length // chunk + self.sequences
        if cu_seqlens is None:
            self.chunks = self.batch * -(-self.length // chunk)
        nvidia = torch.version.hip is None if nvidia is None else nvidia
        self.whole, self.narrow = ("tf32x3", "tf32") if nvidia else ("ieee", "ieee")
        if q.dtype == torch.float32:
            self.narrow = self.whole
        log_decay = self.rows["log_decay"]
        self.decays = 0 if log_decay is None else 1 if log_decay.shape[3] == 1 else 2
        self.nvidia = nvidia

    def run_forward(self) -> tuple[Tensor, Tensor]:
        """(y [B, T, H, V], final_state [N, H, K, V])"""
        y, final = torch.empty_like(self.like), self.state()
        for launch in self.forward(y, final):
            launch(y.device)
        return y, final

    def run_backward(
        self, dy: Tensor | None, dfinal_state: Tensor | None, needs: Mapping[str, bool]
    ) -> dict[str, Tensor | None]:
        """The gradients of the rows, "initial" and "bonus" that are needed and that there are."""
        found = self.gradients(needs)
        for launch in self.backward(dy, dfinal_state, found):
            launch(self.like.device)
        for name in ("bonus", "log_decay"):
            parts = found[name]
            if parts is not None and (name == "bonus" or self.decays == 1):
                found[name] = parts.sum(0)
        return found

    def compiled(self, target: str, direction: str) -> list[Compiled]:
        """What one direction would launch; backward with every gradient."""
        if direction == "forward":
            return compile_all(self.forward(self.like, self.state()), target)
        found = self.gradients(dict.fromkeys((*self.rows, "initial", "bonus"), True))
        return compile_all(self.backward(self.like, self.initial, found), target)

    def state(self) -> Tensor:
        return self.new(self.sequences, self.heads, self.keys, self.values)

    def new(self, *shape: int) -> Tensor:
        return self.like.new_empty(shape, dtype=torch.float32)

    def gradients(self, needs: Mapping[str, bool]) -> dict[str, Tensor | None]:
        """Where the gradients go: that of bonus in one part for each chunk, that of decays which all keys share in one
        for each block of keys."""
        found = {name: None if x is None or not needs[name] else torch.empty_like(x) for name, x in self.rows.items()}
        found["initial"] = self.state() if self.initial is not None and needs["initial"] else None
        parts = self.chunks, self.heads, self.keys
        found["bonus"] = self.new(*parts) if self.bonus is not None and needs["bonus"] else None
        dlog_decay = found["log_decay"]
        if dlog_decay is not None and self.decays == 1:
            found["log_decay"] = self.new(self.key_blocks, *dlog_decay.shape)
        return found

    def forward(self, y: Tensor, final: Tensor) -> list[Launch]:
        kept = self.kept()
        rows = {name: self.rows[name] for name in ("q", "k", "v")}
        return [self.walk(kept, final=final), self.outputs({**rows, "kept": kept, "y": y}, against=False)]

    def backward(self, dy: Tensor | None, dfinal: Tensor | None, found: Mapping[str, Tensor | None]) -> list[Launch]:
        dy, dfinal = contiguous({"dy": dy, "dfinal": dfinal}).values()
        rows = any(found[name] is not None for name in ("q", "k", "log_decay", "bonus"))
        kept, dkept = self.kept() if rows else None, self.kept()
        q, k = self.rows["q"], self.rows["k"]
        launches = [self.walk(kept, dkept, dy=dy, dfinal=dfinal, dinitial=found["initial"])]
        if found["v"] is not None:
            launches += [self.outputs({"q": k, "k": q, "v": dy, "kept": dkept, "y": found["v"]}, against=True)]
        if rows:
            given: dict[str, Any] = {"dy": dy, **self.rows, "bonus": self.bonus, "kept": kept, "dkept": dkept}
            given |= {f"d{name}": found[name] for name in ("q", "k", "log_decay", "bonus")}
            given |= {"WHOLE": self.whole, "EXACT": self.narrow, "ROWS": self.batch * self.length}
            programs = self.chunks * self.heads * self.key_blocks
            launches += [self._launch(gla_gradients, programs, given | self.blocks(gla_gradients))]
        return launches

    def kept(self) -> Tensor:
        """A state for each chunk."""
        return self.new(self.chunks, self.heads, self.keys, self.values)

    def walk(
        self, kept: Tensor | None, dkept: Tensor | None = None, *, dy: Tensor | None = None,
        final: Tensor | None = None, dfinal: Tensor | None = None, dinitial: Tensor | None = None,
    ) -> Launch:  # fmt: skip
        """Over the chunks of every sequence: along time where there is `kept`, against it where there is `dkept`."""
        directions = sum(x is not None for x in (kept, dkept))
        arguments: dict[str, Any] = {name: self.rows[name] for name in ("q", "k", "v", "log_decay")}
        arguments |= {"dy": dy, "initial": self.initial, "dfinal": dfinal, "kept": kept, "dkept": dkept}
        arguments |= {"final": final, "dinitial": dinitial, **self.blocks(gla_states, directions)}
        arguments |= {"EXCLUSIVE": self.bonus is not None, "SCALE": self.scale, "WHOLE": self.whole, "STAGES": 2}
        blocks = -(-self.keys // arguments["BK"]) * -(-self.values // arguments["BV"])
        programs = self.sequences * self.heads * blocks * directions
        return self._launch(gla_states, programs, arguments, self.chunks // self.sequences)

    def outputs(self, tensors: Mapping[str, Tensor | None], *, against: bool) -> Launch:
        arguments: dict[str, Any] = {
            **tensors,
            "log_decay": self.rows["log_decay"],
            "bonus": self.bonus,
            **self.blocks(gla_outputs),
        }
        arguments |= {"AGAINST": against, "WHOLE": self.whole, "OUTPUT": self.narrow}
        programs = self.chunks * self.heads * -(-self.values // arguments["BV"])
        return self._launch(gla_outputs, programs, arguments)

    def wide(self, kernel: Any) -> bool:
        """Do programs share out more keys and values than BLOCKS has? Walks do where a head still has two programs."""
        enough = self.values > 64
        if kernel is gla_states:
            enough = enough and self.keys > 32
        elif kernel is gla_gradients:
            enough = self.keys > 32
        return enough and self.config["chunk"] == 32

    def blocks(self, kernel: Any, directions: int = 1) -> dict[str, int]:
        """Keys and values that a program has at a time, at least the 16 that tl.dot takes. directions: of a walk."""
        most, K, V = BLOCKS[self.config["chunk"]][kernel], self.keys, self.values
        # rows of an odd number of values take more registers to address
        aligned = V % 16 == 0
        # 256 values in float32 spill 340 to 390 bytes on A100 and H100 where keys share their decays or have none
        roomy = not self.nvidia or self.decays == 2 or self.like.element_size() == 2
        if self.wide(kernel):
            most = WIDE[kernel]
            if kernel is gla_states and aligned and not self.nvidia and min(K, V) > 128:
                # threads of AMD GPUs have twice the registers, and a head still has four programs
                most = (128, 128)
            elif kernel is gla_states and aligned and directions * -(-K // 64) * -(-V // 128) >= 4:
                most = (64, 128)
            elif kernel is gla_states and self.decays < 2:
                # beside one decay for all keys or none there are only k and v to read
                most = (64, 64)
            elif kernel is gla_outputs and V > 128 and (aligned or self.bonus is None) and roomy:
                most = (16, 256)
            elif kernel is gla_gradients and self.decays == 2 and self.bonus is not None and not self.nvidia:
                most = (32, 32)
        if kernel is gla_gradients and self.decays == 1:
            # registers have room for no more beside the products of q and k
            most = (most[0], 16)
        BK, BV = (min(max(triton.next_power_of_2(width), 16), limit) for width, limit in zip((K, V), most))
        return {"BK": BK, "BV": BV}

    @property
    def key_blocks(self) -> int:
        return -(-self.keys // self.blocks(gla_gradients)["BK"])

    def _launch(self, kernel: Any, programs: int, arguments: dict[str, Any], steps: int = 1) -> Launch:
        given: dict[str, Any] = {
            "cu_seqlens": self.cu_seqlens,
            "T": self.length,
            "H": self.heads,
            "K": self.keys,
            "V": self.values,
            "DECAYS": self.decays,
            "C": self.config["chunk"],
        }
        if kernel is not gla_states:
            given |= {"N": self.sequences, "SCALE": self.scale}
        return Launch(
            kernel,
            programs,
            given | arguments,
            self.config["num_warps"] * (2 if self.nvidia and self.wide(kernel) else 1),
            num_stages=1,
            registers=REGISTERS,
            steps=steps,
        )
