"""How laws compare: outputs, states and gradients, each up to a share of its own scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mixers import state
from mixers.checks.case import Case, LawBroken
from mixers.mixer import SequenceMixer


def require(fact: bool, message: str) -> None:
    if not fact:
        raise LawBroken(message)


def equal(what: str, found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    require(found.shape == expected.shape, f"{what} is {list(found.shape)}, expected {list(expected.shape)}")
    if not expected.numel():
        return
    scale = max(expected.detach().abs().max().item(), 1e-3)
    error = (found.detach() - expected.detach()).abs().max().item()
    require(error <= tolerance * scale, f"{what} is off by {error:.3g} where values reach {scale:.3g}")


def equal_states(what: str, mixer: SequenceMixer, found: Any, expected: Any) -> None:
    for one, two in zip(mixer.comparable(found), mixer.comparable(expected)):
        equal(what, one, two)


def probe(tree: Any) -> Tensor:
    """A loss that every number of a state reaches with a weight of its own."""
    total: Any = 0.0
    for leaf in state.leaves(tree):
        if leaf.is_floating_point() and leaf.numel():
            weights = torch.linspace(0.5, 1.5, leaf[0].numel(), dtype=leaf.dtype, device=leaf.device)
            total = total + (leaf * weights.reshape(leaf[0].shape)).sum()
    return total


def compare_with_gradients(what: str, mixer: SequenceMixer, case: Case, x: Tensor, found: Any, expected: Any) -> None:
    equal(f"y {what}", found[0], expected[0])
    weights = case.normal(*expected[0].shape, salt=2)
    losses = [(y * weights).sum() for y in (found[0], expected[0])]
    if mixer.causal:
        equal_states(f"state {what}", mixer, found[1], expected[1])
        losses = [loss + comparable_probe(mixer, after) for loss, (_, after) in zip(losses, (found, expected))]
    compare_gradients(what, mixer, [x], *losses)


def comparable_probe(mixer: SequenceMixer, after: Any) -> Tensor:
    return probe(tuple(mixer.comparable(after)))


def compare_gradients(what: str, mixer: SequenceMixer, inputs: list[Tensor], found: Tensor, expected: Tensor) -> None:
    names = ["x", *[name for name, _ in mixer.named_parameters()]]
    tensors = [*inputs, *mixer.parameters()]
    # a compiled backward runs once only; what is expected may be compared with several times
    ones = torch.autograd.grad(found, tensors, allow_unused=True)
    twos = torch.autograd.grad(expected, tensors, allow_unused=True, retain_graph=True)
    for name, one, two in zip(names, ones, twos):
        require((one is None) == (two is None), f"gradient of {name} {what} is missing on one side")
        if one is not None:
            equal(f"gradient of {name} {what}", one, two, 1e-8)


def layout(tree: Any) -> list[tuple[int, torch.dtype]]:
    """Ranks and dtypes of a state's tensors."""
    return [(tensor.ndim, tensor.dtype) for tensor in state.leaves(tree)]
