"""flash-linear-attention's kernels as candidates of ours. Those that run them are in apart/fla_gate.py."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from kernels import foreign
from kernels.agreement import pose
from kernels.catalogue import OPS
from kernels.problem import Problem
from kernels.tuning import startup
from tests.triton_interpreter import run

INSTALLED = pytest.mark.skipif(not importlib.util.find_spec("fla"), reason="needs flash-linear-attention")
SIZES = {"B": 2, "T": 64, "H": 2, "K": 16, "V": 16, "D": 32, "J": 16, "N": 2}


def posed(
    op: str, direction: str = "forward", device: str = "cuda", dtype: str = "bfloat16", **facts: object
) -> Problem:
    sizes = {**SIZES, **{name: facts.pop(name) for name in list(facts) if name in SIZES}}
    return pose(OPS[op], direction, sizes, dtype=getattr(torch, dtype), device=torch.device(device), **facts)


@INSTALLED
def test_the_gate() -> None:
    assert run("fla_gate.py", "-m", "not long", interpret=True) >= 20


@INSTALLED
@pytest.mark.long
def test_every_kernel() -> None:
    assert run("fla_gate.py", "-m", "long", interpret=True) >= 20


@pytest.mark.parametrize("op", ["hgru", "gla", "delta_rule"])
def test_what_they_cannot_do(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = OPS[op].backend("fla")
    assert backend.foreign
    assert backend.cannot(posed(op, device="cpu")) == ["runs on cuda, the tensors are on cpu"]
    monkeypatch.setattr(foreign, "installed", lambda: "0.6.0")
    assert backend.cannot(posed(op)) == []
    assert backend.cannot(posed(op, dtype="float64")) == ["computes in float32, the tensors are float64"]
    assert all(config["version"] == "0.6.0" for config in backend.configs(posed(op)))
    assert all(startup(backend, posed(op), config) >= 40 for config in backend.configs(posed(op)))
    monkeypatch.setattr(foreign, "installed", lambda: None)
    assert backend.cannot(posed(op)) == ["fla-core is not installed"]


def test_what_some_of_them_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "installed", lambda: "0.6.0")

    def kernels(op: str, direction: str = "forward", **facts: object) -> list[str]:
        problem = posed(op, direction, **facts)
        assert OPS[op].backend("fla").cannot(problem) == []
        return [config["kernel"] for config in OPS[op].backend("fla").configs(problem)]

    assert kernels("gla", J=1) == ["chunk_simple_gla", "fused_recurrent_simple_gla"]
    assert kernels("gla", "backward") == ["chunk_gla", "fused_recurrent_gla"]
    assert kernels("hgru", B=1, packed=True) == ["fused_recurrent_hgrn"]
    assert kernels("delta_rule", dtype="float32", log_decay=False) == ["fused_recurrent_delta_rule"]
    assert kernels("delta_rule", log_decay=False) == ["fused_recurrent_delta_rule", "chunk_delta_rule"]
    assert kernels("delta_rule", "backward") == ["chunk_kda"]
    reason = OPS["delta_rule"].backend("fla").cannot(posed("delta_rule", "backward", K=300, J=300))[0]
    assert "chunk_kda: axis K is 300; at most 256" in reason
    assert "fused_recurrent_kda: has no backward pass" in reason
    assert OPS["gla"].backend("fla").cannot(posed("gla", bonus=True)) == ["takes no bonus"]
    assert OPS["hgru"].backend("fla").cannot(posed("hgru", reverse=True)) == ["time runs forwards"]
