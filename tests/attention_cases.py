"""What the tests of attention share: problems with all options, the definition spelled out, the largest tensor met."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BACKENDS = ("naive", "sdpa")
FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@dataclass
class Case:
    """Tensors and options of one call, and its sequences: (batch row and rows of q, batch row and rows of k)."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    sequences: list[tuple[int, range, int, range]] = field(default_factory=list)

    def to(self, dtype: torch.dtype) -> Case:
        return Case(self.q.to(dtype), self.k.to(dtype), self.v.to(dtype), self.options, self.sequences)


@st.composite
def cases(draw: st.DrawFn, *, sighted: bool = False, longest: int = 40) -> Case:
    """Batches and packed sequences, with and without keys of their own; sighted: every query sees a key."""
    G = draw(st.integers(1, 3), label="G")
    H = G * draw(st.integers(1, 3), label="heads per group")
    K, V = draw(st.sampled_from((1, 3, 8, 16))), draw(st.sampled_from((1, 4, 8, 13)))
    T = draw(st.one_of(st.integers(1, 9), st.integers(1, longest)), label="T")
    packed, own = draw(st.booleans(), label="packed"), draw(st.booleans(), label="starts, ends")
    N = draw(st.integers(1, 4), label="N")
    options: dict[str, Any] = {
        "causal": draw(st.booleans(), label="causal"),
        "window": draw(st.sampled_from((None, None, 1, 2, 7, 16, 100)), label="window"),
    }
    if packed:
        borders = [0, *sorted(draw(st.lists(st.integers(0, T), min_size=N - 1, max_size=N - 1), label="borders")), T]
        options["cu_seqlens"] = torch.tensor(borders, dtype=draw(st.sampled_from((torch.int32, torch.int64))))
        queries = [(0, range(*border)) for border in itertools.pairwise(borders)]
    else:
        queries = [(n, range(T)) for n in range(N)]
    S = T + draw(st.integers(0, 20) if sighted else st.integers(1 - T, 20), label="S - T")
    keys = [(n, range(S)) for n in range(N)]
    if packed and not own:
        S, keys = T, queries
    elif own:
        # all in one row, where packed sequences may share keys, or a row each
        rows = [0] * N if packed and draw(st.booleans(), label="in one row") else list(range(N))
        spans = []
        for _, of in queries:
            start = draw(st.integers(0, S - len(of) if sighted else S))
            spans.append(range(start, draw(st.integers(start + (len(of) if sighted else 0), S))))
        options["starts"], options["ends"] = (torch.tensor([getattr(s, x) for s in spans]) for x in ("start", "stop"))
        keys = list(zip(rows, spans))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000), label="seed"))
    batches = 1 + max(n for n, _ in queries), 1 + max(n for n, _ in keys)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=FLOAT64)
        for shape in ((batches[0], T, H, K), (batches[1], S, G, K), (batches[1], S, G, V))
    )
    return Case(q, k, v, options, [(*of, *to) for of, to in zip(queries, keys)])


def literal(case: Case, scale: float | None = None, log_decay: Tensor | None = None) -> Tensor:
    """Query by query, over the list of the keys that it sees, adding up what lies between."""
    y = case.q.new_zeros(*case.q.shape[:3], case.v.shape[3])
    group = case.q.shape[2] // case.k.shape[2]
    window = case.options["window"] or math.inf
    for b, queries, n, keys in case.sequences:
        for i, t in enumerate(queries):
            position = keys.stop - len(queries) + i
            seen = [s for s in keys if abs(s - position) < window and (s <= position or not case.options["causal"])]
            for h in range(case.q.shape[2]) if seen else ():
                scores = case.k[n, seen, h // group] @ case.q[b, t, h] * (scale or case.q.shape[3] ** -0.5)
                if log_decay is not None:
                    scores = scores + torch.stack([log_decay[n, s + 1 : position + 1, h].sum() for s in seen])
                y[b, t, h] = scores.softmax(0) @ case.v[n, seen, h // group]
    return y


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


class Largest(TorchDispatchMode):
    """The numbers in the largest tensor that anything returned."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result
