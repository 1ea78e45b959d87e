"""The Triton short convolution compiled for GPUs that are not there. See test_short_conv_triton.py."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import triton
from triton_cases import BFLOAT16, FLOAT32, FLOAT64, TARGETS, cases, check_resources

from kernels.problem import Problem
from kernels.short_conv import triton as backend

DTYPES = [(BFLOAT16, BFLOAT16), (FLOAT32, FLOAT32), (FLOAT64, FLOAT64), (FLOAT32, BFLOAT16)]
FLAGS = dict.fromkeys(("reverse", "packed", "initial_state", "bias"), (False, True))
FACTS = cases({"activation": ("", "silu"), **FLAGS}, 4)


def problem(direction: str, dtypes: tuple[torch.dtype, torch.dtype], *, width: int = 4, **facts: Any) -> Problem:
    """dtypes: of the weights and of x."""
    # A multiple of 8 and of nothing larger
    sizes = {"B": 1 if facts.get("packed") else 4, "T": 2048, "D": 1000, "W": width, "N": 4}
    plain = {"activation": "silu", "reverse": False, "bias": True, "initial_state": False, "packed": False}
    named = {"x": dtypes[1], "weight": dtypes[0], "bias": dtypes[0]}
    return Problem("short_conv", direction, torch.device("cuda"), named, sizes, {**plain, **facts})


def check(target: str, posed: Problem, config: dict[str, int]) -> None:
    """No spills, a quarter of the warps resident, 16 bytes at a time, and all rows by asynchronous copies on NVIDIA."""
    assert backend.cannot(posed) == []
    first, *rest = backend.compile_for(target, posed, config)
    assert len(rest) == (posed.direction == "backward")
    for found in (first, *rest):
        # Whose taps alone fill registers (`configs` in kernels/short_conv/triton.py)
        if posed.sizes["W"] > 5 and posed.dtypes["x"] == FLOAT64 and found.kernel == "conv_backward":
            assert found.spills == 0, found
        else:
            check_resources(found)
    assert set(first.stores) == {16}, first
    # Narrower are only taps, each by itself where they are no power of two, biases and the bounds of a packed sequence
    W, padded = posed.sizes["W"], triton.next_power_of_2(posed.sizes["W"])
    narrow = (4 if padded == W else 2 * padded + 2) + 3 * posed.options["packed"]
    assert sum(count for width, count in first.loads.items() if width < 16) <= narrow, first
    if target.startswith("sm_") and config["num_stages"] > 1:
        streams = 1 if posed.direction == "forward" else 2
        # Before and after the loop: rows at the borders, states, taps
        once = 6 * max(1, posed.dtypes["x"].itemsize // 4) * max(1, triton.next_power_of_2(W - 1) // 4)
        assert first.asynchronous >= max(streams * config["num_stages"], first.loads[16] - once), first


@pytest.mark.parametrize("target", TARGETS)
# The others differ in how long their chunks are
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
    for direction, facts in itertools.product(("forward", "backward"), FACTS):
        posed = problem(direction, dtypes, **facts)
        # How many rows a chunk has is no other code
        for config in {str(config): config for config in ({**c, "CT": 32} for c in backend.configs(posed))}.values():
            check(target, posed, config)


@pytest.mark.parametrize(("width", "target"), [(1, "sm_80"), (2, "gfx942"), (3, "sm_90"), (16, "sm_100")])
def test_other_numbers_of_taps(width: int, target: str) -> None:
    for direction in ("forward", "backward"):
        posed = problem(direction, DTYPES[0], width=width)
        check(target, posed, backend.configs(posed)[0])


def test_many_taps() -> None:
    posed = problem("backward", DTYPES[0], width=12)
    check("sm_90", posed, backend.configs(posed)[0])


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("width", [5, 8, 9, 16])
def test_many_taps_in_every_dtype(width: int, dtypes: tuple[torch.dtype, torch.dtype], target: str) -> None:
    everything = {"packed": True, "initial_state": True, "reverse": True}
    for direction, facts in itertools.product(("forward", "backward"), ({}, everything)):
        posed = problem(direction, dtypes, width=width, **facts)
        first, *_, other, _ = backend.configs(posed)
        for config in (first, other):
            check(target, posed, config)


def test_many_rows_come_in_longer_chunks() -> None:
    posed = problem("forward", DTYPES[0])
    many = Problem(posed.op, posed.direction, posed.device, posed.dtypes, {**posed.sizes, "B": 64}, posed.options)
    assert backend.configs(posed)[0]["CT"] < backend.configs(many)[0]["CT"]
    assert all(config in backend.configs(posed) for config in backend.configs(many))
