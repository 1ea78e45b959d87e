"""What options may be: of the type that the constructor's annotation says, and in range."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from numbers import Integral, Real
from typing import Any

# What can be told from a value: options of any other type are up to their mixer
PLAIN = (bool, int, float, str, type(None))


def check_types(who: str, init: Callable[..., None], given: Mapping[str, Any]) -> None:
    """Raises TypeError for an argument that is not of its annotated type: "False" for a bool, 2.0 for an int."""
    expected = _plain(init)
    for option, value in given.items():
        kinds = expected.get(option)
        if kinds is not None and not _is(value, kinds):
            names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise TypeError(f"{who}: {option} is {value!r}, expected {names}")


def check_backend(ops: Sequence[str], backend: str) -> None:
    """Raises ValueError for a backend that the first of these ops, which mixes over time, does not have."""
    if backend != "auto" and ops:
        # all ops are imported only for who names a backend
        from kernels.catalogue import OPS

        if ops[0] in OPS:
            OPS[ops[0]].backend(backend)


def positive(who: str, **options: float | None) -> None:
    """Raises ValueError for an option that is not more than 0; None, which stands for a default, passes."""
    for option, value in options.items():
        if value is not None and not value > 0:
            raise ValueError(f"{who}: {option} is {value}, expected more than 0")


def is_integer(value: Any) -> bool:
    """An int or numpy's; not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool) or not isinstance(value, Real):
        return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    return float in kinds or (int in kinds and isinstance(value, Integral))


@cache
def _plain(init: Callable[..., None]) -> dict[str, tuple[type, ...]]:
    """The arguments that are of plain types only, with these."""
    try:
        hints = typing.get_type_hints(init)
    except (NameError, TypeError, AttributeError):
        # a name that is imported for type checkers only
        return {}
    found = {}
    for name in inspect.signature(init).parameters:
        hint = hints.get(name)
        union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
        kinds = typing.get_args(hint) if union else (hint,)
        if all(kind in PLAIN for kind in kinds):
            found[name] = kinds
    return found
