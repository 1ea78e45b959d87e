"""States are trees of tensors (tuples and dicts) whose first axis is the batch: copy, reorder, cut loose, move.

A state is never changed in place by a mixer, so keeping a reference is a snapshot; `clone` is for those who do write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

State: TypeAlias = "Tensor | tuple[State, ...] | dict[str, State] | None"


def apply(function: Callable[[Tensor], Any], state: State) -> Any:
    """The same tree with function(tensor) in place of every tensor."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, tuple):
        return tuple(apply(function, part) for part in state)
    if isinstance(state, dict):
        return {name: apply(function, part) for name, part in state.items()}
    if state is None:
        return None
    raise TypeError(f"state: a {type(state).__name__} is no part of a state; states are tuples and dicts of tensors")


def leaves(state: State) -> list[Tensor]:
    """Every tensor of the tree, in order."""
    found: list[Tensor] = []
    # of most states this loop is all: one call more for every tensor is felt where a token is decoded
    for part in state.values() if type(state) is dict else (state,):
        if type(part) is Tensor:
            found.append(part)
        else:
            apply(found.append, part)
    return found


def parts(state: State) -> Mapping[Any, Any]:
    """What the tree's root holds, by name or by place."""
    if type(state) is dict:
        return state
    return dict(enumerate(state)) if isinstance(state, tuple) else {0: state}


# Of each part the first axis from which on sizes are known, these, and whether its dtype is a floating-point one. The
# axis is behind the batch, and behind one that is empty at the start and grows. None for a tree within the tree.
Layout: TypeAlias = "dict[Any, tuple[int, tuple[int, ...], bool] | None]"


def layout_of(initial: State) -> Layout:
    """What the states of a mixer have in common with its initial one."""
    layout: Layout = {}
    for name, part in parts(initial).items():
        layout[name] = None
        if isinstance(part, Tensor):
            first = max([1, *(axis + 1 for axis, size in enumerate(part.shape) if size == 0)])
            layout[name] = first, tuple(part.shape[first:]), part.is_floating_point()
    return layout


def clone(state: State) -> Any:
    """A copy that shares no memory."""
    return apply(torch.clone, state)


def select(state: State, index: Tensor) -> Any:
    """The rows `index` [M] of the batch, in that order, repeats allowed: beam search, reordering, dropping rows."""
    return apply(lambda tensor: tensor.index_select(0, index.to(tensor.device)), state)


def detach(state: State) -> Any:
    """Cut loose from the graph: truncated backpropagation through time."""
    return apply(torch.detach, state)


def to(state: State, device: torch.device | str) -> Any:
    """On another device; dtypes stay, for states keep more precision than activations."""
    return apply(lambda tensor: tensor.to(device), state)
