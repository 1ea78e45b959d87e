"""The delta rule's and dplr's Triton kernels, values and gradients in the interpreter. See test_rank_one_triton.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import triton_cases as tc
from triton_cases import uninitialised_is_nan  # noqa: F401
from triton_interpreter import counting, shuffled

from kernels.agreement import MULTIPLE, Expected, Inputs
from kernels.catalogue import OPS
from kernels.delta_rule import triton_chunks
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


CHUNKS = {"chunk": 16, "values": 16, "keys": 16}
CHUNK_CASES = tc.cases(tc.CHUNKS_OF_RANK_ONE, 8)
DELTA_RULE = OPS["delta_rule"]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CHUNK_CASES, ids=range(len(CHUNK_CASES)))
def test_chunks_of_every_kind(case: dict[str, Any], direction: str) -> None:
    tc.agrees(posed(DELTA_RULE, direction, **case), CHUNKS)


WIDE_FACTS = {
    "target": ("sm_90", "sm_100", "gfx942"),
    "length": (33, 40),
    "keys": (50, 96, 100, 128),
    "values": (6, 66, 80),
    "dtype": (tc.FLOAT32, tc.BFLOAT16),
    "per_key": (False, True),
    "log_decay": (True, True, False),
    "hard": (False, True, True),
    "packed": (False, True),
    "initial_state": (False, True),
}
PACKED = {
    "length": 33,
    "values": 80,
    "per_key": False,
    "log_decay": True,
    "hard": True,
    "packed": True,
    "initial_state": True,
}
# chance has none of many keys in registers on B200, and none of float32 on H100
WIDE = [
    *tc.cases(WIDE_FACTS, 12),
    {"target": "sm_100", "keys": 128, "dtype": tc.FLOAT32, **PACKED},
    {"target": "sm_100", "keys": 96, "dtype": tc.BFLOAT16, **PACKED, "values": 128},
    {"target": "sm_90", "keys": 96, "dtype": tc.FLOAT32, **PACKED},
    # in groups
    {"target": "sm_100", "keys": 256, "dtype": tc.BFLOAT16, **PACKED},
    {"target": "gfx942", "keys": 192, "dtype": tc.FLOAT16, **PACKED, "packed": False},
    {"target": "sm_90", "keys": 256, "dtype": tc.FLOAT16, **PACKED, "log_decay": False, "initial_state": False},
]


def shipped(inputs: Inputs) -> dict[str, int]:
    return next(c for c in tc.triton("delta_rule").configs(inputs.problem) if "chunk" in c)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", WIDE, ids=range(len(WIDE)))
def test_chunks_of_many_keys(case: dict[str, Any], direction: str) -> None:
    """On every kind of GPU, with strengths from nothing to a reflection."""
    facts = {name: value for name, value in case.items() if name != "target"}
    inputs = posed(DELTA_RULE, direction, **facts)
    given = dict(zip(DELTA_RULE.names(direction), inputs.tensors))
    beta = given["beta"]
    assert beta is not None
    given["beta"] = (torch.arange(beta.numel()) % 3).view(beta.shape).to(beta)
    problem = inputs.problem
    if case["keys"] > 64:
        # with masks too, for which registers have no room, and decays of each key beside float32: there is more to see
        sizes = {**problem.sizes, "K": -(-case["keys"] // 32) * 32, "V": -(-case["values"] // 64) * 64}
        dtypes = dict.fromkeys(problem.dtypes, tc.BFLOAT16) if case["per_key"] else problem.dtypes
        problem = replace(problem, dtypes=dtypes, sizes=sizes)
    config = shipped(replace(inputs, problem=problem))
    with mock.patch.object(triton_chunks, "target_of", return_value=case["target"]):
        tc.agrees(replace(inputs, tensors=tuple(given.values())), config)


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
    inputs = replace(inputs, problem=problem, tensors=tuple(given.values()))
    # a product with the inverse multiplies errors by its norm, the largest sum of a row, which the loop does without
    unit = torch.eye(CHUNKS["chunk"], dtype=torch.float64)
    norm = (unit + beta * torch.ones_like(unit).tril(-1)).inverse().abs().sum(1).max().item()
    expected, more = Expected.of(inputs), max(norm / MULTIPLE, 1)
    expected = replace(expected, allowed=tuple((more * worst, more * mean) for worst, mean in expected.allowed))
    assert expected.difference(inputs.call(tc.triton("delta_rule"), CHUNKS)()) is None


@pytest.mark.parametrize("per_key", [False, True])
def test_chunks_lose_nothing_and_give_only_what_is_needed_in_any_order(per_key: bool) -> None:
    inputs = posed(DELTA_RULE, "backward", length=17, keys=8, per_key=per_key)
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


# What forward and backward move at most for each further chunk, as times the least, by dtype, K = V, GPU and decays
LIMITS = {
    (tc.BFLOAT16, 64, "sm_90", False): (1.01, 1.22),
    (tc.BFLOAT16, 128, "sm_90", False): (1.2, 1.14),
    (tc.BFLOAT16, 128, "sm_100", False): (1.43, 1.14),
    (tc.BFLOAT16, 256, "sm_90", False): (3.25, 1.19),
    (tc.BFLOAT16, 64, "sm_90", True): (1.48, 1.27),
    (tc.BFLOAT16, 128, "sm_90", True): (1.48, 1.18),
    (tc.BFLOAT16, 128, "sm_100", True): (1.48, 1.26),
    (tc.FLOAT32, 64, "sm_90", False): (1.43, 1.23),
    (tc.FLOAT32, 128, "sm_90", False): (1.42, 1.14),
    (tc.FLOAT32, 64, "sm_90", True): (1.45, 1.25),
}


def moved(direction: str, dtype: torch.dtype, width: int, per_key: bool, length: int) -> tuple[int, int]:
    """What is moved, and the least where all chunks are worked on at once: docs/derivations/delta_rule.md."""
    inputs = posed(DELTA_RULE, direction, 1, length, width, width, per_key, dtype=dtype, initial_state=True)
    config = shipped(inputs)
    with counting() as traffic:
        found = inputs.call(tc.triton("delta_rule"), config)()
    assert traffic.outside == 0
    size = {name: tc.size(x) for name, x in zip(DELTA_RULE.names(direction), inputs.tensors)}
    q, k, v, initial = (size[name] for name in ("q", "k", "v", "initial_state"))
    C, chunks = config["chunk"], length // config["chunk"] * 2
    pairs = chunks * C * (C - 1) // 2 * 4 + size["beta"] + size["log_decay"]
    least = k + pairs + tc.size(*found)
    if direction == "forward":
        return traffic.moved, least + q + k + v + pairs + initial
    states = chunks * width * width * 4
    least += k + v + pairs + initial + states
    least += q + k + size["dy"] + pairs + size["dfinal_state"] + states
    return traffic.moved, least + q + k + v + size["dy"] + pairs + 2 * states


@pytest.mark.parametrize("dtype, width, target, per_key", LIMITS, ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_chunks_move(direction: str, dtype: torch.dtype, width: int, target: str, per_key: bool) -> None:
    with mock.patch.object(triton_chunks, "target_of", return_value=target):
        (more, more_least), (one, one_least) = (moved(direction, dtype, width, per_key, length) for length in (32, 16))
    times = (more - one) / (more_least - one_least)
    assert 1 < times <= LIMITS[dtype, width, target, per_key][direction == "backward"]
