"""One token of attention that continues a cache, in C++ for CPUs, with what stands around the softmax. See step.cpp.

Rotary positions, the token's rows in the cache and attention over all of them are one call. Where `can_step` says no,
the same is made of attention; why there is such a call is in kernels/lone.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels import jit_cpp
from kernels.attention.cache import place
from kernels.attention.spans import check
from kernels.lone import alone, expect, readable
from kernels.memory import DTYPES, address, columns_together, contiguous, heads
from kernels.registration import plain

# fewer numbers of keys and values than this are there and back before a second thread has woken up
SERIAL_SIZE = 1 << 16
SOURCE = Path(__file__).with_suffix(".cpp")
_function = jit_cpp.functions(SOURCE)


def can_step(
    q: Tensor,
    rows: Sequence[Tensor],
    cached: Sequence[Tensor],
    length: Tensor,
    start: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
) -> bool:
    """For q [B, T, H, K], and what `step` takes beside it."""
    # no other backend is called by the name of "native" here
    if backend != "auto" or not alone(q, cu_seqlens, backend, SOURCE):
        return False
    if not (length.is_cpu and (start is None or start.is_cpu) and plain((length, start))):
        return False
    return readable(q, (*rows[:2], *cached[:2]), (*rows[2:], *cached[2:]))


def step(
    q: Tensor,
    rows: Sequence[Tensor],
    cached: Sequence[Tensor],
    length: Tensor,
    start: Tensor | None = None,
    *,
    window: int | None = None,
    frequency: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """(y [B, 1, H, V] in q's dtype, the caches after it) of one token of each sequence.

    As kernels.attention.attention with a scale of 1 / sqrt(K), over the rows of the caches and the token's own behind
    them, of which the last window - 1 >= 1 are kept (None: all). The caches that go in stay what they were.

    Args:
        q: [B, 1, H, K].
        rows: k [B, 1, G, K], v [B, 1, G, V], and log_decay [B, 1, H] in the state dtype or none.
        cached: keys [B, S, G, K], values [B, S, G, V] and log_decays [B, S, H]; S may be 0.
        length: int64 [B], how many tokens came before.
        start: int64 [B], the first row of each sequence; None for 0.
        frequency: [K // 2] in the state dtype; the halves of q and k are rotated by length times this. None: they are
            not.

    Raises:
        ValueError: a shape or index does not fit. TypeError: an index is not int64.
    """
    (batch, _, H, K), (G, V), S = q.shape, rows[1].shape[2:], cached[0].shape[1]
    expect("attention", k=(rows[0], (batch, 1, G, K)), v=(rows[1], (batch, 1, G, V)))
    expect("attention", keys=(cached[0], (batch, S, G, K)), values=(cached[1], (batch, S, G, V)))
    if H % G:
        raise ValueError(f"attention: axis H is {H} in q, no multiple of the {G} heads (axis G) of k")
    if len(rows) > 2:
        expect("attention", log_decay=(rows[2], (batch, 1, H)), log_decays=(cached[2], (batch, S, H)))
    for name, index in (("start", start), ("length", length)):
        if index is not None:
            expect("attention", **{name: (index, (batch,))})
            if index.dtype != torch.int64:
                raise TypeError(f"attention: {name} is {index.dtype}, expected torch.int64")
    if start is not None:
        check(start, None, S + 1)
    start, length, q = contiguous(start), contiguous(length), columns_together(q)
    y, after = q.new_empty((batch, 1, H, V)), []
    kept = S + 1 if window is None else min(S + 1, window - 1)
    fields: list[int] = []
    # what is made contiguous has to live until the call
    alive: list[Tensor] = []
    for new, old in zip(rows, cached):
        new, old = columns_together(new), columns_together(old)
        room, copy = place(old, 1, kept)
        after.append(room)
        alive += [new, old]
        fields += (*heads(new), *heads(old), *heads(room), copy)
    _function("attention_step", "10qd47q")(
        batch,
        H,
        G,
        K,
        V,
        S,
        DTYPES[q.dtype],
        torch.get_num_threads() if batch * S * G * (K + V) >= SERIAL_SIZE else 1,
        kept,
        S + 1 if window is None else window,
        K**-0.5,
        address(start),
        length.data_ptr(),
        address(frequency),
        *heads(q),
        *fields,
        *[0] * (39 - len(fields)),
        y.data_ptr(),
    )
    return y, after
