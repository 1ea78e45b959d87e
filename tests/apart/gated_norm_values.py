"""The Triton gated norm's values, gradients and bytes in the interpreter. See test_gated_norm.py."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_interpreter import counting, shuffled

from kernels.agreement import Expected, Inputs, draw, pose
from kernels.gated_norm import OP

CPU = torch.device("cpu")
FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
BACKEND = OP.backend("triton")
CONFIG = {"numbers": 2, "warps": 1, "CT": 8}
FACTS = {
    "size": ((1, 1), (2, 3), (8, 2), (17, 2), (33, 1), (130, 1)),
    "length": (1, 3, 9),
    "dtypes": [(d, d) for d in (FLOAT64, FLOAT32, FLOAT16, BFLOAT16)] + [(FLOAT32, FLOAT16), (FLOAT32, BFLOAT16)],
    "activation": ("identity", "silu", "sigmoid"),
    "center": (False, True),
    "gate_first": (False, True),
    "gate": (False, True, True),
    "weight": (False, True),
    "bias": (False, True),
}
CASES = [{name: random.Random(f"{seed} {name}").choice(values) for name, values in FACTS.items()} for seed in range(16)]


@pytest.fixture(autouse=True)
def _uninitialised_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def posed(
    direction: str, size: tuple[int, int] = (12, 2), length: int = 9, dtypes: Any = (FLOAT32, FLOAT32), **facts: Any
) -> Inputs:
    """size: of a head, and how many; dtypes: of parameters and of rows."""
    sizes = {"B": 2, "T": length, "H": size[1], "V": size[0]}
    return draw(OP, pose(OP, direction, sizes, dtype=dtypes[1], device=CPU, decay_dtype=dtypes[0], **facts))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_problems_of_every_kind(case: dict[str, Any], direction: str) -> None:
    inputs = posed(direction, **case)
    wrong = Expected.of(inputs).difference(inputs.call(BACKEND, CONFIG)())
    assert wrong is None, f"{wrong} ({inputs.problem})"


def test_the_cases_have_every_value() -> None:
    for name, values in FACTS.items():
        assert {str(case[name]) for case in CASES} == {str(value) for value in values}


def size(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("heads", [1, 2])
def test_every_byte_is_moved_once(heads: int, dtype: torch.dtype) -> None:
    """With the default configs; 300 rows are no multiple of a program's."""
    for direction, launches in (("forward", 1), ("backward", 2)):
        inputs = posed(direction, (64, heads), 150, (FLOAT32, dtype), bias=False)
        config = max(BACKEND.configs(inputs.problem), key=lambda config: config.get("CT", 0))
        with counting() as traffic:
            found = inputs.call(BACKEND, config)()
        assert traffic.launches == launches
        least = size(*inputs.tensors, *found)
        assert 0.97 * least <= traffic.moved <= 1.05 * least, config


def test_layouts_and_needs() -> None:
    inputs = posed("backward", (24, 2))
    run: Any = inputs.call(BACKEND, CONFIG)
    expected = run()
    for layout in (lambda t: torch.cat([t, t], 2)[:, :, :2], lambda t: t.transpose(2, 3).contiguous().transpose(2, 3)):
        given = [layout(t) if t is not None and t.ndim == 4 else t for t in inputs.tensors]
        for needs in ((True,) * 4, (False, True, False, True), (True, False, False, False)):
            found = run.func(*given, None, **{**run.keywords, "needs": needs})
            for needed, gradient, right in zip(needs, found, expected):
                assert torch.equal(gradient, right) if needed else gradient is None


def test_programs_in_any_order_give_the_same_bits() -> None:
    call = posed("backward").call(BACKEND, CONFIG)
    expected = call()
    with shuffled(1):
        assert all(torch.equal(f, e) for f, e in zip(call(), expected))


def test_what_it_cannot_do() -> None:
    for facts, reason in (
        ({"size": (4097, 1), "length": 1}, "heads of 4097 numbers; at most 4096 in torch.float32"),
        ({"activation": "gelu"}, "no kernel for activation 'gelu'"),
    ):
        assert BACKEND.cannot(posed("forward", **facts).problem) == [reason]  # type: ignore[arg-type]
