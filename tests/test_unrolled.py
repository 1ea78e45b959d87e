"""The Python written for an op's tensors does what a loop over them would do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from kernels import unrolled

TENSORS = [("a", False), ("b", True), ("c", True)]
A, B = torch.zeros(2, 3), torch.zeros(4)


@pytest.mark.parametrize(
    "other",
    [
        ("other", A, B, None, (1,)),
        ("way", A, B, None, (2,)),
        ("way", A.T, B, None, (1,)),
        ("way", A.double(), B, None, (1,)),
        ("way", Parameter(A), B, None, (1,)),
        ("way", A.to("meta"), B, None, (1,)),
        ("way", A, None, None, (1,)),
        ("way", A, None, B, (1,)),
        ("way", A, B.double(), None, (1,)),
        ("way", A, B, B, (1,)),
    ],
)
def test_a_signature_is_of_all_that_a_plan_depends_on(other: tuple[Any, ...]) -> None:
    signature = unrolled.signature(TENSORS)
    of = signature("way", A, B, None, (1,))
    assert of == signature("way", A + 1, B + 1, None, (1,))
    assert of != signature(*other)


@pytest.mark.parametrize(
    "change", [torch.set_num_threads, torch.use_deterministic_algorithms, torch.set_autocast_enabled]
)
def test_a_signature_is_of_what_is_set(change: Any) -> None:
    signature = unrolled.signature(TENSORS)
    before, threads = signature("way", A, B, None, ()), torch.get_num_threads()
    set_to, reset = (threads + 1, threads) if change is torch.set_num_threads else (True, False)
    change(set_to)
    try:
        assert signature("way", A, B, None, ()) != before
    finally:
        change(reset)
    assert signature("way", A, B, None, ()) == before


@pytest.mark.parametrize("which", [[], [0], [1], [2], [0, 2]])
def test_a_signature_tells_whether_any_tensor_requires_a_gradient(which: list[int]) -> None:
    tensors = [A.clone().requires_grad_(i in which) for i in range(3)]
    assert unrolled.signature(TENSORS)("way", *tensors, ())[1] == bool(which)
    assert not unrolled.signature(TENSORS)("way", A, None, None, ())[1]


@pytest.mark.parametrize("there", [(True, True, True), (True, False, True), (True, True, False), (True, False, False)])
@pytest.mark.parametrize("constant", [[], ["z"]])
def test_a_forward_passes_saves_and_returns(there: tuple[bool, ...], constant: list[str]) -> None:
    met: list[Any] = []

    def run(*tensors: Tensor | None) -> list[Tensor]:
        met.extend(tensors)
        return [A, B]

    names, tensors = "abc", [torch.zeros(i) for i in range(3)]
    kept = [name for name, tensor in zip(names, there) if tensor]
    forward = unrolled.forward([*zip(names, there)], ["y", "z"], [*kept, "y"], constant)
    ctx, given = SimpleNamespace(), [t if tensor else None for t, tensor in zip(tensors, there)]
    while given[-1] is None:
        given.pop()
    y, z = forward(ctx, run, *given)
    assert y is A
    assert z is B
    assert [id(t) for t in met] == [id(t if tensor else None) for t, tensor in zip(tensors, there)]
    assert [id(t) for t in ctx.to_save] == [*(id(t) for t, tensor in zip(tensors, there) if tensor), id(A)]
    assert ctx.materialize_grads is False
    assert [id(t) for t in getattr(ctx, "non_differentiable", ())] == [id(B) for _ in constant]


def test_a_single_output_stays_a_tuple() -> None:
    assert unrolled.forward([("a", True)], ["y"], ["y"], [])(SimpleNamespace(), lambda a: [a], A) == (A,)
