"""The Triton gated norm's values, gradients and bytes in the interpreter. See test_gated_norm.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton_cases as tc

from kernels.agreement import Inputs
from kernels.gated_norm import OP

pytestmark = pytest.mark.usefixtures("nan_filled")

BACKEND = OP.backend("triton")
CONFIG = {"numbers": 2, "warps": 1, "CT": 8, "num_stages": 2}
FACTS = {
    "size": ((1, 1), (2, 3), (8, 2), (17, 2), (33, 1), (130, 1)),
    "length": (1, 3, 9),
    "dtypes": tc.DTYPES,
    "activation": ("identity", "silu", "sigmoid"),
    "center": (False, True),
    "gate_first": (False, True),
    "gate": (False, True, True),
    "weight": (False, True),
    "bias": (False, True),
}
CASES = tc.cases(FACTS, 16)


def posed(
    direction: str, size: tuple[int, int] = (12, 2), length: int = 9, dtypes: Any = tc.DTYPES[1], **facts: Any
) -> Inputs:
    """size: of a head, and how many; dtypes: of parameters and of rows."""
    sizes = {"B": 2, "T": length, "H": size[1], "V": size[0]}
    return tc.posed(OP, direction, sizes, dtype=dtypes[1], decay_dtype=dtypes[0], **facts)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_problems_of_every_kind(case: dict[str, Any], direction: str) -> None:
    tc.agrees(posed(direction, **case), CONFIG)


@pytest.mark.parametrize("dtype", [tc.FLOAT32, tc.BFLOAT16], ids=str)
@pytest.mark.parametrize("heads", [1, 2])
def test_every_byte_is_moved_once(heads: int, dtype: torch.dtype) -> None:
    """With the default configs; 300 rows are no multiple of a program's."""
    for direction, launches in (("forward", 1), ("backward", 2)):
        inputs = posed(direction, (64, heads), 150, (tc.FLOAT32, dtype), bias=False)
        tc.check_bytes(inputs, max(BACKEND.configs(inputs.problem), key=lambda c: c.get("CT", 0)), launches)


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
    tc.check_any_order(posed("backward"), CONFIG)


def test_what_it_cannot_do() -> None:
    for facts, reason in (
        ({"size": (4097, 1), "length": 1}, "heads of 4097 numbers; at most 4096 in torch.float32"),
        ({"activation": "gelu"}, "no kernel for activation 'gelu'"),
    ):
        assert BACKEND.cannot(posed("forward", **facts).problem) == [reason]  # type: ignore[arg-type]
