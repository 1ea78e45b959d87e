"""The Triton gated linear attention's values and gradients in the interpreter. See test_gla_triton.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton_cases as tc
from triton_cases import uninitialised_is_nan  # noqa: F401
from triton_interpreter import counting

from kernels.agreement import Inputs
from kernels.gla import OP
from kernels.gla import triton as backend


def posed(
    direction: str, batch: int = 1, length: int = 9, keys: int = 5, values: int = 3, per_key: bool = True,
    heads: int = 2, **facts: Any,
) -> Inputs:  # fmt: skip
    sizes = {"B": batch, "T": length, "H": heads, "K": keys, "V": values, "J": keys if per_key else 1}
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
# Several chunks of a sequence, the last one not whole, and more keys and values than a program has at a time
CHUNKS = {"chunk": 16, "num_warps": 1}
CHUNKED_FACTS = FACTS | {
    "length": (1, 17, 43),
    "keys": (1, 16, 40),
    "values": (5, 67),
    "dtype": (tc.FLOAT32, tc.FLOAT16, tc.BFLOAT16),
    "hard": (False, True, True),
    "heads": (1, 1, 2),
}
CHUNKED = tc.cases(CHUNKED_FACTS, 12)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CHUNKED, ids=range(len(CHUNKED)))
def test_chunks_of_every_kind(case: dict[str, Any], direction: str) -> None:
    tc.agrees(posed(direction, **case), CHUNKS)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_problems_of_every_kind(case: dict[str, Any], direction: str) -> None:
    tc.agrees(posed(direction, **case))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_shipped_config(direction: str) -> None:
    for config in backend.configs(posed(direction).problem):
        length = config["chunk"] if "chunk" in config else config["rows"]
        tc.agrees(posed(direction, length=length + 3, keys=33, values=9, heads=1), config)


def test_chunks_where_sequences_are_long() -> None:
    def names(**facts: Any) -> list[bool]:
        return ["chunk" in config for config in backend.configs(posed("forward", **facts).problem)]

    assert names(length=1023) == [False, False, False, True, True]
    assert names(length=1024) == [True, True, False, False, False]
    assert names(length=1024, dtype=tc.FLOAT64) == names(length=1024, keys=257) == [False] * 3


@pytest.mark.parametrize("values", [130, 144])
@pytest.mark.parametrize("direction, per_key", [("forward", True), ("backward", False)])
def test_chunks_of_wide_states(direction: str, per_key: bool, values: int) -> None:
    """More keys and values than narrow programs have at a time, and not a whole number of blocks of them."""
    inputs = posed(direction, length=35, keys=66, values=values, heads=1, per_key=per_key, initial_state=True)
    tc.agrees(inputs, {"chunk": 32, "num_warps": 4})


def test_chunks_of_wide_states_on_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.0")
    inputs = posed("backward", length=35, keys=130, values=144, heads=1)
    tc.agrees(inputs, {"chunk": 32, "num_warps": 4})


# What forward and backward move at most, as times the least, by K = V and dtype, in sequences of any length
LIMITS = {
    (64, tc.BFLOAT16): (1.08, 1.34),
    (64, tc.FLOAT32): (1.11, 1.38),
    (128, tc.BFLOAT16): (1.12, 1.36),
    (128, tc.FLOAT32): (1.19, 1.41),
}


def moved_and_least(direction: str, width: int, chunks: int, **facts: Any) -> tuple[int, int]:
    """Bytes, and those that a chunked algorithm has to move: docs/derivations/chunks.md."""
    inputs = posed(direction, length=32 * chunks, keys=width, values=width, heads=1, **facts)
    with counting() as traffic:
        found = inputs.call(tc.triton("gla"), {"chunk": 32, "num_warps": 4})()
    size = {name: tc.size(x) for name, x in zip(inputs.op.names(direction), inputs.tensors)}
    # for each chunk a state of float32 is written and read
    states = chunks * width * width * 4
    walk = size["k"] + size["v"] + size["log_decay"] + size["initial_state"] + states
    rows = size["q"] + size["k"] + size["v"] + size["log_decay"] + states
    least = walk + rows + tc.size(*found)
    if direction == "backward":
        against = size["q"] + size["dy"] + size["log_decay"] + size["dfinal_state"] + states
        least += against + size["dy"] + states
    return traffic.moved + traffic.outside, least


@pytest.mark.parametrize("hip", [None, "6.0"], ids=["nvidia", "amd"])
@pytest.mark.parametrize("per_key", [True, False])
@pytest.mark.parametrize("dtype", [tc.BFLOAT16, tc.FLOAT32], ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_bytes_moved_in_chunks(
    width: int, dtype: torch.dtype, per_key: bool, hip: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one chunk, and in every further one, which is what is left of it in the longest sequences."""
    monkeypatch.setattr(torch.version, "hip", hip)
    facts = {"dtype": dtype, "per_key": per_key, "initial_state": True}
    for direction, limit in zip(("forward", "backward"), LIMITS[width, dtype]):
        moved, least = moved_and_least(direction, width, 1, **facts)
        both, least_of_both = moved_and_least(direction, width, 2, **facts)
        assert least <= moved <= limit * least, (direction, moved / least)
        assert both - moved <= limit * (least_of_both - least), (direction, (both - moved) / (least_of_both - least))


@pytest.mark.parametrize(
    "hip, per_key, limit", [(None, True, 1.6), (None, False, 1.64), ("6.0", True, 1.52), ("6.0", False, 1.5)]
)
def test_bytes_that_wide_states_add(
    hip: str | None, per_key: bool, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    facts = {"dtype": tc.FLOAT32, "per_key": per_key}
    moved, least = moved_and_least("backward", 256, 1, **facts)
    both, least_of_both = moved_and_least("backward", 256, 2, **facts)
    assert both - moved <= limit * (least_of_both - least)


@pytest.mark.parametrize("config", [tc.CONFIG, CHUNKS], ids=["loop", "chunks"])
@pytest.mark.parametrize("missing", ["dy", "dfinal_state"])
def test_a_loss_on_one_output(missing: str, config: dict[str, int]) -> None:
    tc.agrees(tc.without(posed("backward", packed=True), missing), config)


def test_only_the_gradients_that_are_needed_in_chunks() -> None:
    inputs = posed("backward", length=18, bonus=True)
    every = inputs.call(tc.triton("gla"), CHUNKS)()
    for one in range(len(every)):
        needs = tuple(i == one for i in range(len(every)))
        found = tc.triton("gla").function("backward")(*inputs.tensors, None, scale=1.0, needs=needs, config=CHUNKS)
        assert [x is not None for x in found] == list(needs)
        gradient, expected = found[one], every[one]
        assert gradient is not None
        assert expected is not None
        assert torch.equal(gradient, expected)


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
