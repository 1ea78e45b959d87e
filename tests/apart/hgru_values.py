"""The values, gradients and bytes of HGRN's recurrence in Triton, in the interpreter. See test_hgru_triton.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
import triton_cases as tc
from torch import Tensor
from triton_interpreter import counting

from kernels.agreement import Inputs
from kernels.hgru import OP
from kernels.hgru import triton as backend
from kernels.hgru.triton_gates import cos_and_sin

pytestmark = pytest.mark.usefixtures("nan_filled")

CARRIED = {"BT": 2, "num_warps": 1, "num_stages": 3}
SPLIT = {**CARRIED, "split": 4}


def posed(direction: str, batch: int = 2, length: int = 9, width: int = 3, hard: bool = False, **facts: Any) -> Inputs:
    """A problem with its tensors; hard: saturated gates, a bound of 0 and one near 1."""
    inputs = tc.posed(OP, direction, {"B": batch, "T": length, "D": width}, **facts)
    if hard:
        tensors = dict(zip(OP.names(direction), inputs.tensors))
        f, bound = tensors["f"], tensors["lower_bound"]
        assert f is not None
        f[:, ::3] *= 1000
        if bound is not None:
            bound[0], bound[-1] = 0, 1 - 2**-20
    return inputs


FACTS = {
    "length": (1, 2, 5, 9, 11),
    "width": (1, 2, 3, 33),
    "dtype": (tc.FLOAT64, tc.FLOAT32, tc.FLOAT16, tc.BFLOAT16),
    "activation": ("silu", "identity", "tanh", "sigmoid", "positive"),
    # pairs, turned or not
    "turned": (None, None, False, True),
    "packed": (False, True),
    "hard": (False, True),
    "lower_bound": (False, True),
    "initial_state": (False, True),
    "reverse": (False, True),
    "config": (CARRIED, SPLIT),
}
CASES = tc.cases(FACTS, 9)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_problems_of_every_kind(case: dict[str, Any], direction: str) -> None:
    case = dict(case)
    turned, config = case.pop("turned"), case.pop("config")
    tc.agrees(posed(direction, pairs=turned is not None, theta=bool(turned), **case), config)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_shipped_config(direction: str) -> None:
    configs = backend.configs(replace(posed(direction).problem, sizes={"B": 1, "T": 300, "D": 8, "N": 1}))
    assert [config.get("split", 0) for config in configs] == [0, 0, 0, 64, 256]
    for config in configs[:4]:
        length = max(config.get("split", 0), config["BT"]) + 3
        tc.agrees(posed(direction, 1, length, dtype=tc.BFLOAT16, pairs=True, theta=True), config)


@pytest.mark.parametrize("missing", ["dh", "dfinal_state"])
def test_a_loss_on_one_output(missing: str) -> None:
    alone = tc.without(posed("backward", packed=True, length=11), missing)
    tc.agrees(alone, CARRIED)
    tc.agrees(alone, SPLIT)


def test_only_the_gradients_that_are_needed() -> None:
    inputs = posed("backward", length=3, batch=1, pairs=True, theta=True)

    def gradients(needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
        return backend.backward(*inputs.tensors, None, activation="silu", reverse=False, needs=needs, config=CARRIED)

    every = gradients((True,) * 5)
    alone = [tuple(i == one for i in range(5)) for one in range(5)]
    for needs in [(True, True, False, False, False), *alone]:
        with counting() as traffic:
            found = gradients(needs)
        assert traffic.launches == 1 + (needs[2] or needs[3])
        for wanted, gradient, expected in zip(needs, found, every):
            assert (gradient is not None) == wanted
            assert gradient is None or (expected is not None and torch.equal(gradient, expected))


@pytest.mark.parametrize(
    "dtype, pairs, split",
    [(tc.FLOAT32, False, 0), (tc.BFLOAT16, True, 0), (tc.BFLOAT16, False, 64), (tc.FLOAT32, True, 64)],
    ids=str,
)
def test_bytes_moved(dtype: torch.dtype, pairs: bool, split: int) -> None:
    facts = {"dtype": dtype, "batch": 1, "length": 70 if split else 45, "width": 8, "pairs": pairs, "theta": pairs}
    config = {"BT": 8, "num_warps": 1, "num_stages": 3, "split": split}
    limit, launches = (1.75, 3) if split else (1.05, 1)
    tc.check_bytes(posed("forward", **facts), config, launches, limit)
    # and one that adds the parameters' gradients
    tc.check_bytes(posed("backward", **facts), config, launches + 1, limit)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("config", [CARRIED, SPLIT], ids=["carried", "split"])
def test_programs_in_any_order_give_the_same_bits(config: dict[str, int], direction: str) -> None:
    tc.check_any_order(posed(direction, packed=True, pairs=True, theta=True), config)


@triton.jit
def _cos_and_sin(angles, cos, sin, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x, y = cos_and_sin(tl.load(angles + i))
    tl.store(cos + i, x)
    tl.store(sin + i, y)


@pytest.mark.parametrize("most", [1.0, 100.0, 1e6])
def test_angles_of_any_size(most: float) -> None:
    angles = torch.linspace(-most, most, 1024, dtype=tc.FLOAT64)
    cos, sin = torch.empty_like(angles), torch.empty_like(angles)
    _cos_and_sin[(1,)](angles, cos, sin, SIZE=1024)
    torch.testing.assert_close(cos, angles.cos(), rtol=0, atol=2.3e-16)
    torch.testing.assert_close(sin, angles.sin(), rtol=0, atol=2.3e-16)
