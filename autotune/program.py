"""Tuning and explaining a program by running it: the caller's own code path, with its real dtypes.

What a program's problems are, and how they are tuned, is for whoever has the ops to say: an `Engine` registers itself.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

# called with problems done, problems in all, and what comes next
Progress = Callable[[float, int, str], None]


class Engine(Protocol):
    """What the ops offer: to record the problems that are met, to tune them, to say why each runs what it runs."""

    def recording(self) -> AbstractContextManager[Mapping[Any, Any]]: ...

    def tune(
        self,
        problems: Iterable[Any],
        *,
        seconds: float,
        memory: int | None,
        isolate: bool | None,
        progress: Progress,
    ) -> Mapping[Any, Any]: ...

    def explain(self, problem: Any) -> Any: ...

    def release(self) -> None: ...


_engines: list[Engine] = []


def register(engine: Engine) -> None:
    """The ops that `warmup` and `explain` are about; the last one counts."""
    _engines.append(engine)


def warmup(
    fn: Callable[..., Any],
    *inputs: Any,
    lengths: Sequence[int] = (),
    seconds: float = 60.0,
    memory: int | None = None,
    isolate: bool | None = None,
    axis: int = 1,
    progress: Progress | bool = True,
) -> dict[Any, Any]:
    """Runs a program at the lengths that it will meet, and tunes its kernels' problems, the most expensive first.

    The forward pass runs, and the backward pass wherever the outputs have gradients; nothing is left behind of either
    (no .grad, and the random state is as it was), but a module in training mode updates its running statistics. Each
    measurement is saved as it is made: interrupted and called again, it continues. Memory is given back afterwards.

    Args:
        fn: a module, or any function of the inputs.
        inputs: examples. Tensors as long as the first along `axis` are cut or repeated to each length.
        lengths: by default that of the examples.
        seconds: about how long the tuning may take; running the program comes on top.
        memory: bytes that the tensors of a problem that is tuned may take; larger problems are left to the rule.
        isolate: whether candidates that could take this process down, and were not found right on this device before,
            are tried in another process first; by default those of other packages, and on a GPU all kernels.
        axis: of time.
        progress: a bar on stderr, or a function that is called with problems done, problems in all, what comes next.

    Returns:
        The problems, each with its new records.

    Raises:
        ValueError: a length is below 1, or no input is a tensor with that axis. RuntimeError: there are no ops.
    """
    engine, found = _engine("warmup"), {}
    with engine.recording() as met:
        for given in [resized(inputs, length, axis) for length in lengths] or [list(inputs)]:
            _run(fn, given)
    shown = _bar() if progress is True else contextlib.nullcontext(progress or (lambda *_: None))
    try:
        with shown as tell:
            found = dict(engine.tune(list(met), seconds=seconds, memory=memory, isolate=isolate, progress=tell))
    finally:
        engine.release()
    return found


def explain(fn: Callable[..., Any], *inputs: Any) -> list[Any]:
    """Runs a program once and says of each problem that its kernels met what runs, why, and what of the others.

    Returns:
        One explanation a problem; each prints as a few lines.
    """
    engine = _engine("explain")
    with engine.recording() as met:
        _run(fn, inputs)
    return [engine.explain(problem) for problem in met]


def resized(inputs: Sequence[Any], length: int, axis: int = 1) -> list[Any]:
    """The inputs with every tensor that is as long as the first along `axis` cut or repeated to `length`."""
    if length < 1:
        raise ValueError(f"autotune: length is {length}, expected at least 1")
    tensors = [x for x in inputs if isinstance(x, Tensor) and x.ndim > axis]
    if not tensors:
        raise ValueError(f"autotune: no input is a tensor with an axis {axis}; give lengths only for those")
    old = tensors[0].shape[axis]

    def resize(x: Any) -> Any:
        if not any(x is tensor for tensor in tensors) or x.shape[axis] != old:
            return x
        copies = [1] * x.ndim
        copies[axis] = -(-length // old)
        longer = x.detach().repeat(copies).narrow(axis, 0, length)
        return longer.requires_grad_(x.requires_grad)

    return [resize(x) for x in inputs]


def _run(fn: Callable[..., Any], inputs: Sequence[Any]) -> None:
    """Forward and, where there is a graph, backward, without leaving gradients behind."""
    with torch.random.fork_rng():
        outputs = [t for t in _tensors(fn(*inputs)) if t.requires_grad]
        leaves = _leaves(outputs)
        if leaves:
            torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs], allow_unused=True)


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from _tensors(value)


def _leaves(outputs: Iterable[Tensor]) -> list[Tensor]:
    """What `backward` would give a gradient."""
    found, seen, todo = [], set(), [t.grad_fn for t in outputs]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [before for before, _ in node.next_functions]
    return found


def _engine(what: str) -> Engine:
    if not _engines:
        raise RuntimeError(f"autotune.{what}: no ops are registered; import kernels.tuning first")
    return _engines[-1]


@contextlib.contextmanager
def _bar(width: int = 24) -> Iterator[Progress]:
    """A line on stderr that is written over; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return

    def tell(done: float, total: int, what: str) -> None:
        filled = round(width * done / max(total, 1))
        sys.stderr.write(f"\r\x1b[K[{'=' * filled}{' ' * (width - filled)}] {done:.0f}/{total} {what}")
        sys.stderr.flush()

    try:
        yield tell
    finally:
        sys.stderr.write("\r\x1b[K")
