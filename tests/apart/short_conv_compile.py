"""The Triton short convolution compiled for GPUs that are not there. See test_short_conv_triton.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from triton_cases import BFLOAT16, FLOAT32, FLOAT64, TARGETS

from kernels.problem import Problem
from kernels.short_conv import triton as backend

DTYPES = [(BFLOAT16, BFLOAT16), (FLOAT32, FLOAT32), (FLOAT64, FLOAT64), (FLOAT32, BFLOAT16)]


def problem(direction: str, dtypes: tuple[torch.dtype, torch.dtype], *, width: int = 4, **facts: Any) -> Problem:
    """dtypes: of the weights and of x."""
    # A multiple of 8 and of nothing larger
    sizes = {"B": 1 if facts.get("packed") else 4, "T": 2048, "D": 1000, "W": width, "N": 4}
    plain = {"activation": "silu", "reverse": False, "bias": True, "initial_state": False, "packed": False}
    named = {"x": dtypes[1], "weight": dtypes[0], "bias": dtypes[0]}
    return Problem("short_conv", direction, torch.device("cuda"), named, sizes, {**plain, **facts})


def check(target: str, posed: Problem, config: dict[str, int]) -> None:
    """No spills, a quarter of the warps resident, wide loads and stores, and asynchronous copies on NVIDIA."""
    assert backend.cannot(posed) == []
    first, *rest = backend.compile_for(target, posed, config)
    assert len(rest) == (posed.direction == "backward")
    for found in (first, *rest):
        assert found.spills == 0, found
        assert found.occupancy >= 0.25, found
    rows, itemsize = config["BT"], posed.dtypes["x"].itemsize
    # float64: half the columns; then in pieces of at most 16 bytes
    wide = min(16, config["columns"] * min(itemsize, 4))
    assert first.stores[wide] >= rows, first
    # Narrower are only the bounds of a packed sequence
    assert sum(count for width, count in first.loads.items() if width < 8) <= 3, first
    if target.startswith("sm_") and config["num_stages"] > 1:
        assert first.asynchronous >= rows, first


@pytest.mark.parametrize("target", TARGETS)
# The others differ in their chunks, and some backward in nothing else
@pytest.mark.parametrize("config", [0, -2, -1])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_other_kind_of_config(direction: str, config: int, target: str) -> None:
    posed = problem(direction, DTYPES[0])
    check(target, posed, backend.configs(posed)[config])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_default_config_for_other_dtypes(direction: str, target: str) -> None:
    posed = problem(direction, DTYPES[1], packed=True, initial_state=True)
    check(target, posed, backend.configs(posed)[0])


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_float64_in_reverse(direction: str) -> None:
    posed = problem(direction, DTYPES[2], reverse=True)
    check("sm_90", posed, backend.configs(posed)[0])


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_cross_product(dtypes: tuple[torch.dtype, torch.dtype], target: str) -> None:
    for direction, activation in itertools.product(("forward", "backward"), ("", "silu")):
        for given in itertools.product((False, True), repeat=4):
            facts = dict(zip(("reverse", "packed", "initial_state", "bias"), given))
            posed = problem(direction, dtypes, activation=activation, **facts)
            for config in backend.configs(posed):
                check(target, posed, config)


@pytest.mark.parametrize(("width", "target"), [(1, "sm_80"), (2, "gfx942"), (3, "sm_90"), (16, "sm_100")])
def test_other_numbers_of_taps(width: int, target: str) -> None:
    for direction in ("forward", "backward"):
        posed = problem(direction, DTYPES[0], width=width)
        for found in backend.compile_for(target, posed, backend.configs(posed)[0]):
            assert found.spills == 0, found
            assert found.occupancy >= 0.25, found


def test_many_rows_come_in_longer_chunks() -> None:
    posed = problem("forward", DTYPES[0])
    many = Problem(posed.op, posed.direction, posed.device, posed.dtypes, {**posed.sizes, "B": 64}, posed.options)
    assert backend.configs(posed)[0]["CT"] < backend.configs(many)[0]["CT"]
    assert all(config in backend.configs(posed) for config in backend.configs(many))
