"""A call with gradients is a good citizen of autograd: what it saves, its hooks, and the way around the dispatcher."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from kernels.backend import with_options
from kernels.scan import naive, scan

# initial_state and cu_seqlens, each there or None
OPTIONAL = [(state, packed) for state in (False, True) for packed in (False, True)]


def inputs(state: bool = True, packed: bool = False) -> tuple[list[Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 7, 3), (1, 7, 3), *([(2 if packed else 1, 3)] if state else [])]
    tensors = [torch.rand(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]
    return tensors, {"cu_seqlens": torch.tensor([0, 3, 7])} if packed else {}


def gradients(tensors: Sequence[Tensor], *outputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum((t.sin().sum() for t in outputs), torch.zeros(())), tensors)


class Watching(TorchDispatchMode):
    """Sends calls through the dispatcher, and counts them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "sequence_mixers" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("state", "packed"), OPTIONAL)
def test_what_is_saved_passes_the_hooks(state: bool, packed: bool) -> None:
    """The residuals that are tensors and cu_seqlens, nothing else; backward takes what the hooks give it."""
    tensors, options = inputs(state, packed)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        saved.append(tensor.detach().clone())
        return len(saved) - 1

    def unpack(place: int) -> Tensor:
        return 2 * saved[place] if saved[place].is_floating_point() else saved[place]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        h, final = scan(*tensors, **options)
    kept = [tensors[0], h, *tensors[2:], *options.values()]
    assert len(saved) == len(kept)
    for ours, theirs in zip(saved, kept):
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=0)
    ones = torch.ones_like(h), torch.ones_like(final)
    found = torch.autograd.grad([h, final], tensors, ones)
    doubled_a, doubled_h, *doubled_state = (2 * t.detach() for t in (tensors[0], h, *tensors[2:]))
    others = doubled_state[0] if state else None, options.get("cu_seqlens")
    expected = naive.backward(*ones, doubled_a, doubled_h, *others, reverse=False, needs=(True, True, state))
    torch.testing.assert_close(found, tuple(g for g in expected if g is not None))


@pytest.mark.parametrize(("state", "packed"), OPTIONAL)
@pytest.mark.parametrize("which", [[0], [1], [0, 1]])
def test_with_the_dispatcher_as_without(state: bool, packed: bool, which: list[int]) -> None:
    """The loss on the final state alone too."""
    tensors, options = inputs(state, packed)
    outputs = scan(*tensors, **options)
    found = gradients(tensors, *(outputs[i] for i in which))
    with Watching() as watching:
        outputs = scan(*tensors, **options)
        expected = gradients(tensors, *(outputs[i] for i in which))
    assert watching.count == 2
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_only_the_gradients_that_are_wanted() -> None:
    tensors, _ = inputs()
    whole = gradients(tensors, *scan(*tensors))
    for i, expected in enumerate(whole):
        some = [t if i == j else t.detach() for j, t in enumerate(tensors)]
        outputs = scan(*some)
        torch.testing.assert_close(gradients([some[i]], *outputs), (expected,), rtol=0, atol=0)


def test_hooks_see_the_gradients() -> None:
    tensors, _ = inputs()
    expected = gradients(tensors, scan(*tensors)[0])
    seen: list[Any] = []
    h, final = scan(*tensors)
    assert h.grad_fn is final.grad_fn
    assert h.grad_fn is not None
    h.register_hook(lambda g: 2 * g)
    h.grad_fn.register_prehook(lambda grads: seen.append(grads))
    h.grad_fn.register_hook(lambda inside, outside: seen.append(inside))
    found = gradients(tensors, h)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, 2 * theirs)
    # no gradient of zeros is made for the output that has none
    assert [g is None for g in seen[0]] == [False, True]
    assert [g for g in seen[1] if g is not None] == list(found)


def test_what_is_changed_in_place_after_it_was_saved_is_an_error() -> None:
    tensors, _ = inputs()
    h, _ = scan(*tensors)
    h.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_saved_tensors_are_freed_by_the_backward_pass() -> None:
    tensors, _ = inputs()
    total = scan(*tensors)[0].sum()
    total.backward()
    with pytest.raises(RuntimeError, match="second time"):
        total.backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_torchs_checkpoint(reentrant: bool) -> None:
    tensors, _ = inputs()
    h, final = checkpoint(scan, *tensors, use_reentrant=reentrant)
    (h.sin().sum() + final.sin().sum()).backward()
    expected = gradients(tensors, *scan(*tensors))
    torch.testing.assert_close([t.grad for t in tensors], list(expected), rtol=0, atol=0)


def test_parameters_are_plain_tensors() -> None:
    tensors, _ = inputs()
    given = [Parameter(t.detach().clone()) for t in tensors]
    torch.testing.assert_close(gradients(given, *scan(*given)), gradients(tensors, *scan(*tensors)), rtol=0, atol=0)


def test_options_become_defaults() -> None:
    def three(a: int, b: int = 2, *, c: int, d: int = 4, e: int) -> list[int]:
        return [a, b, c, d, e]

    def anything(*args: int, **options: int) -> list[Any]:
        return [*args, options]

    assert with_options(three, c=3, e=5)(1) == [1, 2, 3, 4, 5]
    with pytest.raises(TypeError, match="'c' and 'e'"):
        with_options(three, d=0)(1)
    # of options that it does not name itself, and of what is no function, nothing is copied
    assert with_options(anything, c=3)(1) == [1, {"c": 3}]
    assert with_options(partial(three, 1), c=3, e=5)() == [1, 2, 3, 4, 5]
    with pytest.raises(TypeError, match="unexpected keyword argument 'f'"):
        with_options(three, c=3, e=5, f=6)(1)
