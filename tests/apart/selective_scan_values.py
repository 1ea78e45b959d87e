"""The selective scan's Triton kernels, values and gradients in the interpreter. See test_selective_scan_triton.py."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from triton_interpreter import shuffled

from kernels.agreement import Expected, Inputs, draw, pose
from kernels.op import Backend
from kernels.selective_scan import OP

CPU = torch.device("cpu")
FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
TRITON = Backend("triton", "kernels.selective_scan.triton", devices=("cuda",))
# Four channels to a program for eight keys, a state kept before every fourth row
CONFIG = {"numbers": 1, "num_warps": 1, "rows": 4}
# An empty sequence at either end, two in a row in the middle, one of a single row, some that end with a chunk
PACKED = (0, 0, 3, 3, 3, 4, 8, None, None)


@pytest.fixture(autouse=True)
def _uninitialised_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def posed(
    direction: str, dtype: torch.dtype = FLOAT32, batch: int = 1, length: int = 9, channels: int = 5, keys: int = 5,
    packed: bool = False, **facts: Any,
) -> Inputs:  # fmt: skip
    """A problem with its tensors; packed: cut at PACKED."""
    sizes = {"B": 1 if packed else batch, "T": length, "D": channels, "K": keys}
    if packed:
        sizes["N"] = len(PACKED) - 1
    inputs = draw(OP, pose(OP, direction, sizes, dtype=dtype, device=CPU, packed=packed, **facts), seed=length)
    bounds = sorted(length if b is None else min(b, length) for b in PACKED)
    return replace(inputs, cu_seqlens=torch.tensor(bounds, dtype=torch.int32) if packed else None)


def agrees(inputs: Inputs, config: dict[str, int] = CONFIG) -> None:
    wrong = Expected.of(inputs).difference(inputs.call(TRITON, config)())
    assert wrong is None, f"{wrong} ({inputs.problem})"


FACTS = {
    "length": (1, 4, 5, 11),
    "batch": (1, 2),
    "channels": (1, 4, 9),
    "keys": (1, 5, 8),
    "dtype": (FLOAT64, FLOAT32, FLOAT16, BFLOAT16),
    "decay_dtype": (None, FLOAT32),
    "D": (False, True),
    "packed": (False, True),
    "initial_state": (False, True),
}
CASES = [{name: random.Random(f"{seed} {name}").choice(values) for name, values in FACTS.items()} for seed in range(11)]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_problems_of_every_kind(case: dict[str, Any], direction: str) -> None:
    if case["dtype"] == FLOAT64:
        case = {**case, "decay_dtype": None}
    agrees(posed(direction, **case))


def test_the_cases_have_every_value() -> None:
    for name, values in FACTS.items():
        assert {str(case[name]) for case in CASES} == {str(value) for value in values}


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_default_config(direction: str) -> None:
    config = TRITON.configs(posed(direction).problem)[0]
    agrees(posed(direction, length=config["rows"] + 3, channels=33, keys=16), dict(config))


@pytest.mark.parametrize("missing", ["dy", "dfinal_state"])
def test_a_loss_on_one_output(missing: str) -> None:
    inputs = posed("backward", packed=True)
    tensors = dict(zip(OP.names("backward"), inputs.tensors))
    agrees(replace(inputs, tensors=tuple((tensors | {missing: None}).values())))


def test_only_the_gradients_that_are_needed() -> None:
    inputs = posed("backward", length=2)

    def gradients(needs: tuple[bool, ...]) -> tuple[torch.Tensor | None, ...]:
        return TRITON.function("backward")(*inputs.tensors, None, needs=needs, config=CONFIG)

    every = gradients((True,) * 7)
    for one in range(7):
        needs = tuple(i != one for i in range(7))
        for wanted, gradient, expected in zip(needs, gradients(needs), every):
            assert (gradient is not None) == wanted
            assert gradient is None or (expected is not None and torch.equal(gradient, expected))


def test_programs_in_any_order_give_the_same_bits() -> None:
    for direction in ("forward", "backward"):
        call = posed(direction, packed=True).call(TRITON, CONFIG)
        expected = call()
        with shuffled(0):
            found = call()
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
