"""The Triton gated norm compiled for GPUs that are not there. See test_gated_norm.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.gated_norm import triton as backend
from kernels.problem import Problem

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
FLOAT64, FLOAT32, BFLOAT16 = torch.float64, torch.float32, torch.bfloat16
# of a head, and how many: a power of two and a multiple of 8
SIZES = ((64, 8), (512, 1), (1000, 1), (4096, 1))


def check(target: str, direction: str, dtype: torch.dtype, size: tuple[int, int], config: int, **facts: Any) -> None:
    """No spills, and 16 bytes at a time."""
    sizes = {"B": 4, "T": 2048, "H": size[1], "V": size[0], "N": 4}
    options = {"center": True, "activation": "silu", "gate_first": False, "eps": 1e-5, "packed": False}
    options |= dict.fromkeys(("gate", "weight", "bias"), True)
    wide = dtype if dtype == FLOAT64 else FLOAT32
    dtypes = {"x": dtype, "gate": dtype, "weight": wide, "bias": wide}
    problem = Problem("gated_norm", direction, torch.device("cuda"), dtypes, sizes, {**options, **facts})
    assert backend.cannot(problem) == []
    first, *rest = backend.compile_for(target, problem, backend.configs(problem)[config])
    assert len(rest) == (direction == "backward")
    for found in (first, *rest):
        assert found.spills == 0, found
        assert found.occupancy >= 0.25, found
    assert first.stores[16] >= 1, first
    # narrower are parameters only
    assert min(first.loads) >= 8, first


REPRESENTATIVE = [
    ("sm_90", "backward", BFLOAT16, (512, 1)), ("gfx942", "backward", BFLOAT16, (64, 8)),
    ("sm_80", "forward", FLOAT32, (1000, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("target", "direction", "dtype", "size"), REPRESENTATIVE, ids=str)
def test_default_configs(target: str, direction: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    check(target, direction, dtype, size, 0)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_config(direction: str, dtype: torch.dtype, size: tuple[int, int], target: str) -> None:
    for config in range(3 if direction == "forward" else 4):
        for gate_first in (False, True) if config == 0 else (False,):
            check(target, direction, dtype, size, config, gate_first=gate_first)
