"""Flop formulas of the ops for torch.utils.flop_counter, without importing it.

That module pulls in Triton and half of torch.export (0.6 s), and a FlopCounterMode copies the formulas when it is made:
so ours are added when it is imported, by whoever wants to count.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Callable[..., int]]] = []


def register(packet: Any, formula: Callable[..., int]) -> None:
    """formula(*args, out_val=...) counts the flops of the operator `packet`; args are the tensors themselves."""
    if COUNTER in sys.modules:
        _add(packet, formula)
        return
    if not _waiting:
        sys.meta_path.insert(0, _WhenImported())
    _waiting.append((packet, formula))


def _add(packet: Any, formula: Callable[..., int]) -> None:
    sys.modules[COUNTER].register_flop_formula(packet, get_raw=True)(formula)


class _WhenImported(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def then_register(module: ModuleType) -> None:
            execute(module)
            while _waiting:
                _add(*_waiting.pop())

        spec.loader.exec_module = then_register  # type: ignore[method-assign]
        return spec
