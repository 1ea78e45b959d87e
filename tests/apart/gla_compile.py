"""The Triton gated linear attention compiled for GPUs that are not there. See test_gla_triton.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from kernels.gla import triton as backend
from kernels.problem import Problem

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
FLOAT64, FLOAT32, BFLOAT16 = torch.float64, torch.float32, torch.bfloat16


def check(
    target: str, direction: str, config: int, dtype: torch.dtype = BFLOAT16, keys: int = 64, *, chunks: bool = False,
    values: int = 64, **facts: Any,
) -> None:  # fmt: skip
    """No spills, and an eighth of the warps resident. config: among those in chunks or among the loops over time."""
    sizes = {"B": 2, "T": 2048, "H": 8, "K": keys, "V": values, "J": keys if facts.pop("per_key", True) else 1, "N": 2}
    plain = {"scale": 0.125, "log_decay": True, "initial_state": True, "bonus": False, "packed": False}
    options = {**plain, **facts}
    if options["packed"]:
        sizes["B"] = 1
    problem = Problem("gla", direction, torch.device("cuda"), dict.fromkeys("qkv", dtype), sizes, options)
    assert backend.cannot(problem) == []
    chosen = [one for one in backend.configs(problem) if ("chunk" in one) == chunks][config]
    for found in backend.compile_for(target, problem, chosen):
        assert found.spills == 0, found
        assert found.occupancy >= 0.125, found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("direction, config", [("forward", 0), ("forward", 1), ("backward", 0), ("backward", 1)])
def test_shipped_configs(direction: str, config: int, target: str) -> None:
    check(target, direction, config)


def test_gradients_in_chunks() -> None:
    check("sm_80", "backward", 0, chunks=True)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("config", [0, 1])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_chunks(direction: str, dtype: torch.dtype, config: int, target: str) -> None:
    check(target, direction, config, dtype, chunks=True)
    check(target, direction, config, dtype, 128, chunks=True, packed=True, bonus=True)
    check(target, direction, config, dtype, 128, chunks=True, values=128)
    check(target, direction, config, dtype, 256, chunks=True, values=256)
    check(target, direction, config, dtype, 256, chunks=True, values=256, per_key=False)
    check(target, direction, config, dtype, 128, chunks=True, values=128, per_key=False, bonus=True)
    check(target, direction, config, dtype, chunks=True, per_key=False)
    check(target, direction, config, dtype, chunks=True, log_decay=False)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("facts", [{"per_key": False}, {"log_decay": False, "bonus": True}], ids=str)
def test_wide_states_in_chunks(facts: dict[str, Any], target: str) -> None:
    check(target, "forward", 0, FLOAT32, 256, chunks=True, values=256, **facts)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_gradients_of_few_keys_in_chunks(dtype: torch.dtype, target: str) -> None:
    for per_key, bonus in itertools.product((True, False), repeat=2):
        check(target, "backward", 0, dtype, 32, chunks=True, per_key=per_key, bonus=bonus)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_bonus_in_packed_sequences(direction: str, target: str) -> None:
    check(target, direction, 0, FLOAT32, packed=True, bonus=True)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_other_problems(direction: str) -> None:
    check("sm_90", direction, 0, FLOAT64)
    check("sm_80", direction, 0, FLOAT32, keys=512)
    check("gfx942", direction, 0, per_key=False)
    check("sm_90", direction, 0, log_decay=False, initial_state=False)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("keys", [1, 16, 128, 256, 512])
@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("direction, configs", [("forward", 3), ("backward", 2)])
def test_the_cross_product(direction: str, configs: int, dtype: torch.dtype, keys: int, target: str) -> None:
    if keys == 512 and dtype == FLOAT64:
        # more than `cannot` lets through
        keys = 200
    for config in range(configs):
        for per_key, bonus in ((True, False), (False, True)):
            check(target, direction, config, dtype, keys, per_key=per_key, bonus=bonus)
