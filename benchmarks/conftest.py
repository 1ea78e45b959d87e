"""`python -m pytest benchmarks`: sweeps over every op and every mixer, bounded in time and memory.

The results are saved in .benchmarks/; `mixers tables` makes pages of them.
"""

from __future__ import annotations

import gc
import platform
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import machine
import pytest
import torch

import autotune
from autotune.device import synchronizer

# For each row: about so long, at least so many rounds, and none at all where a single call takes longer.
ROW_SECONDS = 0.4
MIN_ROUNDS, MAX_ROUNDS = 3, 40
CALL_SECONDS = 2.0
# Calls shorter than this are timed several at a time.
SAMPLE_SECONDS = 1e-3

LENGTHS = (1, 512, 2048, 8192)
FULL_LENGTHS = (1, 512, 1024, 2048, 4096, 8192, 16384, 32768)
DTYPES = ("float32", "bfloat16")
FULL_DTYPES = ("float32", "bfloat16", "float16", "float64")

START = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sequence-mixers")
    group.addoption("--full", action="store_true", help="every length and dtype, calls of any duration, no time limit")
    group.addoption("--minutes", type=float, default=15.0, help="rows that have not begun by then are left out")
    group.addoption("--peers", action="store_true", help="other libraries beside ours, where they are installed")
    group.addoption("--device", default=None, help="cpu, cuda, ...; by default the accelerator, if there is one")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    if "length" in metafunc.fixturenames:
        metafunc.parametrize("length", FULL_LENGTHS if full else LENGTHS, ids=lambda n: f"T{n}")
    if "dtype_name" in metafunc.fixturenames:
        metafunc.parametrize("dtype_name", FULL_DTYPES if full else DTYPES)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    name = pytestconfig.getoption("--device")
    if name is None and torch.accelerator.is_available():
        name = torch.accelerator.current_accelerator()
    return torch.device(name or "cpu")


@pytest.fixture(autouse=True)
def in_time(pytestconfig: pytest.Config) -> None:
    minutes = pytestconfig.getoption("--minutes")
    if not pytestconfig.getoption("--full") and time.monotonic() - START > 60 * minutes:
        pytest.skip(f"{minutes:g} minutes are over; --minutes gives more, --full as much as it takes")


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """The tensors of one row are gone before the next."""
    yield
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()


@dataclass
class Timer:
    """Times one call and files it with the facts that describe it."""

    benchmark: Any
    device: torch.device
    full: bool

    def __call__(self, run: Callable[[], object], facts: Mapping[str, Any]) -> None:
        wait = synchronizer(self.device) or (lambda: None)

        def synchronized() -> None:
            run()
            wait()

        # the first call compiles what there is to compile
        synchronized()
        start = time.perf_counter()
        synchronized()
        once = time.perf_counter() - start
        if once > CALL_SECONDS and not self.full:
            pytest.skip(f"one call takes {once:.1f} s, more than {CALL_SECONDS} s; --full times it")
        iterations = max(round(SAMPLE_SECONDS / once), 1)
        rounds = min(max(round(ROW_SECONDS / (once * iterations)), MIN_ROUNDS), MAX_ROUNDS)
        self.benchmark.extra_info.update({**facts, **about(self.device), **limits(self.device, facts["dtype"])})
        self.benchmark.pedantic(synchronized, rounds=rounds, iterations=iterations)


@pytest.fixture
def timer(benchmark: Any, device: torch.device, pytestconfig: pytest.Config) -> Timer:
    return Timer(benchmark, device, pytestconfig.getoption("--full"))


def about(device: torch.device) -> dict[str, Any]:
    """Where and with what a row was measured."""
    return {
        "device": autotune.fingerprint(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": str(torch.__version__),
            "triton": _version("triton"),
            "python": platform.python_version(),
            "version": _version("sequence-mixers"),
        },
    }


def limits(device: torch.device, dtype: str) -> dict[str, float]:
    """What the device can do at most, measured once a session."""
    return {
        "limit_bytes_s": machine.bytes_per_second(device),
        "limit_flops_s": machine.flops_per_second(device, getattr(torch, dtype)),
    }


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    # the name of somebody's computer is nobody's business
    machine_info.pop("node", None)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    output_json["command"] = f"python -m pytest {shlex.join(map(str, config.invocation_params.args))}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
