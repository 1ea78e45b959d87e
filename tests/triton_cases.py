"""Problems for Triton kernels of recurrences with a matrix state, which apart/*_values.py run in the interpreter."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.agreement import Expected, Inputs, draw, pose
from kernels.op import Backend, Op

FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# A tile of 32 numbers to a program, a state kept before every fourth row
CONFIG = {"numbers": 1, "num_warps": 1, "rows": 4}
HARD = torch.tensor([-math.inf, math.log(1e-30), math.log(1e-3), math.log(0.5), 0.0], dtype=torch.float64)
# An empty sequence at either end, two in a row in the middle, one of a single row, some that end with a chunk
PACKED = (0, 0, 3, 3, 3, 4, 8, None, None)


@pytest.fixture(autouse=True)
def uninitialised_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def triton(op: str) -> Backend:
    return Backend("triton", f"kernels.{op}.triton", devices=("cuda",))


def cases(facts: Mapping[str, Sequence[Any]], count: int) -> list[dict[str, Any]]:
    """Random combinations, the same ones each time, in which every value occurs."""
    found = [{name: random.Random(f"{seed} {name}").choice(v) for name, v in facts.items()} for seed in range(count)]
    for name, values in facts.items():
        assert {str(case[name]) for case in found} == {str(value) for value in values}, name
    return found


def posed(
    op: Op, direction: str, sizes: Mapping[str, int], *, dtype: torch.dtype = FLOAT32, packed: bool = False,
    hard: bool = False, **facts: Any,
) -> Inputs:  # fmt: skip
    """A problem with its tensors; packed: one batch, cut at PACKED; hard: half of its log decays are of HARD."""
    length = sizes["T"]
    sizes = {**sizes, "B": 1, "N": len(PACKED) - 1} if packed else sizes
    problem = pose(op, direction, sizes, dtype=dtype, device=torch.device("cpu"), packed=packed, **facts)
    inputs = draw(op, problem, seed=length)
    tensors = dict(zip(op.names(direction), inputs.tensors))
    mild = tensors.get("log_decay")
    if hard and mild is not None:
        generator = torch.Generator().manual_seed(length)
        chosen = HARD[torch.randint(len(HARD), mild.shape, generator=generator)].to(mild.dtype)
        tensors["log_decay"] = torch.where(torch.rand(mild.shape, generator=generator) < 0.5, chosen, mild)
    bounds = sorted(length if b is None else min(b, length) for b in PACKED)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if packed else None
    return replace(inputs, tensors=tuple(tensors.values()), cu_seqlens=cu_seqlens)


def without(inputs: Inputs, name: str) -> Inputs:
    """The same where one of the tensors is None."""
    names = inputs.op.names(inputs.problem.direction)
    return replace(inputs, tensors=tuple(None if n == name else t for n, t in zip(names, inputs.tensors)))


def agrees(inputs: Inputs, config: Mapping[str, int] = CONFIG) -> None:
    wrong = Expected.of(inputs).difference(inputs.call(triton(inputs.op.name), config)())
    assert wrong is None, f"{wrong} ({inputs.problem})"


def check_any_order(inputs: Inputs) -> None:
    """Programs in random order give the same bits."""
    from triton_interpreter import shuffled

    call = inputs.call(triton(inputs.op.name), CONFIG)
    expected = call()
    with shuffled(0):
        found = call()
    for f, e in zip(found, expected, strict=True):
        assert f is not None
        assert e is not None
        assert torch.equal(f, e)


def check_needs(inputs: Inputs, **options: Any) -> None:
    """Only the gradients that are needed come back, with the bits that they have beside all others, in two launches."""
    from triton_interpreter import counting

    count, function = len(inputs.op.inputs), triton(inputs.op.name).function("backward")

    def gradients(needs: tuple[bool, ...]) -> tuple[torch.Tensor | None, ...]:
        return function(*inputs.tensors, None, **options, needs=needs, config=CONFIG)

    every = gradients((True,) * count)
    for one in range(count):
        for needed in (False, True):
            needs = tuple((i == one) == needed for i in range(count))
            with counting() as traffic:
                found = gradients(needs)
            assert traffic.launches == 2
            for wanted, gradient, expected in zip(needs, found, every, strict=True):
                assert (gradient is not None) == wanted
                assert gradient is None or (expected is not None and torch.equal(gradient, expected))
