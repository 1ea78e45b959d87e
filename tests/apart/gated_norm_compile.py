"""The Triton gated norm compiled for GPUs that are not there. See test_gated_norm.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_cases import BFLOAT16, FLOAT32, FLOAT64, TARGETS, check_resources

from kernels.gated_norm import triton as backend
from kernels.problem import Problem

# of a head, and how many: a power of two and a multiple of 8
SIZES = ((64, 8), (512, 1), (1000, 1), (4096, 1))


def check(
    target: str, direction: str, dtype: torch.dtype, size: tuple[int, int], count: int | None, **facts: Any
) -> None:
    """No spills, a quarter of the warps resident, 16 bytes at a time, and asynchronous copies in the loop on NVIDIA.

    Forward there is no loop: a program has one tile. count: of configs, from the default on; None: all.
    """
    sizes = {"B": 4, "T": 2048, "H": size[1], "V": size[0], "N": 4}
    options = {"center": True, "activation": "silu", "gate_first": False, "eps": 1e-5, "packed": False}
    options |= dict.fromkeys(("gate", "weight", "bias"), True)
    wide = dtype if dtype == FLOAT64 else FLOAT32
    dtypes = {"x": dtype, "gate": dtype, "weight": wide, "bias": wide}
    problem = Problem("gated_norm", direction, torch.device("cuda"), dtypes, sizes, {**options, **facts})
    assert backend.cannot(problem) == []
    configs = [{**config, "CT": 32} if "CT" in config else config for config in backend.configs(problem)]
    # How many rows a program has is no other code
    for config in list({str(config): config for config in configs}.values())[:count]:
        first, *rest = backend.compile_for(target, problem, config)
        assert len(rest) == (direction == "backward")
        for found in (first, *rest):
            check_resources(found)
        # Forward x, gate and y, backward dy and one more gradient besides
        assert first.loads[16] >= (2 if direction == "forward" else 3), first
        assert first.stores[16] >= (1 if direction == "forward" else 2), first
        # narrower are at most weight and bias, which few threads share
        assert sum(count for width, count in first.loads.items() if width < 16) <= 2, first
        if direction == "backward" and target.startswith("sm_"):
            # dy, x and gate, of two tiles; all else is weights and biases
            assert first.asynchronous >= max(6, sum(first.loads.values()) - 4), first


REPRESENTATIVE = [
    ("sm_90", "backward", BFLOAT16, (512, 1)), ("gfx942", "backward", BFLOAT16, (64, 8)),
    ("sm_80", "forward", FLOAT32, (1000, 1)),
]  # fmt: skip


@pytest.mark.parametrize(("target", "direction", "dtype", "size"), REPRESENTATIVE, ids=str)
def test_default_configs(target: str, direction: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    check(target, direction, dtype, size, 1)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_config(direction: str, dtype: torch.dtype, size: tuple[int, int], target: str) -> None:
    check(target, direction, dtype, size, None)
    check(target, direction, dtype, size, 1, gate_first=True)
