"""How the delta rule in chunks is launched on GPUs: one walk forward; backward two walks and all chunks at once.

The least that the chunks need to move: forward, every input and output once. Backward, every input and gradient once,
and for each chunk the state that enters it and the gradient of the one that leaves it, written once and read once; see
docs/derivations/delta_rule.md.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from kernels.delta_rule.triton_chunk_decays import (
    delta_chunk_gradients_by_key,
    delta_chunks_back_by_key,
    delta_chunks_by_key,
    delta_pairs_by_key,
)
from kernels.delta_rule.triton_chunk_kernels import (
    delta_chunk_gradients,
    delta_chunks,
    delta_chunks_back,
    delta_pairs,
)
from kernels.problem import Problem
from kernels.triton_aot import Compiled
from kernels.triton_launch import Launch, compile_all

# Rows of a chunk: the least that a product of tiles has, for a factor is in registers whole
C = 16
# Sizes that the products of rows do not know
WALKED = "V", "SCALE", "BLOCKS", "BV", "BATCHED"
# Values whose sums Triton keeps in B200's tensor memory, where a plain product has 64 rows or more: it has room for all
# tiles of these. Of more, they are sums of a batch, which stay in registers
HALF = 64
# Steps of a sequence from which chunks come first
LONG = 4 * C
# Numbers of a row in all heads: within a chunk, numbers are counted in 32 bits
MOST = 2**31 // C


class Kernels(NamedTuple):
    """The products of rows, the walks along and against time, and the gradients."""

    pairs: Any
    walk: Any
    back: Any
    gradients: Any


# Of one decay that all keys share, or none, and of one for each key
SHARED = Kernels(delta_pairs, delta_chunks, delta_chunks_back, delta_chunk_gradients)
BY_KEY = Kernels(delta_pairs_by_key, delta_chunks_by_key, delta_chunks_back_by_key, delta_chunk_gradients_by_key)


def cannot(problem: Problem) -> list[str]:
    """Why chunks cannot run the problem; empty if they can.

    The loop over rows then has it to itself, which moves several times as much: see the derivation.
    """
    K, V = problem.sizes["K"], problem.sizes["V"]
    # float32 takes two parts in registers, and so do its decays
    narrow = problem.dtypes["q"].itemsize == 2
    reasons = misfits(problem, (128 if narrow else 64) if by_key(problem) else (256 if narrow else 128))
    if scaled(problem) and K > 64 and (K % 32 or V % HALF):
        # masks and places that are not aligned spill 8 to 16 bytes on A100, H100 and B200
        whole = f"chunks of more than 64 keys in float32, or with a decay each, are for multiples of 32 and {HALF}"
        reasons.append(f"axes K, V are {K}, {V}; {whole}")
    if 128 < K <= 256 and (K % 64 or V % HALF):
        # two groups of tiles of 32, without masks
        reasons.append(f"axes K, V are {K}, {V}; chunks of more than 128 keys are for multiples of 64 and {HALF}")
    return reasons


def misfits(problem: Problem, most: int) -> list[str]:
    """What about the problem does not fit chunks that have registers for so many keys."""
    sizes, dtype, reasons = problem.sizes, problem.dtypes["q"], []
    if dtype == torch.float64:
        return ["products of tiles are of float32"]
    # at most twice as many rows as keys, else what cancels loses digits
    if not C // 2 <= sizes["K"] <= most:
        reasons.append(f"axis K is {sizes['K']}; chunks are for {C // 2} to {most} in {dtype}")
    if sizes["K"] > 32 and sizes["V"] % 2:
        # the place of every single value would take registers that many keys need
        reasons.append(f"axis V is {sizes['V']}; chunks of more than 32 keys are for even numbers")
    if sizes["H"] * max(sizes["K"], sizes["V"]) >= MOST:
        reasons.append(f"axes H, K, V are {sizes['H']}, {sizes['K']}, {sizes['V']}; H times K or V is less than {MOST}")
    return reasons


def configs(problem: Problem) -> list[dict[str, int]]:
    """Candidates for the tuner, the default first; none where chunks cannot run.

    chunk: its rows. values: of the state, to a program of a walk, which has a warp for each 16 of them; its keys are
    in tiles of `keys`. Of up to 64 keys forward 64 values where there are no more; fewer would need more registers for
    the keys, and so would 64 in the walk against time. Of more keys in two parts, what fills all programs. More than
    128 keys are halved: two warps for each 16 values.
    """
    if cannot(problem):
        return []
    K, V = problem.sizes["K"], problem.sizes["V"]
    if K > 128:
        chosen = [64]
    elif scaled(problem) and K > 64:
        chosen = [64] if V % 128 else [128]
    elif by_key(problem) or (scaled(problem) and K > 32):
        chosen = [64]
    elif K > 64:
        chosen = [128, 64]
    elif problem.direction == "backward":
        chosen = [128]
    else:
        chosen = [64] if V <= 64 else [128, 64]
    keys = 16 if K > 64 and problem.dtypes["q"].itemsize == 4 else tile(K, scaled(problem))
    return [{"chunk": C, "values": values, "keys": keys} for values in chosen]


def by_key(problem: Problem) -> bool:
    """Whether each key has a decay of its own."""
    return bool(problem.options["log_decay"]) and problem.sizes["J"] > 1


def scaled(problem: Problem) -> bool:
    """Whether rows of keys have all of float32's digits, which are two numbers of TF32."""
    return by_key(problem) or problem.dtypes["q"].itemsize == 4


def tile(keys: int, scaled: bool = False) -> int:
    """Keys of a tile of the state; a factor of a product is in registers whole, a `scaled` one in two parts."""
    return min(32 if scaled or keys > 64 else 64, max(16, triton.next_power_of_2(keys)))


def comes_first(problem: Problem) -> bool:
    """The rule where nothing is tuned: chunks for sequences of LONG rows on average, else the loop over rows."""
    sizes = problem.sizes
    return sizes["B"] * sizes["T"] >= LONG * sizes["N"]


@functools.cache
def target_of(device: torch.device) -> str:
    """As offline compilation names them: "sm_90"; of AMD's GPUs "gfx"."""
    if torch.version.hip is not None:
        return "gfx"
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "sm_90"


class Chunks:
    """The inputs of the delta rule, and what is launched on them.

    rows: q, k [B, T, H, K], v [B, T, H, V], beta [B, T, H], log_decay [B, T, H, 1 or K] or None.
    target: of what is launched: on NVIDIA's GPUs a float32 product is made of three of tf32.
    """

    def __init__(
        self,
        rows: Mapping[str, Tensor | None],
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: float,
        config: Mapping[str, int],
        target: str,
    ) -> None:
        self.rows = {name: None if x is None else x.contiguous() for name, x in rows.items()}
        q, v = self.rows["q"], self.rows["v"]
        assert q is not None
        assert v is not None
        self.q, self.v, self.config = q, v, config
        self.initial = None if initial_state is None else initial_state.contiguous()
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.batch, self.length, self.heads, self.keys = q.shape
        self.values = v.shape[3]
        self.sequences = self.batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
        log_decay = rows["log_decay"]
        self.by_key = log_decay is not None and log_decay.shape[3] > 1
        self.kernels = BY_KEY if self.by_key else SHARED
        self.BK, self.BV = config["keys"], config["values"]
        # of more than 128 keys, half of them belong to other warps; 0 where they are not in groups
        self.ahead = self.keys // 2 if self.keys > 128 else 0
        self.blocks = -(-(self.ahead or self.keys) // self.BK)
        # B200 has no room for 128 values and the places of rows that are not aligned, or masks of keys
        self.tiles_on_b200 = target == "sm_100" and self.blocks > 1
        # of more than 64 keys in float32, or with a decay each, its states are in registers, of 64 values too
        self.many_scaled = self.tiles_on_b200 and (self.by_key or q.element_size() == 4) and self.keys > 64
        if self.tiles_on_b200 and not self.many_scaled and (self.values % 16 or self.keys % self.BK):
            self.BV = min(self.BV, HALF)
        # a program that fills the tensor memory is alone on its multiprocessor
        self.warps = 8 if self.tiles_on_b200 or self.ahead else self.BV // 16
        precise = "tf32x3" if target.startswith("sm_") else "ieee"
        self.sizes = {
            "cu_seqlens": self.cu_seqlens,
            "T": self.length,
            "H": self.heads,
            "K": self.keys,
            "V": self.values,
            # a number known to the compiler has all its digits, an argument those of float32
            "SCALE": scale,
            "C": config["chunk"],
            "BK": self.BK,
            "BLOCKS": self.blocks,
            "BV": self.BV,
            "PRECISE": precise,
            "BATCHED": bool(self.ahead) or (self.tiles_on_b200 and (self.BV > HALF or self.many_scaled)),
        }
        if not self.by_key:
            # numbers of 16 bits are numbers of tf32
            self.sizes["NARROW"] = q.element_size() == 2

    def run_forward(self) -> tuple[Tensor, Tensor]:
        """(y [B, T, H, V], final_state [N, H, K, V])"""
        y, final = torch.empty_like(self.v), self._states(self.sequences)
        self._run(self.forward(y, final))
        return y, final

    def run_backward(
        self, dy: Tensor | None, dfinal: Tensor | None, needs: Mapping[str, bool]
    ) -> dict[str, Tensor | None]:
        """The gradients of the rows and "initial" that are needed and that there are."""
        found = {
            name: torch.empty_like(x) if x is not None and needs[name] else None
            for name, x in {**self.rows, "initial": self.initial}.items()
        }
        dy = torch.zeros_like(self.v) if dy is None else dy.contiguous()
        self._run(self.backward(dy, None if dfinal is None else dfinal.contiguous(), found))
        return found

    def compiled(self, target: str, direction: str) -> list[Compiled]:
        """What one direction would launch; backward with every gradient, and with one of the final state where there
        is an initial state."""
        if direction == "forward":
            return compile_all(self.forward(self.v, self._states(self.sequences)), target)
        return compile_all(self.backward(self.v, self.initial, {**self.rows, "initial": self.initial}), target)

    def forward(self, y: Tensor, final: Tensor) -> list[Launch]:
        inverses = self._pairs()
        # made by the walk itself where that moves less and has room for it
        crowded = self.by_key or (self.q.element_size() == 4 and self.blocks > 1)
        reads = self._pairs() if self.tiles_on_b200 or crowded or self.ahead else None
        return [self._products(inverses, reads, None), self._walk(inverses, reads=reads, y=y, final=final)]

    def backward(self, dy: Tensor, dfinal: Tensor | None, found: Mapping[str, Tensor | None]) -> list[Launch]:
        inverses, reads, entering, leaving = self._pairs(), self._pairs(), *(self._states(self.chunks) for _ in "SS")
        overlaps = self._pairs()
        errors, dvalues = (torch.empty_like(self.v, dtype=torch.float32) for _ in range(2))
        given = {**self._given("q", "k", "beta", "log_decay"), **self.sizes}
        given |= {"dy": dy, "reads": reads, "leaving": leaving, "dvalues": dvalues}
        back: dict[str, Any] = {**given, "dfinal": dfinal, "inverses": inverses, "dinitial": found["initial"]}
        if self.many_scaled:
            # B200's tensor memory has room for what queries add to so many, whose keys come in smaller tiles
            back |= {"BV": HALF, "BK": 16, "BLOCKS": -(-self.keys // 16)}
        own = {"overlaps": overlaps, "entering": entering, "errors": errors, "N": self.sequences}
        own |= {f"d{name}": found[name] for name in self.rows}
        back |= self._groups()
        # all keys and values of a chunk, so many at a time; its products have as many rows as there are keys
        keys = max(16, triton.next_power_of_2(self.keys))
        own = {**given, **own, "BK": keys, "BV": 16}
        for name in ("BLOCKS", "NARROW", "BATCHED"):
            own.pop(name, None)
        return [
            self._products(inverses, reads, overlaps),
            self._walk(inverses, entering=entering, errors=errors),
            self._launch(self.kernels.back, self.walks(back["BV"]), back, self.warps),
            self._launch(self.kernels.gradients, self.chunks * self.heads, own, keys // 16),
        ]

    def walks(self, values: int) -> int:
        """Programs of a walk, of so many values each."""
        return self.sequences * self.heads * -(-self.values // values)

    @property
    def chunks(self) -> int:
        """Of all sequences; where their lengths are unknown, no fewer."""
        if self.cu_seqlens is None:
            return self.batch * -(-self.length // self.config["chunk"])
        return self.length // self.config["chunk"] + self.sequences

    def _states(self, count: int) -> Tensor:
        return self.q.new_empty(count, self.heads, self.keys, self.values, dtype=torch.float32)

    def _pairs(self) -> Tensor:
        """Of the rows of every chunk."""
        C = self.config["chunk"]
        return self.q.new_empty(self.chunks, self.heads, C, C, dtype=torch.float32)

    def _groups(self) -> dict[str, Any]:
        return {} if self.by_key else {"AHEAD": self.ahead}

    def _given(self, *names: str) -> dict[str, Tensor | None]:
        return {name: self.rows[name] for name in names}

    def _products(self, inverses: Tensor, reads: Tensor | None, overlaps: Tensor | None) -> Launch:
        given = {**self._given("q", "k", "beta", "log_decay"), "N": self.sequences}
        given |= {"inverses": inverses, "reads": reads, "overlaps": overlaps}
        sizes = {name: size for name, size in self.sizes.items() if name not in WALKED}
        return self._launch(
            self.kernels.pairs, self.chunks * self.heads, {**given, **sizes}, self.config["chunk"] // 16
        )

    def _walk(self, inverses: Tensor, **written: Tensor | None) -> Launch:
        given = {**self.rows, "initial": self.initial, "inverses": inverses}
        given |= dict.fromkeys(("reads", "y", "final", "entering", "errors")) | written | self._groups()
        return self._launch(self.kernels.walk, self.walks(self.BV), {**given, **self.sizes}, self.warps)

    def _launch(self, kernel: Any, programs: int, arguments: dict[str, Any], warps: int) -> Launch:
        # without a bound NVIDIA's assembler spills some registers so that more threads are resident
        steps = self.chunks // self.sequences if kernel in (self.kernels.walk, self.kernels.back) else 1
        return Launch(kernel, programs, arguments, min(warps, 8), num_stages=1, registers=255, steps=steps)

    def _run(self, launches: list[Launch]) -> None:
        for launch in launches:
            launch(self.v.device)
