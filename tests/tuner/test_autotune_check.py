"""What is checked before anything is timed: nothing wrong is ever chosen, and what is wrong is on record."""

from __future__ import annotations

import math
import weakref
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from workshop import EXPECTED, Workshop, offered, planted

import autotune
from autotune import Key
from autotune import check as check_module
from autotune.check import Prepared, checksums, same_bits
from autotune.search import Candidate, search


@pytest.mark.parametrize("name", planted())
def test_a_bad_candidate_is_recorded_with_a_reason_and_never_chosen(
    name: str, shop: Workshop, make_key: Callable[..., Key]
) -> None:
    make, status, reason = planted()[name]
    candidates = [shop.candidate("naive", 5.0), shop.candidate("bad", 0.01, make), shop.candidate("native", 1.0)]
    records = {record.backend: record for record in shop.search(make_key(), candidates)}
    assert records["bad"].status == status
    assert reason in records["bad"].message
    assert {records["naive"].status, records["native"].status} == {"ok"}
    for length in (1024, 64):
        choice = autotune.choose(make_key(length=length), offered(candidates), "src")
        assert choice is not None
        assert choice.backend == "native"
        assert autotune.choose(make_key(length=length), [("bad", {})], "src") is None
    assert [r.backend for r in autotune.refused(make_key(), "src")] == ["bad"]


def test_preparing_may_fail(shop: Workshop, make_key: Callable[..., Key]) -> None:
    def prepare() -> Any:
        raise OSError("no compiler")

    (record,) = shop.search(make_key(), [Candidate("native", {}, prepare)])
    assert (record.status, record.message) == ("error", "OSError: no compiler")


def test_other_results_are_compared_and_let_go(shop: Workshop, make_key: Callable[..., Key]) -> None:
    kept: list[bool] = []

    def candidate(backend: str, value: float) -> Candidate:
        def prepare() -> Prepared:
            others = torch.full((3,), value)
            there = weakref.ref(others)

            def call() -> Any:
                shop.now += 1.0
                kept.append(there() is not None)
                return EXPECTED, None

            return Prepared(call, others)

        return Candidate(backend, {}, prepare)

    def agree(_: Any, others: Tensor, __: Any) -> str | None:
        return None if bool((others == 1).all()) else f"others are {others[0]:g}"

    candidates = [candidate("right", 1.0), candidate("bad", 2.0)]
    options = {"source": "src", "seconds": 1000.0, "rounds": 3, "clock": shop.clock}
    records = search(make_key(), candidates, lambda: (EXPECTED, None), agree, **options)
    assert [(r.backend, r.status, r.message) for r in records] == [
        ("bad", "wrong", "others are 2"),
        ("right", "ok", ""),
    ]
    # one call of the bad one, the first of the right one, and the rest
    assert kept == [True, True, False, False, False, False]


def test_bits_are_watched_at_any_offset() -> None:
    whole = torch.arange(9, dtype=torch.int16)
    for tensor in (whole, whole[1:], whole[:-1].view(2, 4).T, whole[:0]):
        before = checksums({"y": (tensor, None)})
        assert before == checksums({"y": (tensor.clone(), None)})
        if tensor.numel():
            tensor[-1] += 1
            assert before != checksums({"y": (tensor, None)})


Pair = namedtuple("Pair", "y state")


def test_bits_are_compared_in_every_structure() -> None:
    nan, zero = torch.tensor([math.nan]), torch.tensor(0.0)
    a = {"y": [torch.ones(2, 3).T, nan], "n": None, "f": math.nan, "p": Pair(zero, torch.ones(0))}
    assert same_bits(a, check_module._copy(a))
    assert isinstance(check_module._copy(a)["p"], Pair)
    complex_ = torch.tensor([1 + 2j])
    assert same_bits(complex_.conj(), torch.tensor([1 - 2j]))
    for other in (-zero, torch.zeros(1), zero.double(), None, 0.0, torch.tensor(1.0)):
        assert not same_bits(zero, other)
    assert not same_bits((zero,), (zero, zero))
    assert not same_bits({"a": 1}, {"b": 1})
    assert not same_bits(0.0, -0.0)
    assert not same_bits(1, True)
