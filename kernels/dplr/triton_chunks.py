"""How diagonal plus rank one in chunks is launched on GPUs: as the delta rule is (kernels/delta_rule/triton_chunks.py).

The least that the chunks need to move: forward, every input and output once. Backward, every input and gradient once,
and for each chunk the state that enters it and the gradient of the one that leaves it, written once and read once; see
docs/derivations/delta_rule.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

from kernels.delta_rule import triton_chunks as delta
from kernels.delta_rule.triton_chunks import C, Kernels, comes_first, misfits, target_of, tile
from kernels.dplr.triton_chunk_kernels import dplr_chunk_gradients, dplr_chunks, dplr_chunks_back, dplr_pairs
from kernels.problem import Problem
from kernels.triton_launch import Launch

__all__ = ["Chunks", "cannot", "comes_first", "configs", "target_of"]

# Values of the state to a program of a walk
VALUES = 64
PAIRS = "inverses", "ak", "qk", "qb"


def cannot(problem: Problem) -> list[str]:
    """Why chunks cannot run the problem, which the loop over rows then has to itself; empty if they can."""
    # 64 of float32 spill on A100
    return misfits(problem, 32 if problem.dtypes["q"].itemsize == 4 else 64)


def configs(problem: Problem) -> list[dict[str, int]]:
    """Candidates for the tuner; none where chunks cannot run. See the delta rule's."""
    if cannot(problem):
        return []
    values = min(VALUES, max(16, triton.next_power_of_2(problem.sizes["V"])))
    return [{"chunk": C, "values": values, "keys": tile(problem.sizes["K"], scaled=True)}]


class Chunks(delta.Chunks):
    """The inputs of diagonal plus rank one, and what is launched on them.

    rows: q, k, a, b [B, T, H, K], v [B, T, H, V], log_decay [B, T, H, 1 or K] or None.
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
        super().__init__(rows, initial_state, cu_seqlens, scale, config, target)
        self.kernels = Kernels(dplr_pairs, dplr_chunks, dplr_chunks_back, dplr_chunk_gradients)
        self.sizes.pop("NARROW", None)
        self.sizes |= {"PER_KEY": self.by_key, "BATCHED": False}
        self.target = target
        # 8 spill on H100, 4 on A100
        self.warps = 8 if target.startswith("sm_") and target != "sm_90" else 4

    def forward(self, y: Tensor, final: Tensor) -> list[Launch]:
        pairs = {name: self._pairs() for name in PAIRS}
        # B200's tensor memory has no room for the sums of the outputs beside those of the state
        batched = self.target == "sm_100"
        return [self._between(pairs), self._along(pairs, batched, y=y, final=final)]

    def backward(self, dy: Tensor, dfinal: Tensor | None, found: Mapping[str, Tensor | None]) -> list[Launch]:
        pairs, entering, leaving = {name: self._pairs() for name in PAIRS}, *(self._states(self.chunks) for _ in "SS")
        reads, dreads = (torch.empty_like(self.v, dtype=torch.float32) for _ in range(2))
        given = {**self.sizes, "dy": dy, "leaving": leaving, "dreads": dreads}
        back = {**self._given("q", "k", "a", "b", "log_decay"), "dfinal": dfinal, "dv": found["v"]}
        back |= {**pairs, "dinitial": found["initial"]}
        own: dict[str, Any] = {**given, **self.rows, "entering": entering, "reads": reads, "N": self.sequences}
        own |= {f"d{name}": found[name] for name in self.rows if name != "v"}
        # all keys and values of a chunk, so many at a time; its products have as many rows as there are keys
        keys = max(16, triton.next_power_of_2(self.keys))
        own |= {"BK": keys, "BV": 16}
        for name in ("BLOCKS", "BATCHED"):
            del own[name]
        return [
            self._between(pairs),
            self._along(pairs, entering=entering, reads=reads),
            self._launch(self.kernels.back, self.walks(self.BV), {**given, **back}, self.warps),
            self._launch(self.kernels.gradients, self.chunks * self.heads, own, keys // 4),
        ]

    def _between(self, pairs: Mapping[str, Tensor]) -> Launch:
        given = {**self._given("q", "k", "a", "b", "log_decay"), "N": self.sequences, **pairs}
        sizes = {name: size for name, size in self.sizes.items() if name not in delta.WALKED}
        return self._launch(self.kernels.pairs, self.chunks * self.heads, {**given, **sizes, "BK": 16}, C // 16)

    def _along(self, pairs: Mapping[str, Tensor], batched: bool = False, **written: Tensor) -> Launch:
        given = {**self.rows, "initial": self.initial, **pairs}
        given |= dict.fromkeys(("y", "final", "entering", "reads")) | written
        sizes = {**self.sizes, "BATCHED": batched}
        return self._launch(self.kernels.walk, self.walks(self.BV), {**given, **sizes}, self.warps)
