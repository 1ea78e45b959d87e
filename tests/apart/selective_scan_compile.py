"""The selective scan's Triton kernels compiled for GPUs that are not there. See test_selective_scan_triton.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.problem import Problem
from kernels.selective_scan import triton as backend

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
FLOAT64, FLOAT32, BFLOAT16 = torch.float64, torch.float32, torch.bfloat16


def check(
    target: str, direction: str, config: int, dtype: torch.dtype = BFLOAT16, keys: int = 16, **facts: Any
) -> None:
    """No spills, and an eighth of the warps resident."""
    sizes = {"B": 2, "T": 2048, "D": 1024, "K": keys, "N": 2}
    options = {"D": True, "initial_state": True, "packed": False, **facts}
    if options["packed"]:
        sizes["B"] = 1
    problem = Problem("selective_scan", direction, torch.device("cuda"), {"x": dtype, "delta": dtype}, sizes, options)
    assert backend.cannot(problem) == []
    for found in backend.compile_for(target, problem, backend.configs(problem)[config]):
        assert found.spills == 0, found
        assert found.occupancy >= 0.125, found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_default_configs(direction: str, target: str) -> None:
    check(target, direction, 0)


def test_other_problems() -> None:
    check("sm_90", "backward", 1, packed=True)
    check("sm_80", "backward", 0, FLOAT32, keys=64, D=False)
    check("gfx942", "forward", 1, initial_state=False)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("keys", [1, 16, 64, 128])
@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("direction, configs", [("forward", 3), ("backward", 2)])
def test_the_cross_product(direction: str, configs: int, dtype: torch.dtype, keys: int, target: str) -> None:
    for config in range(configs):
        check(target, direction, config, dtype, keys)
