"""Training with less memory: behind its projections, a mixer keeps nothing but the states between chunks of time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# rows of a chunk at least: a state is small beside so many, and one call more beside their work
CHUNK = 1024
# chunks at most: the gradients of parameters are sums over them, rounded to the parameters' dtype
CHUNKS = 16
# rows of a chunk at least for each packed sequence, each of which has a state
CHUNK_OF_A_SEQUENCE = 16

Mixed = tuple[Tensor, dict[str, Tensor] | None]


def in_chunks(
    mix: Callable[..., Mixed], rows: Sequence[Tensor], state: dict[str, Tensor] | None, cu_seqlens: Tensor | None
) -> Mixed:
    """`mix(rows, state, cu_seqlens)`, which keeps `rows` [B, T, ...] and the state before each chunk for its gradient.

    The backward pass makes what else it needs again, chunk by chunk, from the last to the first; then only one chunk's
    is in memory. A mixer without a state (it looks both ways) is one chunk, and so is everything that torch.compile
    and torch.export trace, whose graphs serve all lengths.
    """
    if not torch.is_grad_enabled():
        return mix(rows, state, cu_seqlens)
    length = rows[0].shape[1]
    if state is None or torch.compiler.is_compiling():
        return _checkpointed(mix, rows, state, cu_seqlens)
    sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunk = max(CHUNK, -(-length // CHUNKS), CHUNK_OF_A_SEQUENCE * sequences)
    if length <= chunk:
        return _checkpointed(mix, rows, state, cu_seqlens)
    outputs = []
    for start, part in zip(range(0, length, chunk), zip(*(row.split(chunk, 1) for row in rows))):
        inside = _inside(cu_seqlens, start, part[0].shape[1], length)
        y, state = _checkpointed(mix, part, state, inside)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def _checkpointed(
    mix: Callable[..., Mixed], rows: Sequence[Tensor], state: dict[str, Tensor] | None, cu_seqlens: Tensor | None
) -> Mixed:
    # tensors by position: those are what is kept as the graph keeps tensors, and not by reference
    names = () if state is None else tuple(state)

    def run(cu_seqlens: Tensor | None, *tensors: Tensor) -> Any:
        given = None if state is None else dict(zip(names, tensors[len(rows) :]))
        return mix(tensors[: len(rows)], given, cu_seqlens)

    states = () if state is None else tuple(state.values())
    return checkpoint(run, cu_seqlens, *rows, *states, use_reentrant=False, preserve_rng_state=False)


def _inside(cu_seqlens: Tensor | None, start: int, rows: int, length: int) -> Tensor | None:
    """The borders of packed sequences as rows of a chunk see them; sequences elsewhere are empty."""
    if cu_seqlens is None:
        return None
    # borders before the first row and after the last stay where they are: they are wrong, and the op says so
    least, most = (0 if start else None), (rows if start + rows < length else None)
    return (cu_seqlens - start).clamp(least, most)
