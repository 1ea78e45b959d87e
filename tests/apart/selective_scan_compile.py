"""The selective scan's Triton kernels compiled for GPUs that are not there. See test_selective_scan_triton.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_cases import BFLOAT16, FLOAT32, FLOAT64, TARGETS, check_resources

from kernels.problem import Problem
from kernels.selective_scan import triton as backend


def posed(direction: str, dtype: torch.dtype = BFLOAT16, keys: int = 16, **facts: Any) -> Problem:
    options = {"D": True, "initial_state": True, "packed": False, **facts}
    sizes = {"B": 1 if options["packed"] else 2, "T": 2048, "D": 1024, "K": keys, "N": 2}
    return Problem("selective_scan", direction, torch.device("cuda"), {"x": dtype, "delta": dtype}, sizes, options)


def check(
    target: str, direction: str, config: int | None, dtype: torch.dtype = BFLOAT16, keys: int = 16, **facts: Any
) -> None:
    """No spills, a quarter of the warps resident, and states and parts of sums by 16 bytes. config: its place; None:
    every one.

    Rows go by 2 to 8 bytes: a program has few channels, and many threads for their states.
    """
    problem = posed(direction, dtype, keys, **facts)
    assert backend.cannot(problem) == []
    configs = backend.configs(problem)
    for each in configs if config is None else [configs[config]]:
        for found in backend.compile_for(target, problem, each):
            check_resources(found)
            # Backward, a thread of AMD's wide warps has but two numbers of a state
            wide = 8 if direction == "backward" and target.startswith("gfx") else 16
            if found.kernel == "add_pieces":
                assert keys < 16 or max(found.loads) == 16, found
            else:
                assert keys < 16 or min(max(found.loads), max(found.stores)) >= wide, found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_default_configs(direction: str, target: str) -> None:
    check(target, direction, 0)


def test_other_problems() -> None:
    check("sm_90", "backward", 0, keys=64, packed=True, D=False)
    check("sm_80", "backward", 0, FLOAT32)
    check("gfx942", "forward", 1, initial_state=False)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("keys", [1, 16, 64, 128])
@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_cross_product(direction: str, dtype: torch.dtype, keys: int, target: str) -> None:
    check(target, direction, None, dtype, keys)
