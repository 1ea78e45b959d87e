"""FlexAttention on the CPU, where torch's reference of it runs: what is asked of it, and its gradients, are the loop's.

Only what Triton makes of it is left to GPUs, where `mixers doctor` and the tuner compare it.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels import inductor
from kernels.agreement import Expected, draw, pose
from kernels.attention import OP, flex
from kernels.attention.spans import Sight

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = {"B": 2, "T": 21, "S": 34, "H": 4, "G": 2, "K": 8, "V": 20}
PACKED = {"B": 1, "T": 40, "N": 4, "H": 2, "G": 1, "K": 17, "V": 5}
BACKEND = OP.backend("flex")


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torch.compile, and the reference's backward pass, which is there but not offered on the CPU."""
    theirs = importlib.import_module("torch.nn.attention.flex_attention")
    monkeypatch.setattr(theirs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(theirs, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_graph", lambda *kind: flex._attend)


def wrong(direction: str, sizes: dict[str, int], dtype: torch.dtype, hard: bool = False, **facts: Any) -> str | None:
    """What is wrong with flex's outputs or gradients. hard: some decays are zero, some nearly so."""
    inputs = draw(OP, pose(OP, direction, sizes, dtype=dtype, device=CPU, **facts))
    if hard:
        names = OP.names(direction)
        known = dict(zip(names, inputs.tensors))
        known["log_decay"][:, 5::9, 0], known["log_decay"][:, 7::8, 1] = -torch.inf, -1e4
        if direction == "backward":
            given = [known[arg.name] for arg in OP.inputs]
            options = [inputs.problem.options[name] for name in OP.options]
            known["y"], known["lse"] = OP(*given, inputs.cu_seqlens, *options, "naive")
        inputs = replace(inputs, tensors=tuple(known[name] for name in names))
    return Expected.of(inputs).difference(inputs.call(BACKEND, {})())


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_agrees_with_the_loop(eager: None, direction: str, dtype: torch.dtype) -> None:
    ragged = {"starts": True, "ends": True}
    for sizes, facts in (
        (SIZES, {"window": 5}),
        (SIZES, {"window": 5, "causal": False}),
        (SIZES, ragged),
        (SIZES, {"log_decay": True}),
        (SIZES, {"log_decay": True, "hard": True, "window": 11, **ragged}),
        # more queries than keys: the first ones see nothing
        (SIZES | {"S": 9}, {"window": 4}),
        (SIZES | {"S": 9}, {"window": 4, "causal": False}),
        (SIZES | {"S": 16}, {"log_decay": True, "hard": True}),
        (PACKED, {"packed": True}),
        (PACKED, {"packed": True, "causal": False, "window": 3}),
        (PACKED, {"packed": True, "log_decay": True, "hard": True}),
        (PACKED | {"S": 64}, {"packed": True, "log_decay": True, **ragged}),
    ):
        assert wrong(direction, sizes, dtype, **facts) is None, (sizes, facts)


def test_a_finite_logarithm_of_almost_nothing_is_a_decay_of_zero(eager: None) -> None:
    inputs = draw(OP, pose(OP, "forward", SIZES, dtype=FLOAT32, device=CPU, log_decay=True))
    log_decay = inputs.tensors[5]
    assert log_decay is not None
    found = []
    for value in (-3e38, -torch.inf):
        log_decay[:, 3::7] = value
        found.append(inputs.call(BACKEND, {})()[0])
    assert found[0].isfinite().all()
    assert torch.equal(*found)


def test_gradients_only_where_they_are_needed(eager: None) -> None:
    inputs = draw(OP, pose(OP, "backward", SIZES, dtype=BFLOAT16, device=CPU, log_decay=True))
    run = inputs.call(BACKEND, {})
    assert [g is not None for g in run()] == [True, True, True, False, False, True]
    needs = (False, True, False, False, False, False)
    dq, dk, *others = run(needs=needs)
    assert dq is None
    assert dk.shape == (2, 34, 2, 8)
    assert not any(g is not None for g in others)


def test_the_sums_that_the_bias_is_made_of_cancel() -> None:
    """Far from the first row they are ten thousand times what lies between neighbours."""
    log_decay = -torch.rand(1, 30000, 1)
    sight = Sight.of(torch.empty(1, 30000, 1, 1), torch.empty(1, 30000, 1, 1), None, None, None, causal=True, window=0)
    of_high, of_low, to_high, to_low, _ = (x[0, 0] for x in flex._sums(log_decay, sight))
    between = (of_high[1:] - to_high[:-1]) + (of_low[1:] - to_low[:-1])
    assert torch.allclose(between, log_decay[0, 1:, 0], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({}, "serves a window, log_decay, packed sequences or starts and ends; there is none of them"),
        ({"window": 4, "dtype": torch.float64}, "FlexAttention has no float64"),
        ({"log_decay": True, "causal": False}, "log_decay needs causal attention"),
        ({"window": 4, "T": 1}, "serves more than one query; T is 1"),
        ({"window": 4, "device": CPU}, "runs on cuda, the tensors are on cpu"),
        ({"window": 4}, None),
        ({"log_decay": True}, None),
        ({"ends": True}, None),
    ],
)
def test_cannot(monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], reason: str | None) -> None:
    given = {"dtype": BFLOAT16, "device": CUDA, **facts}
    monkeypatch.setattr(inductor, "reason", lambda device: None)
    problem = pose(OP, "forward", SIZES | {"T": given.pop("T", 21)}, **given)
    assert BACKEND.cannot(problem) == ([] if reason is None else [reason])
    # the last is what runs unmeasured
    able = [backend.name for backend, _ in OP.candidates(problem)]
    assert "flex" not in able[-1:]
    assert ("flex" in able) == (reason is None)


def test_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "reason", lambda device: "triton is not installed")
    problem = pose(OP, "forward", SIZES, dtype=BFLOAT16, device=CUDA, window=4)
    assert BACKEND.cannot(problem) == ["triton is not installed"]
