"""The values, gradients and bytes of HGRN's recurrence in Triton, in the interpreter. See test_hgru_triton.py."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_interpreter import counting, shuffled

from kernels.agreement import Expected, Inputs, draw, pose
from kernels.hgru import OP
from kernels.hgru import triton as backend
from kernels.hgru.triton_kernels import _turn

CPU = torch.device("cpu")
FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
CARRIED = {"BT": 2, "num_warps": 1, "num_stages": 3}
SPLIT = {**CARRIED, "split": 4}
# An empty sequence at either end, two in a row in the middle, one of a single row, some that end with a chunk
PACKED = (0, 0, 3, 3, 3, 4, 8, None, None)


@pytest.fixture(autouse=True)
def _uninitialised_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def posed(
    direction: str, dtype: torch.dtype = FLOAT32, batch: int = 2, length: int = 9, width: int = 3,
    packed: bool = False, hard: bool = False, **facts: Any,
) -> Inputs:  # fmt: skip
    """A problem with its tensors; packed: cut at PACKED; hard: saturated gates, a bound of 0 and one near 1."""
    sizes = {"B": 1 if packed else batch, "T": length, "D": width}
    if packed:
        sizes["N"] = len(PACKED) - 1
    inputs = draw(OP, pose(OP, direction, sizes, dtype=dtype, device=CPU, packed=packed, **facts), seed=length)
    tensors = dict(zip(OP.names(direction), inputs.tensors))
    if hard:
        f, bound = tensors["f"], tensors["lower_bound"]
        assert f is not None
        f[:, ::3] *= 1000
        if bound is not None:
            bound[0], bound[-1] = 0, 1 - 2**-20
    bounds = sorted(length if b is None else min(b, length) for b in PACKED)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if packed else None
    return replace(inputs, tensors=tuple(tensors.values()), cu_seqlens=cu_seqlens)


def agrees(inputs: Inputs, config: dict[str, int]) -> None:
    wrong = Expected.of(inputs).difference(inputs.call(OP.backend("triton"), config)())
    assert wrong is None, f"{wrong} ({inputs.problem})"


FACTS = {
    "length": (1, 2, 5, 9, 11),
    "width": (1, 2, 3, 33),
    "pairs": (False, True),
    "packed": (False, True),
    "hard": (False, True),
    "lower_bound": (False, True),
    "initial_state": (False, True),
    "reverse": (False, True),
}
DTYPES = (FLOAT32, BFLOAT16, FLOAT64, FLOAT16)
ACTIVATIONS = ("silu", "identity", "tanh", "sigmoid", "positive")
CASES = [{name: random.Random(f"{seed} {name}").choice(values) for name, values in FACTS.items()} for seed in range(9)]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("seed", range(len(CASES)))
def test_problems_of_every_kind(seed: int, direction: str) -> None:
    # Half of the pairs are turned
    case = {**CASES[seed], "theta": CASES[seed]["pairs"] and seed % 3 > 0}
    inputs = posed(direction, DTYPES[seed % 4], activation=ACTIVATIONS[seed % 5], **case)
    agrees(inputs, SPLIT if seed % 2 else CARRIED)


def test_the_cases_have_every_value() -> None:
    for name, values in FACTS.items():
        assert {str(case[name]) for case in CASES} == {str(value) for value in values}


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_shipped_config(direction: str) -> None:
    configs = backend.configs(replace(posed(direction).problem, sizes={"B": 1, "T": 300, "D": 8, "N": 1}))
    assert [config.get("split", 0) for config in configs] == [0, 0, 0, 64, 256]
    for config in configs[:4]:
        length = max(config.get("split", 0), config["BT"]) + 3
        agrees(posed(direction, BFLOAT16, batch=1, length=length, pairs=True, theta=True), config)


@pytest.mark.parametrize("missing", ["dh", "dfinal_state"])
def test_a_loss_on_one_output(missing: str) -> None:
    inputs = posed("backward", packed=True, length=11)
    tensors = dict(zip(OP.names("backward"), inputs.tensors))
    alone = replace(inputs, tensors=tuple((tensors | {missing: None}).values()))
    agrees(alone, CARRIED)
    agrees(alone, SPLIT)


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
            if wanted:
                assert gradient is not None
                assert expected is not None
                assert torch.equal(gradient, expected)
            else:
                assert gradient is None


def size(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@pytest.mark.parametrize(
    "dtype, pairs, split", [(FLOAT32, False, 0), (BFLOAT16, True, 0), (BFLOAT16, False, 64)], ids=str
)
def test_bytes_moved(dtype: torch.dtype, pairs: bool, split: int) -> None:
    limit, launches = (1.75, 3) if split else (1.05, 1)
    facts = {"batch": 1, "length": 70 if split else 45, "width": 8, "pairs": pairs, "theta": pairs}
    config = {"BT": 8, "num_warps": 1, "num_stages": 3, "split": split}
    inputs = posed("forward", dtype, **facts)
    with counting() as forward:
        found = inputs.call(OP.backend("triton"), config)()
    least = size(*inputs.tensors, *found)
    assert forward.launches == launches
    assert 0.97 * least <= forward.moved <= limit * least

    inputs = posed("backward", dtype, **facts)
    with counting() as backward:
        found = inputs.call(OP.backend("triton"), config)()
    least = size(*inputs.tensors, *found)
    assert backward.launches == launches + 1
    assert 0.97 * least <= backward.moved <= limit * least


@pytest.mark.parametrize("config", [CARRIED, SPLIT], ids=["carried", "split"])
def test_programs_in_any_order_give_the_same_bits(config: dict[str, int]) -> None:
    facts = {"packed": True, "length": 9, "pairs": True, "theta": True}
    calls = [posed(direction, **facts).call(OP.backend("triton"), config) for direction in ("forward", "backward")]
    expected = [call() for call in calls]
    for call, right in zip(calls, expected):
        with shuffled(0):
            found = call()
        for f, e in zip(found, right):
            assert f is not None
            assert e is not None
            assert torch.equal(f, e)


@triton.jit
def _cos_and_sin(angles, cos, sin, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x, y = _turn(tl.load(angles + i))
    tl.store(cos + i, x)
    tl.store(sin + i, y)


@pytest.mark.parametrize("most", [1.0, 100.0, 1e6])
def test_angles_of_any_size(most: float) -> None:
    angles = torch.linspace(-most, most, 1024, dtype=FLOAT64)
    cos, sin = torch.empty_like(angles), torch.empty_like(angles)
    _cos_and_sin[(1,)](angles, cos, sin, SIZE=1024)
    torch.testing.assert_close(cos, angles.cos(), rtol=0, atol=2.3e-16)
    torch.testing.assert_close(sin, angles.sin(), rtol=0, atol=2.3e-16)
