"""What right means: tensors that pose a problem, and how far a result may be from the loop in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.agreement import Expected, Inputs, draw, pose
from kernels.catalogue import OPS
from kernels.problem import Problem
from kernels.scan import OP as SCAN

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def problem(direction: str = "forward", dtype: torch.dtype = torch.float32, **facts: Any) -> Problem:
    sizes = {"T": 9, "D": 5, **({"B": 1, "N": 3} if facts.get("packed") else {"B": 2})}
    return pose(SCAN, direction, sizes, dtype=dtype, device=CPU, **facts)


@pytest.mark.parametrize("facts", [{}, {"pairs": True}, {"packed": True}, {"reverse": True}, {"initial_state": False}])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_drawn_tensors_pose_the_problem(direction: str, facts: dict[str, Any]) -> None:
    for dtype, decay in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        posed = problem(direction, dtype, decay_dtype=decay, **facts)
        inputs = draw(SCAN, posed)
        options = [posed.options[name] for name in SCAN.options]
        again = SCAN.problem_of(
            direction, [*inputs.tensors, inputs.cu_seqlens, *options, *[7] * (direction == "backward"), "auto"]
        )
        assert again == posed
        assert Expected.of(inputs).difference(inputs.call(SCAN.backends[0], {})()) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_error_of_eight_ulp_is_refused_and_one_of_one_is_not(dtype: torch.dtype) -> None:
    inputs = draw(SCAN, problem(dtype=dtype))
    expected = Expected.of(inputs)
    h, final = inputs.loop()
    assert h is not None
    largest = h.abs().argmax()
    ulp = torch.finfo(dtype).eps * h.view(-1)[largest]
    for count, accepted in ((1, True), (-1, True), (8, False), (-8, False)):
        off = h.clone()
        off.view(-1)[largest] += count * ulp
        assert (expected.difference((off, final)) is None) == accepted


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bias_is_refused_although_each_error_alone_would_pass(dtype: torch.dtype) -> None:
    expected = Expected.of(inputs := draw(SCAN, problem(dtype=dtype)))
    h, final = inputs.loop()
    assert h is not None
    bias = 2 * torch.finfo(dtype).eps * h.abs().max()
    one = h.clone()
    one.view(-1)[h.abs().argmin()] += bias
    assert expected.difference((one, final)) is None
    assert "on average" in str(expected.difference((h + bias, final)))


def test_the_loops_error_in_few_numbers_says_less_of_its_error_in_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of dq, dk and dv, of 100, 100 and 4 numbers, the loop errs in one of the last: by 1e-3, on average 5e-4."""

    def loop(inputs: Inputs) -> tuple[Tensor | None, ...]:
        dq, dk, dv = (torch.ones(1, 1, 1, size, dtype=inputs.dtype) for size in (100, 100, 4))
        dv[..., 0] += 1e-3 if inputs.dtype == torch.float32 else 0.0
        return dq, dk, dv, None, None, None

    sizes = {"B": 1, "T": 1, "H": 1, "K": 100, "V": 4, "J": 100}
    inputs = draw(OPS["gla"], pose(OPS["gla"], "backward", sizes, dtype=torch.float32, device=CPU))
    monkeypatch.setattr(Inputs, "loop", loop)
    expected, (dq, dk, dv, *others) = Expected.of(inputs), loop(inputs)
    assert dq is not None
    assert dv is not None
    # 4 (1 + 1 / √4) 5e-4 are allowed
    assert expected.difference((dq + 2.9e-3, dk, dv, *others)) is None
    assert str(expected.difference((dq + 3.1e-3, dk, dv, *others))).startswith("dq is off by 0.0031 on average")
    wrong = expected.difference((dq, dk, torch.ones_like(dv) + 3.1e-3, *others))
    assert str(wrong).startswith("dv is off by 0.0031 on average")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_state_of_one_number_is_refused(dtype: torch.dtype) -> None:
    posed = pose(SCAN, "forward", {"B": 1, "T": 9, "D": 1}, dtype=dtype, device=CPU)
    expected = Expected.of(inputs := draw(SCAN, posed))
    h, final = inputs.loop()
    assert final is not None
    for off, accepted in ((1, True), (-1, True), (30, False), (-30, False)):
        wrong = expected.difference((h, final * (1 + off * torch.finfo(final.dtype).eps)))
        assert (wrong is None) == accepted, wrong
