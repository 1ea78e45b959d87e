"""Hypothesis profiles, a cache folder of the tests' own, and uninitialised memory filled with NaN."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Set before anything is imported: no test may see, or change, what the user has tuned. Workers share the folder of the
# process that started them, and what is compiled there, and leave the cores to each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    # removed when this process ends
    _cache = tempfile.TemporaryDirectory(prefix="sequence-mixers-tests-", ignore_cleanup_errors=True)
    os.environ["SEQUENCE_MIXERS_CACHE"] = _cache.name

import pytest
import torch
from hypothesis import HealthCheck, settings

from kernels import jit_cpp

_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("ci", max_examples=50, derandomize=True, **_common)
settings.register_profile("dev", max_examples=50, **_common)
settings.register_profile("long", max_examples=1000, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))


# The longest tests first: at the end one worker would be left alone with them.
LONGEST = ("triton", "distributed", "agree", "doctor", "sweeps", "graphs_prefill")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(word in item.nodeid for word in LONGEST))


@pytest.fixture(autouse=True, scope="session")
def _compiled(request: pytest.FixtureRequest) -> None:
    """Where all tests run, workers compile the C++ from both ends of the list: none waits for what another compiles."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker and len(request.session.items) > 1000:
        sources = sorted(Path(jit_cpp.__file__).parent.rglob("*.cpp"), reverse=worker == "gw1")
        for source in sources:
            jit_cpp.reason(source)


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """Every torch.empty is filled with NaN, so that a number that was never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)
