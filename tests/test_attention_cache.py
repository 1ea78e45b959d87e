"""The cache of keys and values: rows that are added, and packed rows that are moved to the end."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from kernels.attention import attention
from kernels.attention.cache import align, append, recent

pytestmark = pytest.mark.usefixtures("nan_filled")


def test_append_leaves_older_caches_alone() -> None:
    rows = [torch.randn(2, n, 3, 4) for n in (5, 1, 2, 1, 1)]
    with torch.no_grad():
        caches = list(itertools.accumulate(rows, append))
        expected = list(itertools.accumulate(rows, lambda a, b: torch.cat([a, b], 1)))
        other = append(caches[2], -rows[3])
        shorter = append(caches[3][:, :6], -rows[1])
        fewer = append(caches[4][:1], rows[1][:1])
    assert all(torch.equal(found, right) for found, right in zip(caches, expected))
    assert torch.equal(other, torch.cat([expected[2], -rows[3]], 1))
    assert torch.equal(shorter, torch.cat([expected[3][:, :6], -rows[1]], 1))
    assert torch.equal(fewer, torch.cat([expected[4][:1], rows[1][:1]], 1))
    # the longest grew in place, the two that went other ways did not
    assert caches[1].data_ptr() == caches[2].data_ptr() == caches[4].data_ptr()
    assert len({x.data_ptr() for x in (caches[4], other, shorter, fewer)}) == 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_append_copies_seldom(mode: Any) -> None:
    with mode():
        cache, places = torch.zeros(3, 0, 2, 4), set()
        for t in range(300):
            cache = recent(append(cache, torch.full((3, 1, 2, 4), float(t))), 20)
            places.add(cache.untyped_storage().data_ptr())
        assert cache[:, :, 0, 0].tolist() == [[float(t) for t in range(280, 300)]] * 3
    assert len(places) < 20


def test_append_keeps_gradients() -> None:
    cache, rows = torch.randn(2, 3, 1, 2, requires_grad=True), torch.randn(2, 1, 1, 2, requires_grad=True)
    weights = torch.randn(2, 4, 1, 2)
    found = torch.autograd.grad((append(cache, rows) * weights).sum(), (cache, rows))
    assert torch.equal(torch.cat(found, 1), weights)


@pytest.mark.parametrize("lengths", [(3, 0, 5, 1), (0, 0), (0, 4)])
def test_align_moves_every_sequence_to_the_end(lengths: tuple[int, ...]) -> None:
    N = len(lengths)
    cache, rows = torch.randn(N, 7, 2, 3, requires_grad=True), torch.randn(1, max(sum(lengths), 1), 2, 3)
    start, end = torch.tensor([2, 0, 4, 1][:N]), torch.tensor([6, 0, 7, 2][:N])
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    (found,), first = align((cache,), start, end, (rows,), cu_seqlens)
    for n, (begin, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        right = torch.cat([cache[n, start[n] : end[n]], rows[0, begin:stop]])
        assert torch.equal(found[n, first[n] :], right)
        assert not found[n, : first[n]].any()
    (gradient,) = torch.autograd.grad(found.sum(), cache)
    assert gradient[0, 2:6].eq(1).all()
    assert gradient.sum() == (end - start).sum() * 6


def test_cached_rows_that_are_not_the_sequences_do_not_count() -> None:
    k, v = torch.randn(2, 12, 2, 4), torch.randn(2, 12, 2, 4)
    q, starts, ends = torch.randn(2, 1, 4, 4), torch.tensor([0, 5]), torch.tensor([7, 12])
    before = attention(q, k, v, starts, ends)
    k[0, 7:], v[0, 7:], k[1, :5], v[1, :5] = 1e4, 1e4, -1e4, -1e4
    assert torch.equal(attention(q, k, v, starts, ends), before)
