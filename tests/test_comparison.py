"""What a candidate is compared on: two lengths, and the ends of sequences that are too long for the loop."""

from __future__ import annotations

import re
import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels import comparison
from kernels.catalogue import OPS
from kernels.comparison import Comparison, expected_last, from_nothing, last_rows, paddable, padded, shortened, tailed
from kernels.hgru import OP as HGRU
from kernels.op import Backend, Op
from kernels.problem import Problem
from kernels.scan import OP as SCAN
from kernels.scan import naive
from mixers.commands import probe

CPU = torch.device("cpu")
RECURRENT = [op for op in OPS.values() if paddable(op)]


def posed(op: Op, direction: str, length: int, kind: str = "plain", dtype: torch.dtype = torch.float32) -> Problem:
    facts = dict(probe.kinds(op))[kind]
    return probe.problem(op, direction, dtype, CPU, length, facts)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("op", RECURRENT, ids=lambda op: op.name)
def test_a_sequence_that_begins_with_nothing_ends_as_its_last_rows_alone(
    op: Op, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "SHORTEST", 13)
    problems = {kind: posed(op, direction, 45, kind) for kind, _ in probe.kinds(op)}
    if op is HGRU:
        # which make of 0 what is not 0
        for activation in ("sigmoid", "positive"):
            options = {**problems["plain"].options, "activation": activation}
            problems[activation] = replace(problems["plain"], options=options)
    for kind, problem in problems.items():
        rows = from_nothing(op, shortened(problem, 13))
        whole = padded(rows, problem)
        options = [problem.options[name] for name in op.options]
        more = [*options, *[0] * (direction == "backward"), "auto"]
        assert op.problem_of(direction, [*whole.tensors, whole.cu_seqlens, *more]) == problem
        expected = expected_last(rows)
        assert expected.difference(last_rows(whole, whole.loop())) is None, kind
        # what is compared is there: a state that came through the rows, or gradients of all of them
        assert sum(tensor is not None for tensor in expected.exact) >= 2


def planted(monkeypatch: pytest.MonkeyPatch, first_wrong_row: int) -> Backend:
    """The loop, wrong from some row on, as one that counts in too few bits."""
    module = types.ModuleType("planted_short")

    def forward(*args: Any, **options: Any) -> Any:
        h, final_state = naive.forward(*args, **options)
        h[:, first_wrong_row:] = 1
        return h, final_state

    module.forward = forward  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return Backend("short", module.__name__)


@pytest.mark.parametrize(("length", "where"), [(101, " in the last 101 of 700 rows"), (700, "")])
def test_at_the_full_length_too(length: int, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = Comparison(SCAN, posed(SCAN, "forward", 700), length=length)
    reference = compared.reference()

    def difference(backend: Backend) -> str | None:
        run, others = compared.prepare(backend, {})
        return compared.agree(run(), others, reference)

    assert difference(SCAN.backends[0]) is None
    wrong = difference(planted(monkeypatch, 650))
    assert wrong is not None
    assert wrong.startswith("h is off by")
    assert re.fullmatch(rf"h is off by \S+ (at its worst|on average), allowed \S+{re.escape(where)}", wrong)


def test_every_check_has_a_tail() -> None:
    assert [tailed(n) for n in (0, 1, 2, 36, 37, 64, 100, 101, 228, 229, 300, 5000)] == [
        *(0, 1, 2, 36, 37, 37, 37, 101, 165, 229, 293, 293)
    ]
    # 16 divides 512 and no row would be left over; 293 leaves 5
    compared = Comparison(SCAN, posed(SCAN, "forward", 512), length=512)
    assert compared.short is not None
    assert compared.short.problem.sizes["T"] == 293
    assert Comparison(SCAN, posed(SCAN, "forward", 1), length=1).short is None
