"""With --peers: the targets of `python benchmarks/targets.py`, as a table after the sweep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from limits import ROUNDS
from targets import PARTS, Table


class Summary:
    """Prints the table at the end; a target that is missed stands there, and is no failure of the sweep."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.table = Table(self.lines.append)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.section("targets")
        for line in (*self.lines, self.table.verdict()):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def summary(pytestconfig: pytest.Config) -> Summary:
    made = Summary()
    pytestconfig.pluginmanager.register(made)
    return made


@pytest.fixture
def asked(pytestconfig: pytest.Config, device: torch.device, benchmark: Any) -> None:
    if not pytestconfig.getoption("--peers"):
        pytest.skip("--peers has the targets too")
    if device.type != "cpu":
        pytest.skip("the targets are a CPU's")
    if benchmark.disabled:
        pytest.skip("--benchmark-disable: targets are nothing but timings")


@pytest.mark.parametrize("part", PARTS)
def test_targets(part: str, asked: None, summary: Summary, benchmark: Any) -> None:
    """Times for itself. benchmark: without it, pytest-benchmark would leave the test out."""
    benchmark.pedantic(summary.table.measure, args=(part, ROUNDS), rounds=1)
