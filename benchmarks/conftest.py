"""`python -m pytest benchmarks`: sweeps over every op and every mixer, bounded in time and memory.

The results are saved in .benchmarks/; `mixers tables` makes pages of them. Rows come in such an order that what is left
out when the time is over are the longest lengths of the slowest backends; `--resume` goes on with those.
"""

from __future__ import annotations

import gc
import os
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from libraries import peers_of
from sizes import ACCELERATED_LAYERS, LAYERS, accelerated, sizes_of
from timer import Timer, about

import mixers
from kernels.agreement import pose
from kernels.catalogue import OPS
from kernels.op import Op
from mixers import tables

LENGTHS = (1, 512, 2048, 8192)
FULL_LENGTHS = (1, 512, 1024, 2048, 4096, 8192, 16384, 32768)
DTYPES = ("float32", "bfloat16")
FULL_DIMS = (256, 512, 1024, 2048)
FULL_DTYPES = ("float32", "bfloat16", "float16", "float64")

WIDTHS = f"{LAYERS[1]} on a CPU, {ACCELERATED_LAYERS[1]} on a GPU"

OVER = "minutes are over"
DIRECTIONS = ("forward", "decode", "forward+backward")


def listed(numbers: Sequence[int]) -> str:
    return ", ".join(f"{number:,}" for number in numbers)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sequence-mixers")
    group.addoption("--full", action="store_true", help="every length and dtype, calls of any duration, no time limit")
    group.addoption("--minutes", type=float, default=15.0, help="rows that have not begun by then are left out")
    group.addoption("--resume", action="store_true", help="without the rows that are saved, made with these sources")
    group.addoption("--dim", type=int, action="append", help=f"the layers' width; repeat it; by default {WIDTHS}")
    group.addoption("--length", type=int, action="append", help="tokens; repeat it; by default " + listed(LENGTHS))
    group.addoption("--peers", action="store_true", help="other libraries beside ours, where they are installed")
    group.addoption("--device", default=None, help="cpu, cuda, ...; by default the accelerator, if there is one")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark-disable"):
        # fla's autotuner shall not keep what it finds while other processes use the GPU
        os.environ.setdefault("FLA_CACHE_RESULTS", "0")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    if "length" in metafunc.fixturenames:
        lengths = metafunc.config.getoption("--length") or (FULL_LENGTHS if full else LENGTHS)
        metafunc.parametrize("length", lengths, ids=lambda n: f"T{n}")
    if "dtype_name" in metafunc.fixturenames:
        metafunc.parametrize("dtype_name", FULL_DTYPES if full else DTYPES)
    if "dim" in metafunc.fixturenames:
        usual = ACCELERATED_LAYERS if accelerated(device_of(metafunc.config)) else LAYERS
        dims = metafunc.config.getoption("--dim") or (FULL_DIMS if full else usual[1:])
        metafunc.parametrize("dim", dims, ids=lambda n: f"D{n}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Short lengths first, and of long ones what is fast; ops and layers take turns."""
    device = device_of(config)
    # cases of ops that nobody else has on this device
    alone = [item for item in items if "case" in (facts := _facts(item)) and not peers_of(facts["case"], device)]
    config.hook.pytest_deselected(items=alone)
    items[:] = sorted((item for item in items if item not in alone), key=lambda item: _place(item, device))
    if config.getoption("--resume"):
        measured = tables.measured_tests(_storage(config), about(device))
        done = [item for item in items if tables.test_name(item.nodeid) in measured]
        config.hook.pytest_deselected(items=done)
        items[:] = [item for item in items if item not in done]


def _storage(config: pytest.Config) -> Path:
    return Path(config.getoption("--benchmark-storage").removeprefix("file://"))


def _place(item: Any, device: torch.device) -> tuple[int, ...]:
    """A step up for every next length, and for backends that are not the fastest of their op."""
    facts = _facts(item)
    if "part" in facts:
        return (-1,)
    length = facts.get("length") or facts.get("tokens", 0)
    slowness = _slowness(facts["op"], facts["name"], device) if "op" in facts else "length" not in facts
    dtype = _dtypes(device).index(facts.get("dtype_name") or facts.get("dtype", DTYPES[0]))
    direction = DIRECTIONS.index(facts.get("direction", DIRECTIONS[0]))
    return sum(each < length for each in LENGTHS) + slowness, length, dtype, direction


def _facts(item: Any) -> dict[str, Any]:
    return item.callspec.params


def _dtypes(device: torch.device) -> tuple[str, ...]:
    """First what people use there."""
    return tuple(sorted(FULL_DTYPES, key="bfloat16".__ne__)) if accelerated(device) else FULL_DTYPES


def _slowness(op: Op, name: str, device: torch.device) -> int:
    """0 for what runs by rule on this device, 2 for the loop, 1 for everybody else."""
    able = [b.name for b in op.backends if not b.foreign and device.type in (b.devices or (device.type,))]
    return 0 if name == able[-1] else 2 if name == able[0] else 1


def device_of(config: pytest.Config) -> torch.device:
    name = config.getoption("--device")
    if name is None and torch.accelerator.is_available():
        name = torch.accelerator.current_accelerator()
    return torch.device(name or "cpu")


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return device_of(pytestconfig)


@pytest.fixture(scope="session")
def start(request: pytest.FixtureRequest, device: torch.device) -> float:
    """When the minutes begin: what is compiled once for a machine is not on their account."""
    facts = [_facts(item) for item in request.session.items]
    named = {name for each in facts if "dim" in each for name in mixers.registry.get(each["name"]).ops}
    for op in {each["op"].name for each in facts if "op" in each} | named:
        OPS[op].choose(pose(OPS[op], "forward", sizes_of(OPS[op], 1, device), dtype=torch.float32, device=device))
    # what is there by now stays, and need not be looked through after every row
    gc.collect()
    gc.freeze()
    return time.monotonic()


@pytest.fixture(autouse=True)
def in_time(pytestconfig: pytest.Config, start: float) -> None:
    minutes = pytestconfig.getoption("--minutes")
    if not pytestconfig.getoption("--full") and time.monotonic() - start > 60 * minutes:
        pytest.skip(f"{minutes:g} {OVER}; --minutes gives more, --full as much as it takes")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"{item.name}: {str(error).partition('. ')[0]}")


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """The tensors of one row are gone before the next."""
    yield
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.memory.empty_cache()


@pytest.fixture(scope="session")
def calls() -> dict[tuple[str, ...], tuple[int, float]]:
    return {}


@pytest.fixture
def timer(benchmark: Any, device: torch.device, pytestconfig: pytest.Config, calls: Any) -> Timer:
    return Timer(benchmark, device, pytestconfig.getoption("--full"), calls)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What has no row because the time was over, and who has none at all for that."""
    outcomes: dict[str, dict[str, bool]] = {}
    for outcome in ("passed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            found = re.fullmatch(r".*\[(T\d+)-(\w+)-(?:(D\d+)-)?([\w+]+)-(.+)\]", report.nodeid)
            if found is not None:
                *what, subject = filter(None, found.groups())
                over = outcome == "skipped" and OVER in report.longrepr[2]
                outcomes.setdefault(" ".join(what), {})[subject] = over
    left = {what: [name for name, over in found.items() if over] for what, found in outcomes.items()}
    if not (count := sum(map(len, left.values()))):
        return
    terminalreporter.write_line(f"LEFT OUT when the time was over [{count}]; --resume goes on with them:")
    for what, subjects in left.items():
        if subjects:
            every = len(subjects) == len(outcomes[what])
            terminalreporter.write_line(f"  {what}: {f'all {len(subjects)}' if every else ', '.join(subjects)}")
    reached = {name for found in outcomes.values() for name, over in found.items() if not over}
    never = sorted({name for found in outcomes.values() for name in found} - reached)
    terminalreporter.write_line(f"without any row for that: {', '.join(never) or 'none'}")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    # the name of somebody's computer is nobody's business
    machine_info.pop("node", None)


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    # targets have a table of their own
    output_json["benchmarks"] = [row for row in output_json["benchmarks"] if "device" in row["extra_info"]]
    output_json["command"] = f"python -m pytest {shlex.join(map(str, config.invocation_params.args))}"
