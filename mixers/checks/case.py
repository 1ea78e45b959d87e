"""What a law is tried on: a mixer that can be made again and again, and one draw of sizes and numbers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mixers.mixer import SequenceMixer

Make = Callable[[int], SequenceMixer]
CPU = torch.device("cpu")


class LawBroken(AssertionError):
    """A mixer does not keep the contract."""


@dataclass(frozen=True)
class Case:
    """One draw: sizes (no powers of two needed), where to cut, how large the inputs are, the seed, the device."""

    batch: int = 2
    length: int = 37
    dim: int = 6
    cut: int = 19
    scale: float = 1.0
    seed: int = 0
    device: torch.device = CPU

    def mixer(self, make: Make, dtype: torch.dtype = torch.float64) -> SequenceMixer:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return make(self.dim).to(self.device, dtype).eval()

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64, salt: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 7919 * salt)
        return (self.scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(self.device, dtype)

    def x(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.normal(self.batch, self.length, self.dim, dtype=dtype)

    @staticmethod
    def draw(rng: random.Random, device: torch.device = CPU) -> Case:
        length = rng.choice((1, 2, 3, 5, 17, 33, 37, 65, 97))
        return Case(
            batch=rng.choice((1, 2, 3)),
            length=length,
            dim=rng.choice((6, 12)),
            cut=rng.randint(0, length),
            scale=rng.choice((0.3, 1.0, 3.0)),
            seed=rng.randrange(2**31),
            device=device,
        )
