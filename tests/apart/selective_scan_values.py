"""The selective scan's Triton kernels, values and gradients in the interpreter. See test_selective_scan_triton.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton_cases as tc
from triton.runtime.interpreter import ScanOps
from triton_interpreter import counting

from kernels.agreement import Inputs
from kernels.selective_scan import OP

pytestmark = pytest.mark.usefixtures("nan_filled", "rows_at_once")


def scan(self: Any, given: list[Any]) -> list[Any]:
    """The interpreter's loop over all numbers of a tile, with whole rows."""
    found = [np.moveaxis(np.copy(x.handle.data), self.axis, 0) for x in given]
    for i in range(1, len(found[0])):
        pairs = [*((x[i - 1], t) for x, t in zip(found, given)), *((x[i], t) for x, t in zip(found, given))]
        for x, row in zip(found, self.combine_fn.fn(*(self.to_tensor(x, t.dtype) for x, t in pairs))):
            x[i] = row.handle.data
    return [self.to_tensor(np.moveaxis(x, 0, self.axis), t.dtype) for x, t in zip(found, given)]


@pytest.fixture
def rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScanOps, "generic_scan", scan)


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


@pytest.mark.parametrize("channels, keys", [(33, 16), (65, 33)])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_default_config(direction: str, channels: int, keys: int) -> None:
    """With one block of channels and with two."""
    config = OP.backend("triton").configs(posed(direction, keys=keys).problem)[0]
    tc.agrees(posed(direction, length=config["rows"] + 3, channels=channels, keys=keys), config)


@pytest.mark.parametrize("missing", ["dy", "dfinal_state"])
def test_a_loss_on_one_output(missing: str) -> None:
    tc.agrees(tc.without(posed("backward", packed=True), missing))


def test_only_the_gradients_that_are_needed() -> None:
    tc.check_needs(posed("backward", length=2), sums=("B", "C"))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_steps_from_none_to_those_that_forget_all(direction: str) -> None:
    inputs = posed(direction, length=11, keys=8)
    given = dict(zip(OP.names(direction), inputs.tensors))
    delta = given["delta"]
    assert delta is not None
    given["delta"] = torch.tensor([0.0, 1e-3, 1.0, 1e3])[torch.arange(delta.numel()) % 4].view(delta.shape)
    tc.agrees(replace(inputs, tensors=tuple(given.values())))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_programs_in_any_order_give_the_same_bits(direction: str) -> None:
    tc.check_any_order(posed(direction, packed=True))


# What forward and backward move at most, as times the least, by keys, dtype of x and of the step sizes
LIMITS = {
    (16, tc.BFLOAT16, tc.BFLOAT16): (1.13, 1.24),
    (16, tc.BFLOAT16, tc.FLOAT32): (1.1, 1.19),
    (16, tc.FLOAT32, tc.FLOAT32): (1.13, 1.18),
    (64, tc.BFLOAT16, tc.BFLOAT16): (1.43, 1.43),
    (64, tc.FLOAT32, tc.FLOAT32): (1.43, 1.39),
}


def moved_and_least(inputs: Inputs) -> tuple[int, int]:
    """Bytes, and those that a chunked algorithm has to move: docs/derivations/selective_scan.md."""
    direction, sizes, config = (
        inputs.problem.direction,
        inputs.problem.sizes,
        tc.triton(OP.name).configs(inputs.problem)[0],
    )
    # a scan is on the chip: nothing that is moved depends on what it finds
    with mock.patch.object(ScanOps, "generic_scan", lambda self, given: given), counting() as traffic:
        found = inputs.call(tc.triton(OP.name), config)()
    size = {name: tc.size(x) for name, x in zip(OP.names(direction), inputs.tensors)}
    least = sum(size.values()) + tc.size(*found)
    if direction == "backward":
        states = -(-sizes["T"] // config["rows"]) * sizes["D"] * sizes["K"] * 4
        least += sum(size[name] for name in ("x", "delta", "A", "B")) + 2 * states
    return traffic.moved + traffic.outside, least


@pytest.mark.parametrize("keys, dtype, steps", LIMITS, ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("length", [11, 16])
def test_bytes_moved(length: int, direction: str, keys: int, dtype: torch.dtype, steps: torch.dtype) -> None:
    """In a few rows, and in every 16 further ones, which is what is left of it in the longest sequences."""
    limit = LIMITS[keys, dtype, steps][direction == "backward"]
    facts: dict[str, Any] = {"channels": 256, "keys": keys, "dtype": dtype, "decay_dtype": steps}
    moved, least = moved_and_least(posed(direction, length=length, **facts))
    both, least_of_both = moved_and_least(posed(direction, length=length + 16, **facts))
    assert least <= moved <= limit * least
    assert both - moved <= limit * (least_of_both - least)
