"""Ops beside other libraries, with --peers: the same numbers, in turns, without states.

Each round of ours is preceded by one of every peer: a call, on a GPU as many as fill a round. Their rows stand beside
ours as backends "peer:...".
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from libraries import CASES, peers_of
from peers import ours, posed, prepared, sampled
from pytest_benchmark.stats import Stats
from sizes import accelerated, sizes_of
from test_ops import described
from timer import about, limits
from timing import budget_of, seconds_of

from autotune.device import synchronizer
from kernels.catalogue import OPS
from mixers.units import seconds


class Rows:
    """The peers' rows, which go into the file that pytest-benchmark saves, and why some have none."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.reasons: dict[str, list[str]] = {}
        self.found: list[str] = []

    def pytest_benchmark_update_json(self, output_json: dict[str, Any]) -> None:
        output_json["benchmarks"] += self.rows

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for line in self.found:
            terminalreporter.write_line(line)
        for reason, where in self.reasons.items():
            terminalreporter.write_line(f"LEFT OUT [{len(where)}] {reason} ({where[0]}{', ...' if where[1:] else ''})")


@pytest.fixture(scope="session")
def rows(pytestconfig: pytest.Config) -> Rows:
    made = Rows()
    pytestconfig.pluginmanager.register(made)
    return made


@pytest.fixture
def full(pytestconfig: pytest.Config, dtype: str, device: torch.device) -> bool:
    if not pytestconfig.getoption("--peers"):
        pytest.skip("--peers times other libraries too")
    full = pytestconfig.getoption("--full")
    if dtype != "float32" and not full and not accelerated(device):
        pytest.skip("beside peers in float32; --full has bfloat16 too")
    return full


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("tokens", [512, 2048, 8192], ids=lambda n: f"T{n}")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_beside_peers(
    case: str, direction: str, tokens: int, dtype: str, full: bool, device: torch.device, rows: Rows,
    benchmark: Any, request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    op = OPS[CASES[case].op]
    sizes = sizes_of(op, tokens, device)
    given = sampled(case, sizes, getattr(torch, dtype), device)
    found: dict[str, Callable[[], object]] = {}
    for peer in peers_of(case, device):
        longest = float("inf") if full else budget_of(device).call
        subject = prepared(peer, given, direction, longest=longest, generate=full)
        if isinstance(subject, str):
            rows.reasons.setdefault(f"{peer.name}: {subject}", []).append(f"{case}, {direction}, T = {tokens}")
        else:
            found[f"peer:{peer.name}"] = subject.run(direction)
    if not found:
        pytest.skip("no peer to stand beside")
    own = ours(case, given).run(direction)
    if benchmark.disabled:
        benchmark.pedantic(seconds_of, args=(own, synchronizer(device)))
        return
    stats = beside(benchmark, own, found, device)
    median = benchmark.stats.stats.median
    ratios = ", ".join(f"{name.partition(':')[2]} {each.median / median:.3g} ×" for name, each in stats.items())
    rows.found.append(f"{case}, {direction}, T = {tokens}, {dtype}: ours {seconds(median)}, {ratios}")

    problems = [posed(case, part, sizes, getattr(torch, dtype), device) for part in direction.split("+")]
    plans = {op.choose(problem).backend.name for problem in problems}
    variant = " ".join([*case.split()[1:], "beside peers"])
    shared = {**described(problems, variant), **about(device), **limits(device, dtype)}
    benchmark.extra_info.update({**shared, "backend": "+".join(sorted(plans)), "chosen": True})
    packages = {f"peer:{peer.name}": peer.package for peer in peers_of(case, device)}
    for name, each in stats.items():
        config = {packages[name]: version(packages[name])}
        info = {**shared, "backend": name, "config": config, "chosen": False}
        rows.rows.append(
            {
                "group": None,
                "name": f"{request.node.name}-{name}",
                "fullname": request.node.nodeid,
                "extra_info": info,
                "stats": each.as_dict(),
            }
        )


def beside(
    benchmark: Any, own: Callable[[], object], others: dict[str, Callable[[], object]], device: torch.device
) -> dict[str, Stats]:
    """Times ours by pytest-benchmark; before each of its rounds, the others, each round beginning with another one."""
    wait, budget = synchronizer(device), budget_of(device)
    runs = {"": own, **others}
    once = {name: seconds_of(run, wait) for name, run in runs.items()}
    # where calls are queued, a round of each is as long as that of a sweep's row
    calls = {name: budget.iterations(once[name]) if wait else 1 for name in runs}
    turns, stats = list(others), {name: Stats() for name in others}

    def round_of_others() -> None:
        turns.append(turns.pop(0))
        for name in turns:
            stats[name].update(seconds_of(others[name], wait, calls[name]))

    rounds = budget.rounds(sum(calls[name] * once[name] for name in runs), budget.beside)
    benchmark.pedantic(seconds_of, args=(own, wait, calls[""]), setup=round_of_others, rounds=rounds)
    # pytest-benchmark takes a round with a setup for one call
    found = benchmark.stats.stats
    found.data[:] = [each / calls[""] for each in found.data]
    return stats
