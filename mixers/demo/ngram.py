"""Yardsticks for a model of text, in bits per character: n-gram models, which count, and xz, which compresses."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mixers.demo.text import Corpus


@dataclass(frozen=True)
class Yardsticks:
    """Bits per character on the held-out part, by counting and by compression.

    ngram: context length -> bits of the interpolated n-gram model with that many characters of context.
    xz_alone: the held-out part compressed by itself.
    xz_continued: what the held-out part adds to the compressed training part.
    """

    ngram: dict[int, float]
    xz_alone: float
    xz_continued: float

    @property
    def best_context(self) -> int:
        """The context length of the best n-gram model; the shortest where several are equal."""
        return min(self.ngram, key=lambda context: (self.ngram[context], context))

    @property
    def best_ngram(self) -> float:
        """Bits per character of the best n-gram model."""
        return self.ngram[self.best_context]


def yardsticks(corpus: Corpus, *, context: int = 6) -> Yardsticks:
    """Every yardstick for a corpus: n-gram models of context 1 to `context`, and xz."""
    bits = NGram(corpus.train, corpus.size, context=context).bits_per_character(corpus.held_out)
    alone, continued = xz_bits_per_character(corpus.train_text, corpus.held_out_text)
    return Yardsticks(dict(enumerate(bits[1:], start=1)), alone, continued)


@dataclass(frozen=True)
class _Order:
    """The counts of one context length k: C contexts seen in training, G pairs of a context and the id after it."""

    # sorted keys; a context is found here and its place is its number  # [C]
    contexts: Tensor
    # n(h), how often each context was followed by anything, and t(h), by how many different ids  # [C]
    totals: Tensor
    types: Tensor
    # sorted keys and n(h, c)  # [G]
    pairs: Tensor
    counts: Tensor


class NGram:
    """Interpolated n-gram models of context 0 to `context` with Witten-Bell smoothing.

    Source: Witten and Bell 1991, the zero-frequency problem; interpolated as in Chen and Goodman 1998.

        p[k](c | h) = (n(h, c) + t(h) p[k-1](c | h')) / (n(h) + t(h))

    h is the last k ids and h' the last k-1; n counts occurrences in training, t(h) the different ids seen after h.
    A context that training never saw leaves p[k-1] as it is. p[-1] is uniform over the `size` ids.

    ids: int tensor [T], the training part, each in 0..size-1, with T > context.
    Raises ValueError for any other shape, value or length.
    """

    def __init__(self, ids: Tensor, size: int, *, context: int = 6) -> None:
        if context < 0:
            raise ValueError(f"ngram: context must be at least 0, got {context}")
        ids = _checked(ids, size)
        if len(ids) <= context:
            raise ValueError(f"ngram: {len(ids)} training ids are too few for a context of {context}")
        self.size = size
        self.context = context
        # the last ids of training come before the first held-out id
        self._tail = ids[len(ids) - context :]
        self._orders: list[_Order] = []
        # contexts are numbered by extending them to the left, so that keys stay small for any vocabulary and context
        numbers, keys = torch.zeros_like(ids), torch.zeros(1, dtype=torch.int64)
        for k in range(context + 1):
            if k:
                # position t of `numbers` is id t + k of training; one position fewer has k ids before it  # [T - k]
                keys, numbers = torch.unique(ids[: len(ids) - k] * len(keys) + numbers[1:], return_inverse=True)
            pairs, counts = torch.unique(numbers * size + ids[k:], return_counts=True)
            totals = torch.bincount(numbers, minlength=len(keys))
            types = torch.bincount(pairs // size, minlength=len(keys))
            self._orders.append(_Order(keys, totals, types, pairs, counts))

    def probabilities(self, contexts: Tensor, targets: Tensor) -> Tensor:
        """p[k](target | last k ids of the context) for k = 0..context.

        contexts: int64 [N, context], oldest id first; targets: int64 [N]. Returns float64 [context + 1, N].
        """
        probability = torch.full(targets.shape, 1 / self.size, dtype=torch.float64)
        number, known = torch.zeros_like(targets), torch.ones_like(targets, dtype=torch.bool)
        rows = []
        for k, order in enumerate(self._orders):
            if k:
                shorter = len(self._orders[k - 1].contexts)
                number, found = _find(order.contexts, contexts[:, self.context - k] * shorter + number)
                known = known & found
            pair, seen = _find(order.pairs, number * self.size + targets)
            count = order.counts[pair] * seen
            total, types = order.totals[number], order.types[number]
            probability = torch.where(known, (count + types * probability) / (total + types), probability)
            rows.append(probability)
        return torch.stack(rows)

    def bits_per_character(self, held_out: Tensor) -> list[float]:
        """Mean bits per id of the text that follows training, int [T]: one figure per context length 0..context."""
        held_out = _checked(held_out, self.size)
        if not len(held_out):
            raise ValueError("ngram: the held-out part is empty")
        # [T, context + 1]: every id behind its context
        windows = torch.cat([self._tail, held_out]).unfold(0, self.context + 1, 1)
        probabilities = self.probabilities(windows[:, :-1], windows[:, -1].contiguous())
        return [float(bits) for bits in -probabilities.log2().mean(dim=1)]


def xz_bits_per_character(train: str, held_out: str) -> tuple[float, float]:
    """Bits that xz (preset 9, extreme) spends on a character of the held-out text: alone, and continued from training.

    Continued is the compressed size of both less that of the training text. Sizes are of whole .xz files of UTF-8.
    """
    if not held_out:
        raise ValueError("xz: the held-out part is empty")
    alone = _xz_bytes(held_out)
    continued = _xz_bytes(train + held_out) - _xz_bytes(train)
    return 8 * alone / len(held_out), 8 * continued / len(held_out)


def _xz_bytes(text: str) -> int:
    compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    size = sum(len(compressor.compress(piece)) for piece in _pieces(text.encode("utf-8", "surrogatepass")))
    return size + len(compressor.flush())


def _pieces(data: bytes) -> Iterator[bytes]:
    # piece by piece so that Ctrl-C is heard during a long text
    for start in range(0, len(data), 1 << 18):
        yield data[start : start + (1 << 18)]


def _find(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where each wanted key stands in the sorted keys (any valid place if it is absent), and whether it is there."""
    place = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
    return place, keys[place] == wanted


def _checked(ids: Tensor, size: int) -> Tensor:
    if ids.dim() != 1:
        raise ValueError(f"ngram: ids must have one axis, got shape {list(ids.shape)}")
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise ValueError(f"ngram: ids must be in 0..{size - 1}, got {int(ids.min())} to {int(ids.max())}")
    return ids.to("cpu", torch.int64)
