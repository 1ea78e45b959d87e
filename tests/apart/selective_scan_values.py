"""The selective scan's Triton kernels, values and gradients in the interpreter. See test_selective_scan_triton.py."""

from __future__ import annotations

from typing import Any

import pytest
import triton_cases as tc

from kernels.agreement import Inputs
from kernels.selective_scan import OP

pytestmark = pytest.mark.usefixtures("nan_filled")


def posed(direction: str, batch: int = 1, length: int = 9, channels: int = 5, keys: int = 5, **facts: Any) -> Inputs:
    return tc.posed(OP, direction, {"B": batch, "T": length, "D": channels, "K": keys}, **facts)


FACTS = {
    "length": (1, 4, 5, 11),
    "batch": (1, 2),
    "channels": (1, 4, 9),
    "keys": (1, 5, 8),
    "dtype": (tc.FLOAT64, tc.FLOAT32, tc.FLOAT16, tc.BFLOAT16),
    "decay_dtype": (None, tc.FLOAT32),
    "D": (False, True),
    "packed": (False, True),
    "initial_state": (False, True),
}
CASES = tc.cases(FACTS, 11)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_problems_of_every_kind(case: dict[str, Any], direction: str) -> None:
    if case["dtype"] == tc.FLOAT64:
        case = {**case, "decay_dtype": None}
    tc.agrees(posed(direction, **case))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_default_config(direction: str) -> None:
    config = OP.backend("triton").configs(posed(direction).problem)[0]
    tc.agrees(posed(direction, length=config["rows"] + 3, channels=33, keys=16), config)


@pytest.mark.parametrize("missing", ["dy", "dfinal_state"])
def test_a_loss_on_one_output(missing: str) -> None:
    tc.agrees(tc.without(posed("backward", packed=True), missing))


def test_only_the_gradients_that_are_needed() -> None:
    tc.check_needs(posed("backward", length=2))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_programs_in_any_order_give_the_same_bits(direction: str) -> None:
    tc.check_any_order(posed(direction, packed=True))
