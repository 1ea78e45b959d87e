"""Kernels compiled before they are launched: the same ones, side by side, and only where there is a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import autotune
from kernels import ahead, tuning
from kernels.agreement import draw, pose
from kernels.ahead import Candidates, compile_ahead
from kernels.catalogue import OPS
from kernels.problem import Problem

triton = pytest.importorskip("triton")

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SIZES = {"B": 2, "N": 2, "T": 40, "D": 33, "W": 4, "H": 3, "K": 24, "V": 48, "J": 24}
# What tells kernels apart beside the dtype: states, packed sequences, and numbers that the compiler knows
FACTS: dict[str, list[dict[str, Any]]] = {
    "scan": [{"pairs": True, "reverse": True}, {"initial_state": True, "packed": True}],
    "hgru": [{}, {"lower_bound": True, "theta": True, "initial_state": True}],
    "gated_norm": [{"eps": 1e-3}, {"bias": True, "gate": False}],
    "short_conv": [{"activation": "silu", "initial_state": True}, {"packed": True}],
    "gla": [{"scale": 0.3, "initial_state": True}, {"bonus": True, "packed": True}],
    "delta_rule": [{"scale": 0.3}, {"log_decay": True, "initial_state": True}],
    "dplr": [{"scale": 0.3}, {"initial_state": True, "packed": True}],
    "selective_scan": [{}, {"initial_state": True, "D": False}],
}


def sm_90() -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", 90, 32)


def posed(op: str, direction: str, length: int = 40, dtype: torch.dtype = torch.bfloat16, **facts: Any) -> Problem:
    sizes = {**SIZES, "T": length} | ({"B": 1, "N": 3} if facts.get("packed") else {})
    return pose(OPS[op], direction, sizes, dtype=dtype, device=CPU, **facts)


def forget() -> None:
    """What Triton's functions have compiled for a driver that goes."""
    for name, module in list(sys.modules.items()):
        if name.startswith("kernels."):
            for value in list(vars(module).values()):
                if isinstance(value, triton.JITFunction):
                    value.device_caches.clear()


class Loaded(ahead.StandIn):
    """A driver that takes kernels, and runs none of them."""

    utils = property(lambda self: self)

    def launcher_cls(self, *_: Any) -> Any:
        return lambda *_: None

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": 2**20}

    def load_binary(self, *_: Any) -> tuple[None, None, int, int, int]:
        return None, None, 0, 0, 1024


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    driver = Loaded(sm_90())
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    forget()
    yield
    forget()


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


def entries(folder: Path) -> set[str]:
    """Whole ones, by their keys."""
    return {path.parent.name for path in folder.glob("*/__grp__*.json")}


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch, stand_in: None) -> set[str]:
    """Of Triton's cache, by which it looks for what it would compile; nothing is compiled."""
    from triton.compiler import compiler
    from triton.runtime.cache import get_cache_key

    found: set[str] = set()

    class Nothing:
        packed_metadata = function = None

        def launch_metadata(self, *_: Any) -> None:
            pass

        def run(self, *_: Any) -> None:
            pass

    def compile(source: Any, target: Any, options: Any, **_: Any) -> Nothing:
        backend = compiler.make_backend(target)
        found.add(get_cache_key(source, backend, backend.parse_options(dict(options)), env_vars={}))
        return Nothing()

    monkeypatch.setattr(triton.compiler, "compile", compile)
    return found


@pytest.mark.parametrize("op", FACTS)
def test_what_is_compiled_ahead_is_what_a_launch_asks_for(op: str, keys: set[str]) -> None:
    """Launched on drawn tensors, whose addresses Triton looks at."""
    for number, (facts, direction) in enumerate((f, d) for f in FACTS[op] for d in ("forward", "backward")):
        # T = 1: distances of 0; 131: rows after rows at odd addresses, and chunks
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        for length in (131,) if number else (131, 1):
            problem = posed(op, direction, length, dtype, **facts)
            real, backend = replace(problem, device=GPU), OPS[op].backend("triton")
            config = backend.configs(real)[-1 if number % 2 else 0]
            keys.clear()
            draw(OPS[op], problem).call(backend, config)()
            launched = set(keys)
            forget()
            keys.clear()
            for kernel in ahead.launched(ahead.without_memory(OPS[op], real), "triton", config, sm_90()):
                ahead.compile_kernel(kernel)
            forget()
            assert launched
            assert keys == launched, f"{problem} {config}"


class Deadly(Candidates):
    """Ends the process that reads it."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)


def test_processes_fill_the_cache_and_what_fails_is_the_only_loss(cache: Path, stand_in: None) -> None:
    problem = replace(posed("gated_norm", "forward"), device=GPU)
    backend = OPS["gated_norm"].backend("triton")
    config = backend.configs(problem)[0]
    deadly = Deadly(problem, sm_90(), (("triton", config),))
    mixed = Candidates(problem, sm_90(), (("triton", {}), ("no such backend", {}), ("triton", config)))
    told: list[tuple[int, int]] = []
    found = compile_ahead(
        [deadly, mixed], seconds=120, processes=1, progress=lambda done, count: told.append((done, count))
    )
    died, *others = found.errors
    assert "its process died" in died
    assert ["KeyError" in others[0], "no backend 'no such backend'" in others[1]] == [True, True], others
    assert found.done == found.kernels == len(entries(cache)) > 0
    assert told == sorted(told)

    hits = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    try:
        draw(OPS["gated_norm"], replace(problem, device=CPU)).call(backend, config)()
    finally:
        triton.knobs.compilation.listener = None
    assert hits
    assert all(hits), "a launch finds them"
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    for kernel in ahead.launched(ahead.without_memory(OPS["gated_norm"], problem), "triton", config, sm_90()):
        ahead.compile_kernel(kernel)
    assert before == {path: path.stat().st_mtime_ns for path in cache.rglob("*")}


def test_when_time_is_over_nothing_goes_on(cache: Path) -> None:
    problem = replace(posed("gated_norm", "forward"), device=GPU)
    crew = ahead._Crew(1)
    crew.add((-1, 0), Candidates(problem, sm_90(), (("triton", {}),)))
    with crew:
        assert not crew.wait(0)
    assert not crew._processes
    assert not any(thread.is_alive() for thread in crew._threads)


def test_a_cpu_starts_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ahead, "_Crew", None)
    monkeypatch.setattr(ahead, "target_of", None)
    tuning._compile_ahead([posed("scan", "forward")], 100.0, autotune.Store(tmp_path / "rows"), None, False)
    with autotune.pretend("cuda", "card"):
        on_gpu = replace(posed("scan", "forward"), device=GPU)
        tuning._compile_ahead([on_gpu], ahead.LEAST / 2, None, None, False)


def test_what_is_on_record_is_not_compiled_and_defaults_come_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Candidates] = []
    monkeypatch.setattr(ahead, "compile_ahead", lambda work, **_: asked.extend(work))
    monkeypatch.setattr(ahead, "target_of", lambda device: sm_90())
    op, store = OPS["gated_norm"], autotune.Store(tmp_path / "rows")
    problem = replace(posed("gated_norm", "forward"), device=GPU)
    with autotune.pretend("cuda", "card"):
        configs = op.backend("triton").configs(problem)
        record = autotune.Record.made_here(
            op.key(problem), "triton", configs[0], "wrong", "cpu", source=op.source("cuda")
        )
        tuning._compile_ahead([problem], 100.0, store, None, False)
        store.append(record)
        tuning._compile_ahead([problem], 100.0, store, None, False)
        tuning._compile_ahead([problem], 100.0, store, None, True)
    assert [[config for _, config in each.configs] for each in asked] == [configs, configs[1:], configs]
