"""Backend: one of the interchangeable implementations of an op, ours or another package's."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.metadata import EntryPoints, entry_points
from types import FunctionType, ModuleType
from typing import Any

from kernels.problem import Problem

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: a module with `forward` and `backward`, imported when first needed.

    The module may also have `cannot(problem) -> list[str]` (why it cannot run, empty if it can),
    `configs(problem) -> list of dicts` (candidates for the tuner, the default first) and
    `compile_for(target, problem, config)`. `devices` are the device types it can run on at all. `foreign`: it comes
    from another package, and is only chosen where it was compared and measured.
    """

    name: str
    module: str
    devices: tuple[str, ...] = ()
    foreign: bool = False

    @cached_property
    def loaded(self) -> ModuleType | str:
        """The module, or why it cannot be imported."""
        try:
            return importlib.import_module(self.module)
        except ImportError as error:
            return f"{error}"
        except Exception as error:
            if not self.foreign:
                raise
            return f"importing {self.module} failed: {type(error).__name__}: {error}"

    def cannot(self, problem: Problem) -> list[str]:
        """Why this backend cannot run the problem; empty if it can."""
        device = problem.device.type
        interpreted = "cuda" in self.devices and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        if self.devices and device not in self.devices and not interpreted:
            return [f"runs on {' and '.join(self.devices)}, the tensors are on {device}"]
        if isinstance(self.loaded, str):
            return [self.loaded]
        reasons = getattr(self.loaded, "cannot", None)
        return reasons(problem) if reasons else []

    def configs(self, problem: Problem) -> list[Config]:
        configs = getattr(self.loaded, "configs", None)
        return list(configs(problem)) if configs else [{}]

    def function(self, direction: str) -> Callable[..., Any]:
        return getattr(self.loaded, direction)


def with_options(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """functools.partial; a function that names all the options itself is copied, with them as its defaults: a partial
    object makes a dictionary in every call."""
    code = getattr(function, "__code__", None)
    keywords = code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount] if code else ()
    if not isinstance(function, FunctionType) or not options.keys() <= set(keywords):
        return partial(function, **options)
    copy = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = {**(function.__kwdefaults__ or {}), **options}
    return copy


def from_packages(op: str) -> Iterator[Backend]:
    """Backends from other packages: entry points "op.backend" of the group "mixers.backends", each a module."""
    for point in _entry_points():
        name, _, backend = point.name.partition(".")
        if name == op and backend:
            yield Backend(backend, point.value, foreign=True)


@cache
def _entry_points() -> EntryPoints:
    """Reading those of all installed packages takes a while: once for all ops."""
    return entry_points(group="mixers.backends")
