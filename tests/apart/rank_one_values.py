"""The delta rule's and dplr's Triton kernels, values and gradients in the interpreter. See test_rank_one_triton.py."""

from __future__ import annotations

from typing import Any

import pytest
import triton_cases as tc
from triton_cases import uninitialised_is_nan  # noqa: F401

from kernels.agreement import Inputs
from kernels.catalogue import OPS
from kernels.op import Op


@pytest.fixture(params=["delta_rule", "dplr"])
def op(request: pytest.FixtureRequest) -> Op:
    return OPS[request.param]


def posed(
    op: Op, direction: str, batch: int = 1, length: int = 9, keys: int = 5, values: int = 3, per_key: bool = True,
    **facts: Any,
) -> Inputs:  # fmt: skip
    sizes = {"B": batch, "T": length, "H": 2, "K": keys, "V": values, "J": keys if per_key else 1}
    return tc.posed(op, direction, sizes, **facts)


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
    "initial_state": (False, True),
}
CASES = tc.cases(FACTS, 11)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_problems_of_every_kind(op: Op, case: dict[str, Any], direction: str) -> None:
    tc.agrees(posed(op, direction, **case))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_default_config(op: Op, direction: str) -> None:
    config = tc.triton(op.name).configs(posed(op, direction).problem)[0]
    tc.agrees(posed(op, direction, length=config["rows"] + 3, keys=33, values=9), config)


@pytest.mark.parametrize("missing", ["dy", "dfinal_state"])
def test_a_loss_on_one_output(op: Op, missing: str) -> None:
    tc.agrees(tc.without(posed(op, "backward", packed=True), missing))


def test_only_the_gradients_that_are_needed(op: Op) -> None:
    tc.check_needs(posed(op, "backward", length=2), scale=1.0)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_programs_in_any_order_give_the_same_bits(op: Op, direction: str) -> None:
    tc.check_any_order(posed(op, direction, packed=True))
