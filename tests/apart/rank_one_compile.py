"""The delta rule's and dplr's Triton kernels compiled for GPUs that are not there. See test_rank_one_triton.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.delta_rule import triton as delta_rule
from kernels.dplr import triton as dplr
from kernels.problem import Problem

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
FLOAT64, FLOAT32, BFLOAT16 = torch.float64, torch.float32, torch.bfloat16
BACKENDS = {"delta_rule": (delta_rule, "qkv"), "dplr": (dplr, "qkvab")}


def check(
    op: str, target: str, direction: str, config: int, dtype: torch.dtype = BFLOAT16, keys: int = 64,
    values: int = 64, chunks: bool = False, **facts: Any,
) -> None:  # fmt: skip
    """No spills, an eighth of the warps resident, and code that is more than a trap."""
    backend, rows = BACKENDS[op]
    sizes = {"B": 2, "T": 2048, "H": 8, "K": keys, "V": values, "J": keys if facts.pop("per_key", True) else 1, "N": 2}
    options = {"scale": 0.125, "log_decay": True, "initial_state": True, "packed": False, **facts}
    if options["packed"]:
        sizes["B"] = 1
    dtypes = dict.fromkeys(rows, dtype) | ({"beta": torch.float32} if op == "delta_rule" else {})
    problem = Problem(op, direction, torch.device("cuda"), dtypes, sizes, options)
    assert backend.cannot(problem) == []
    configs = [c for c in backend.configs(problem) if ("chunk" in c) == chunks]
    for found in backend.compile_for(target, problem, configs[config]):
        assert found.spills == 0, found
        assert found.occupancy >= 0.125, found
        assert found.registers >= 16, found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("op", BACKENDS)
def test_default_configs(op: str, direction: str, target: str) -> None:
    check(op, target, direction, 0)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "dtype, keys, per_key",
    [
        (BFLOAT16, 64, False),
        (BFLOAT16, 128, False),
        (BFLOAT16, 256, False),
        (FLOAT32, 128, False),
        (BFLOAT16, 128, True),
        (FLOAT32, 64, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_chunks(direction: str, dtype: torch.dtype, keys: int, per_key: bool, target: str) -> None:
    check("delta_rule", target, direction, 0, dtype, keys, values=128, chunks=True, per_key=per_key)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("facts", [{"packed": True}, {"log_decay": False, "initial_state": False}], ids=str)
@pytest.mark.parametrize(
    "dtype, keys",
    [(FLOAT32, 32), (FLOAT32, 50), (FLOAT32, 64), (BFLOAT16, 64), (BFLOAT16, 96), (BFLOAT16, 100), (BFLOAT16, 128)],
    ids=str,
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_all_chunks(direction: str, dtype: torch.dtype, keys: int, facts: dict[str, Any], target: str) -> None:
    for config, values in (0, 16), (0, 64), (0, 100), (0, 128), (0, 130), (-1, 128):
        check("delta_rule", target, direction, config, dtype, keys, values, chunks=True, per_key=False, **facts)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("facts", [{"packed": True}, {"initial_state": False}], ids=str)
@pytest.mark.parametrize(
    "dtype, keys", [(FLOAT32, 32), (FLOAT32, 50), (FLOAT32, 64), (BFLOAT16, 8), (BFLOAT16, 40), (BFLOAT16, 64)], ids=str
)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_chunks_of_decays_per_key(
    direction: str, dtype: torch.dtype, keys: int, facts: dict[str, Any], target: str
) -> None:
    for values in (16, 64, 100):
        check("delta_rule", target, direction, 0, dtype, keys, values, chunks=True, **facts)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("facts", [{}, {"packed": True}, {"initial_state": False}], ids=str)
@pytest.mark.parametrize("keys", [96, 128])
@pytest.mark.parametrize("dtype, per_key", [(BFLOAT16, True), (FLOAT32, False)], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_chunks_of_many_keys_in_two_parts(
    direction: str, dtype: torch.dtype, per_key: bool, keys: int, facts: dict[str, Any], target: str
) -> None:
    for values in (64, 128, 192):
        check("delta_rule", target, direction, 0, dtype, keys, values, chunks=True, per_key=per_key, **facts)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("facts", [{}, {"packed": True}, {"log_decay": False, "initial_state": False}], ids=str)
@pytest.mark.parametrize("keys, values", [(192, 192), (256, 512)])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_chunks_of_keys_in_groups(direction: str, keys: int, values: int, facts: dict[str, Any], target: str) -> None:
    check("delta_rule", target, direction, 0, BFLOAT16, keys, values, chunks=True, per_key=False, **facts)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_chunks_of_dplr(direction: str, target: str) -> None:
    check("dplr", target, direction, 0, chunks=True)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("facts", [{"packed": True}, {"log_decay": False, "initial_state": False}], ids=str)
@pytest.mark.parametrize("dtype, keys", [(FLOAT32, 32), (BFLOAT16, 40), (BFLOAT16, 64)], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_all_chunks_of_dplr(direction: str, dtype: torch.dtype, keys: int, facts: dict[str, Any], target: str) -> None:
    for values, per_key in (16, True), (64, False), (100, True):
        check("dplr", target, direction, 0, dtype, keys, values, chunks=True, per_key=per_key, **facts)


@pytest.mark.parametrize("op", BACKENDS)
def test_other_problems(op: str) -> None:
    check(op, "sm_90", "backward", 1, packed=True)
    check(op, "sm_80", "backward", 0, FLOAT32, keys=128, per_key=False)
    check(op, "gfx942", "forward", 1, log_decay=False, initial_state=False)


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("keys", [1, 16, 128, 256, 512])
@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("direction, configs", [("forward", 3), ("backward", 2)])
@pytest.mark.parametrize("op", BACKENDS)
def test_the_cross_product(op: str, direction: str, configs: int, dtype: torch.dtype, keys: int, target: str) -> None:
    if keys == 512 and dtype == FLOAT64:
        # more than `cannot` lets through
        keys = 200
    for config in range(configs):
        for per_key in (True, False):
            check(op, target, direction, config, dtype, keys, per_key=per_key)
