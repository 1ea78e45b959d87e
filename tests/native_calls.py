"""What the tests of single tokens share."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

# 16-bit layers round what stands between their ops
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def calls_of(step: ModuleType) -> Any:
    """A fixture: the native functions that were called by way of a module."""

    @pytest.fixture
    def native(monkeypatch: pytest.MonkeyPatch) -> list[str]:
        calls: list[str] = []
        real = step._function

        def counting(name: str, fields: int | str) -> Callable[..., None]:
            calls.append(name)
            return real(name, fields)

        monkeypatch.setattr(step, "_function", counting)
        return calls

    return native


def check_close(found: Tensor, right: Tensor, layer: torch.dtype) -> None:
    """Of one dtype, side by side, and within what a layer in its dtype is allowed of the largest number."""
    assert found.dtype == right.dtype
    assert found.is_contiguous()
    assert (found - right).abs().max() <= TOLERANCES[layer] * right.abs().max()


def on_threads(call: Callable[[], Any]) -> list[Any]:
    """What five calls each return on one thread, on two, and on three."""
    threads, made = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            made += [call() for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    return made
