"""The delta rule's and dplr's Triton kernels, values and gradients in the interpreter. See test_rank_one_triton.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton_cases as tc
from triton_cases import uninitialised_is_nan  # noqa: F401
from triton_interpreter import counting, shuffled

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


CHUNKS = {"chunk": 16, "values": 16}
# Of the delta rule in chunks: none that is whole, or one and one of a single row
CHUNK_FACTS = {
    "length": (3, 17),
    "keys": (8, 20),
    "values": (1, 19),
    "dtype": (tc.FLOAT32, tc.FLOAT16, tc.BFLOAT16, tc.BFLOAT16),
    "log_decay": (True, True, False),
    "hard": (False, True),
    "packed": (False, True),
    "initial_state": (False, True),
}
CHUNK_CASES = tc.cases(CHUNK_FACTS, 6)
DELTA_RULE = OPS["delta_rule"]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CHUNK_CASES, ids=range(len(CHUNK_CASES)))
def test_chunks_of_every_kind(case: dict[str, Any], direction: str) -> None:
    tc.agrees(posed(DELTA_RULE, direction, per_key=False, **case), CHUNKS)


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_chunks_that_replace_one_key_again_and_again(beta: float) -> None:
    # with the largest entries in the inverse, and with none
    inputs = posed(DELTA_RULE, "backward", length=17, keys=8, per_key=False)
    given = dict(zip(DELTA_RULE.names("backward"), inputs.tensors))
    q, k, b = given["q"], given["k"], given["beta"]
    assert k is not None
    assert b is not None
    given |= {"q": q, "k": k[:, :1].expand_as(k), "beta": torch.full_like(b, beta), "log_decay": None}
    problem = replace(inputs.problem, options={**inputs.problem.options, "log_decay": False})
    tc.agrees(replace(inputs, problem=problem, tensors=tuple(given.values())), CHUNKS)


def test_chunks_lose_nothing_and_give_only_what_is_needed_in_any_order() -> None:
    inputs = posed(DELTA_RULE, "backward", length=17, keys=8, per_key=False)
    function = tc.triton("delta_rule").function("backward")
    for absent in range(2):
        given = [None if i == absent else x for i, x in enumerate(inputs.tensors)]
        tc.agrees(replace(inputs, tensors=tuple(given)), CHUNKS)
    every = inputs.call(tc.triton("delta_rule"), CHUNKS)()
    for needs in ((True, False) * 3, (False, True) * 3):
        with shuffled(0):
            found = function(*inputs.tensors, None, scale=1.0, needs=needs, config=CHUNKS)
        for wanted, gradient, expected in zip(needs, found, every, strict=True):
            assert (gradient is not None) == wanted
            assert gradient is None or (expected is not None and torch.equal(gradient, expected))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_chunks_move(direction: str) -> None:
    """Forward: all inputs and outputs once. Backward besides: at every border of chunks a state and a gradient of one,
    written and read."""
    facts = {"length": 32, "keys": 64, "values": 64, "dtype": tc.BFLOAT16, "initial_state": False}
    inputs = posed(DELTA_RULE, direction, per_key=False, **facts)
    config = next(c for c in tc.triton("delta_rule").configs(inputs.problem) if "chunk" in c)
    with counting() as traffic:
        outputs = inputs.call(tc.triton("delta_rule"), config)()
    least = sum(x.nbytes for x in (*inputs.tensors, *outputs) if x is not None)
    if direction == "backward":
        states = 32 // config["chunk"] * 2
        least += 4 * states * 64 * 64 * 4
    assert least < traffic.moved <= 1.5 * least, (traffic, least)
