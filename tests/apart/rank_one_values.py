"""The delta rule's and dplr's Triton kernels, values and gradients in the interpreter. See test_rank_one_triton.py."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_interpreter import counting, shuffled

from kernels.agreement import Expected, Inputs, draw, pose
from kernels.catalogue import OPS
from kernels.op import Backend, Op

CPU = torch.device("cpu")
FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
BACKENDS = {name: Backend("triton", f"kernels.{name}.triton", devices=("cuda",)) for name in ("delta_rule", "dplr")}
# Two values to a program for eight keys, a state kept before every fourth row
CONFIG = {"numbers": 1, "num_warps": 1, "rows": 4}
HARD = torch.tensor([-math.inf, math.log(1e-30), math.log(1e-3), math.log(0.5), 0.0], dtype=torch.float64)
# An empty sequence at either end, two in a row in the middle, one of a single row, some that end with a chunk
PACKED = (0, 0, 3, 3, 3, 4, 8, None, None)


@pytest.fixture(autouse=True)
def _uninitialised_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=sorted(BACKENDS))
def op(request: pytest.FixtureRequest) -> Op:
    return OPS[request.param]


def posed(
    op: Op, direction: str, dtype: torch.dtype = FLOAT32, batch: int = 1, length: int = 9, keys: int = 5,
    values: int = 3, per_key: bool = True, packed: bool = False, hard: bool = False, **facts: Any,
) -> Inputs:  # fmt: skip
    """A problem with its tensors; packed: cut at PACKED; hard: with some decays from HARD."""
    sizes = {"B": 1 if packed else batch, "T": length, "H": 2, "K": keys, "V": values, "J": keys if per_key else 1}
    if packed:
        sizes["N"] = len(PACKED) - 1
    inputs = draw(op, pose(op, direction, sizes, dtype=dtype, device=CPU, packed=packed, **facts), seed=length)
    tensors = dict(zip(op.names(direction), inputs.tensors))
    mild = tensors["log_decay"]
    if hard and mild is not None:
        generator = torch.Generator().manual_seed(length)
        chosen = HARD[torch.randint(len(HARD), mild.shape, generator=generator)].to(mild.dtype)
        tensors["log_decay"] = torch.where(torch.rand(mild.shape, generator=generator) < 0.5, chosen, mild)
    bounds = sorted(length if b is None else min(b, length) for b in PACKED)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if packed else None
    return replace(inputs, tensors=tuple(tensors.values()), cu_seqlens=cu_seqlens)


def agrees(inputs: Inputs, config: dict[str, int] = CONFIG) -> None:
    wrong = Expected.of(inputs).difference(inputs.call(BACKENDS[inputs.op.name], config)())
    assert wrong is None, f"{wrong} ({inputs.problem})"


FACTS = {
    "length": (1, 4, 5, 11),
    "batch": (1, 2),
    "keys": (1, 5, 8),
    "values": (1, 2, 5),
    "dtype": (FLOAT64, FLOAT32, FLOAT16, BFLOAT16),
    "per_key": (False, True),
    "log_decay": (True, True, False),
    "hard": (False, True),
    "packed": (False, True),
    "initial_state": (False, True),
}
CASES = [{name: random.Random(f"{seed} {name}").choice(values) for name, values in FACTS.items()} for seed in range(11)]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_problems_of_every_kind(op: Op, case: dict[str, Any], direction: str) -> None:
    agrees(posed(op, direction, **case))


def test_the_cases_have_every_value() -> None:
    for name, values in FACTS.items():
        assert {str(case[name]) for case in CASES} == {str(value) for value in values}


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_default_config(op: Op, direction: str) -> None:
    inputs = posed(op, direction)
    config = BACKENDS[op.name].configs(inputs.problem)[0]
    agrees(posed(op, direction, length=config["rows"] + 3, keys=33, values=9), dict(config))


@pytest.mark.parametrize("missing", ["dy", "dfinal_state"])
def test_a_loss_on_one_output(op: Op, missing: str) -> None:
    inputs = posed(op, "backward", packed=True)
    tensors = dict(zip(op.names("backward"), inputs.tensors))
    agrees(replace(inputs, tensors=tuple((tensors | {missing: None}).values())))


def test_only_the_gradients_that_are_needed(op: Op) -> None:
    inputs, count = posed(op, "backward", length=2), len(op.inputs)

    def gradients(needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        function = BACKENDS[op.name].function("backward")
        return function(*inputs.tensors, None, scale=1.0, needs=needs, config=CONFIG)

    every = gradients((True,) * count)
    for one, needed in itertools.product(range(count), (False, True)):
        needs = tuple((i == one) == needed for i in range(count))
        with counting() as traffic:
            found = gradients(needs)
        assert traffic.launches == 2
        for wanted, gradient, expected in zip(needs, found, every):
            assert (gradient is not None) == wanted
            assert gradient is None or (expected is not None and torch.equal(gradient, expected))


def test_programs_in_any_order_give_the_same_bits(op: Op) -> None:
    for direction in ("forward", "backward"):
        call = posed(op, direction, packed=True).call(BACKENDS[op.name], CONFIG)
        expected = call()
        with shuffled(0):
            found = call()
        for f, e in zip(found, expected):
            assert f is not None
            assert e is not None
            assert torch.equal(f, e)
