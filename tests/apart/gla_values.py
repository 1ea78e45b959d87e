"""The Triton gated linear attention's values and gradients in the interpreter. See test_gla_triton.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import triton_cases as tc
from triton_cases import uninitialised_is_nan  # noqa: F401

from kernels.agreement import Inputs
from kernels.gla import OP
from kernels.gla import triton as backend


def posed(
    direction: str, batch: int = 1, length: int = 9, keys: int = 5, values: int = 3, per_key: bool = True, **facts: Any
) -> Inputs:
    sizes = {"B": batch, "T": length, "H": 2, "K": keys, "V": values, "J": keys if per_key else 1}
    return tc.posed(OP, direction, sizes, **facts)


FACTS = {
    "length": (1, 4, 5, 11),
    "batch": (1, 2),
    "keys": (1, 5, 8),
    "values": (1, 2, 5),
    "dtype": (tc.FLOAT64, tc.FLOAT32, tc.FLOAT16, tc.BFLOAT16),
    "per_key": (False, True),
    "log_decay": (True, True, False),
    "hard": (False, True),
    "packed": (False, True),
    "bonus": (False, True),
    "initial_state": (False, True),
}
CASES = tc.cases(FACTS, 20)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_problems_of_every_kind(case: dict[str, Any], direction: str) -> None:
    tc.agrees(posed(direction, **case))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_shipped_config(direction: str) -> None:
    for config in backend.configs(posed(direction).problem):
        tc.agrees(posed(direction, length=config["rows"] + 3, keys=33, values=9), config)


@pytest.mark.parametrize("missing", ["dy", "dfinal_state"])
def test_a_loss_on_one_output(missing: str) -> None:
    tc.agrees(tc.without(posed("backward", packed=True), missing))


def test_only_the_gradients_that_are_needed() -> None:
    tc.check_needs(posed("backward", length=2, bonus=True), scale=1.0)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_programs_in_any_order_give_the_same_bits(direction: str) -> None:
    tc.check_any_order(posed(direction, packed=True, bonus=True))


def test_what_it_cannot_do() -> None:
    problem = posed("forward", length=1).problem
    wide = replace(problem, sizes={**problem.sizes, "K": 513})
    assert backend.cannot(problem) == []
    assert backend.cannot(wide) == ["axis K is 513; at most 512"]
