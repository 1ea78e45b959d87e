"""HGRN's recurrence in Triton, compiled for GPUs that are not there. See test_hgru_triton.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_cases import BFLOAT16, FLOAT32, FLOAT64, TARGETS, check_resources, distinct

from kernels.hgru import triton as backend
from kernels.problem import Problem

EVERYTHING = {"pairs": True, "theta": True, "packed": True, "initial_state": True}


def problem(direction: str, dtype: torch.dtype, **facts: Any) -> Problem:
    # A multiple of 8 and of nothing larger
    sizes = {"B": 1 if facts.get("packed") else 16, "T": 2048, "D": 1000, "N": 16}
    plain = {"activation": "silu", "reverse": False, "lower_bound": True, "theta": False, "pairs": False}
    options = {**plain, "initial_state": False, "packed": False, **facts}
    return Problem("hgru", direction, torch.device("cuda"), {"i": dtype, "f": dtype}, sizes, options)


def check(target: str, posed: Problem, config: dict[str, int]) -> None:
    """No spills, a quarter of the warps resident, 16 bytes at a time, and asynchronous copies on NVIDIA."""
    assert backend.cannot(posed) == []
    found = backend.compile_for(target, posed, config)
    assert len(found) == (3 if "split" in config else 1) + (posed.direction == "backward")
    for kernel in found:
        check_resources(kernel)
        if kernel.kernel == "add_pieces":
            continue
        # Of pairs, f is half as wide as i and h
        wide = kernel.loads[16] + (kernel.loads.get(8, 0) if posed.options["pairs"] else 0)
        # Before the loop: γ and θ, the state that the walk begins with, the one before a chunk, and before all rows
        once = 5
        assert kernel.kernel == "hgru_chunks" or kernel.stores[16] >= 1, kernel
        assert kernel.loads[16] >= 2, kernel
        if target.startswith("sm_"):
            assert wide - once <= kernel.asynchronous, kernel
            assert kernel.asynchronous >= 4, kernel


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_default_config(direction: str, target: str) -> None:
    posed = problem(direction, BFLOAT16)
    configs = backend.configs(posed)
    assert [config.get("split", 0) for config in configs] == [0, 0, 0, 64, 256]
    check(target, posed, configs[0])


@pytest.mark.parametrize("direction, target", [("forward", "sm_100"), ("backward", "sm_80"), ("backward", "gfx942")])
def test_pairs(direction: str, target: str) -> None:
    posed = problem(direction, FLOAT32, **EVERYTHING)
    check(target, posed, backend.configs(posed)[0])


@pytest.mark.parametrize("direction, target", [("forward", "gfx942"), ("backward", "sm_90")])
def test_time_split_over_programs(direction: str, target: str) -> None:
    posed = problem(direction, FLOAT32)
    check(target, posed, backend.configs(posed)[3])


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32, FLOAT64], ids=str)
def test_the_cross_product(dtype: torch.dtype, target: str) -> None:
    problems = [problem(way, dtype, **facts) for way in ("forward", "backward") for facts in ({}, EVERYTHING)]
    problems += [problem("backward", dtype, activation=name) for name in ("identity", "tanh", "sigmoid", "positive")]
    for posed in problems:
        for config in distinct(backend.configs(posed)):
            check(target, posed, config)
