"""Python that every call of an op goes through, written for the op's own tensors as one would by hand.

Loops over a few tensors, the lists and tuples they make, and what picks from them would cost as much as the kernel of
a small problem: not so much for what they do as for how many different places of the interpreter it is done in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import autotune

# What plans depend on beside the tensors. Found once: a name in another module costs as much as the answer.
_STATE = {
    "generation": autotune.generation,
    "threads": torch.get_num_threads,
    "deterministic": torch._C._get_deterministic_algorithms,
    "autocast": torch._C._is_any_autocast_enabled,
}


def signature(tensors: Sequence[tuple[str, bool]]) -> Callable[..., tuple[tuple[Any, ...], bool]]:
    """A function of a call's way, an op's tensors and a tuple of what follows them: all that a plan depends on, and
    whether a tensor requires a gradient.

    tensors: names, and which may be None. For a, maybe b:

        def signature(way, a, b, rest):
            return (
                way, rest, generation(), threads(), deterministic(), autocast(),
                type(a), a.shape, a.dtype, a.is_cpu or a.device,
                None if b is None else (type(b), b.shape, b.dtype, b.is_cpu or b.device),
            ), a.requires_grad or b is not None and b.requires_grad
    """
    parts = ["way", "rest", *(f"{name}()" for name in _STATE)]
    requires_grad = []
    for t, optional in tensors:
        facts = f"type({t}), {t}.shape, {t}.dtype, {t}.is_cpu or {t}.device"
        parts.append(f"None if {t} is None else ({facts})" if optional else facts)
        requires_grad.append(f"{t} is not None and {t}.requires_grad" if optional else f"{t}.requires_grad")
    names = ", ".join(t for t, _ in tensors)
    return _written(
        f"def signature(way, {names}, rest):",
        f"return ({', '.join(parts)}), {' or '.join(requires_grad)}",
    )


def forward(
    tensors: Sequence[tuple[str, bool]], outputs: Sequence[str], kept: Sequence[str], constant: Sequence[str]
) -> Callable[..., tuple[Any, ...]]:
    """The forward of an op's autograd.Function, of what runs it and of the tensors up to the last that is there.

    tensors: names, and which are there; kept: what is saved; constant: outputs without a gradient. For scan(a, x):

        def forward(ctx, run, a, x):
            h, final_state, = run(a, x, None, None)
            ctx.to_save = a, h,
            ctx.materialize_grads = False
            return h, final_state,
    """
    given = max(i for i, (_, there) in enumerate(tensors, 1) if there)
    return _written(
        f"def forward(ctx, run, {', '.join(name for name, _ in tensors[:given])}):",
        f"{', '.join(outputs)}, = run({', '.join(name if there else 'None' for name, there in tensors)})",
        # what save_for_backward, set_materialize_grads and mark_non_differentiable set: each would be one more call
        f"ctx.to_save = {', '.join(kept)},",
        "ctx.materialize_grads = False",
        *([f"ctx.non_differentiable = {', '.join(constant)},"] if constant else []),
        f"return {', '.join(outputs)},",
    )


def _written(head: str, *body: str) -> Callable[..., Any]:
    names = dict(_STATE)
    exec("\n    ".join((head, *body)), names)
    return names[head.removeprefix("def ").partition("(")[0]]
