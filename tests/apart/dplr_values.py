"""dplr's Triton kernels in chunks, values and gradients in the interpreter. See test_dplr_triton.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import triton_cases as tc
from triton_cases import uninitialised_is_nan  # noqa: F401
from triton_interpreter import counting, shuffled

from kernels.agreement import Inputs
from kernels.catalogue import OPS
from kernels.dplr import triton_chunks

DPLR = OPS["dplr"]
CONFIG = {"chunk": 16, "values": 16, "keys": 16}


def posed(
    direction: str, length: int = 17, keys: int = 8, values: int = 3, per_key: bool = True, **facts: Any
) -> Inputs:
    sizes = {"B": 1, "T": length, "H": 2, "K": keys, "V": values, "J": keys if per_key else 1}
    return tc.posed(DPLR, direction, sizes, **facts)


CASES = tc.cases({"target": ("sm_90", "sm_100", "gfx942"), **tc.CHUNKS_OF_RANK_ONE}, 10)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_chunks_of_every_kind(case: dict[str, Any], direction: str) -> None:
    facts = {name: value for name, value in case.items() if name != "target"}
    with mock.patch.object(triton_chunks, "target_of", return_value=case["target"]):
        tc.agrees(posed(direction, **facts), CONFIG)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_rows_that_replace_one_key_again_and_again(direction: str) -> None:
    """As RWKV-7's with a whole step: what is at the key goes, and the value comes."""
    inputs = posed(direction, hard=True)
    given = dict(zip(DPLR.names(direction), inputs.tensors))
    assert given["k"] is not None
    key = torch.nn.functional.normalize(given["k"][:, :1], dim=-1).expand_as(given["k"])
    given |= {"k": key, "a": -key, "b": key}
    tc.agrees(replace(inputs, tensors=tuple(given.values())), CONFIG)


def test_chunks_lose_nothing_and_give_only_what_is_needed_in_any_order() -> None:
    inputs = posed("backward")
    function = tc.triton("dplr").function("backward")
    for missing in ("dy", "dfinal_state"):
        tc.agrees(tc.without(inputs, missing), CONFIG)
    every = inputs.call(tc.triton("dplr"), CONFIG)()
    count = len(DPLR.inputs)
    for needs in (tuple(i % 2 == odd for i in range(count)) for odd in (0, 1)):
        with shuffled(0):
            found = function(*inputs.tensors, None, scale=1.0, needs=needs, config=CONFIG)
        for wanted, gradient, expected in zip(needs, found, every, strict=True):
            assert (gradient is not None) == wanted
            assert gradient is None or (expected is not None and torch.equal(gradient, expected))


# What forward and backward move at most for each further chunk of K = V = 64, as times the least
LIMITS = {"forward": 1.45, "backward": 1.26}


def moved(direction: str, length: int) -> tuple[int, int]:
    """What is moved, and the least where all chunks are worked on at once: docs/derivations/dplr.md."""
    inputs = posed(direction, length, 64, 64, dtype=tc.BFLOAT16, initial_state=True)
    config = next(c for c in tc.triton("dplr").configs(inputs.problem) if "chunk" in c)
    with counting() as traffic:
        found = inputs.call(tc.triton("dplr"), config)()
    assert traffic.outside == 0
    size = {name: tc.size(x) for name, x in zip(DPLR.names(direction), inputs.tensors)}
    q, v, g, initial = (size[name] for name in ("q", "v", "log_decay", "initial_state"))
    C, chunks = config["chunk"], length // config["chunk"] * 2
    P, S = chunks * C * (C - 1) // 2 * 4, chunks * 64 * 64 * 4
    # q, k, a and b have the same size, and y and dy have that of v
    least = 2 * q + g + P + tc.size(*found)
    if direction == "forward":
        return traffic.moved, least + 4 * q + v + g + P + initial
    least += 3 * q + v + g + P + initial + S
    least += 3 * q + v + g + P + size["dfinal_state"] + S
    return traffic.moved, least + 4 * q + 2 * v + g + P + 2 * S


@pytest.mark.parametrize("direction", LIMITS)
def test_what_chunks_move(direction: str) -> None:
    (more, more_least), (one, one_least) = (moved(direction, length) for length in (32, 16))
    times = (more - one) / (more_least - one_least)
    assert 1 < times <= LIMITS[direction], times
