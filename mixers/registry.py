"""The registry: names to mixers, with errors that say what would have worked.

A mixer's name is its file's. Other packages add theirs through the entry-point group "mixers":

    [project.entry-points.mixers]
    mymixer = "mypackage.mymixer:MyMixer"
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar, overload

from mixers.mixer import SequenceMixer
from mixers.options import is_integer

Mixer = TypeVar("Mixer", bound=type[SequenceMixer])

# the modules of this package's mixers by name, each imported when it is first asked for
ours: dict[str, str] = {}
_registered: dict[str, type[SequenceMixer]] = {}


@overload
def register(cls: Mixer) -> Mixer: ...
@overload
def register(*, name: str) -> Callable[[Mixer], Mixer]: ...
def register(cls: Any = None, *, name: str | None = None) -> Any:
    """Class decorator: `@register` takes the file's name, `@register(name="mymixer")` another."""
    if cls is None:
        return lambda cls: _add(cls, name or _file(cls))
    return _add(cls, name or _file(cls))


def names() -> list[str]:
    """Every mixer that `build` knows, plug-ins included."""
    return sorted({*ours, *_registered, *(point.name for point in entry_points(group="mixers"))})


def get(name: str) -> type[SequenceMixer]:
    """The class registered under a name.

    Raises:
        ValueError: there is none; the message has the nearest names.
    """
    _import_ours(name)
    if name not in _registered:
        for point in entry_points(group="mixers"):
            if point.name == name:
                _add(point.load(), name)
    if name not in _registered:
        raise ValueError(f"no mixer {name!r}{suggest(name, names())}; there are {', '.join(names())}")
    return _registered[name]


def options(name: str) -> dict[str, Any]:
    """A mixer's keyword arguments and their defaults."""
    parameters = list(inspect.signature(get(name).__init__).parameters.values())[2:]
    return {p.name: p.default for p in parameters}


def build(name: str, dim: int, **options: Any) -> SequenceMixer:
    """A mixer by name: `mixers.build("hgrn", dim=512)`. `options` are those of its class, checked here.

    Raises:
        ValueError: there is no mixer of that name, dim is less than 1, or an option's value does not fit.
        TypeError: the mixer has no such option.
    """
    cls = get(name)
    known = list(inspect.signature(cls.__init__).parameters)[2:]
    for option in options:
        if option not in known:
            raise TypeError(f"{name}: no option {option!r}{suggest(option, known)}; there are {', '.join(known)}")
    if not is_integer(dim) or dim < 1:
        raise ValueError(f"{name}: dim is {dim!r}, expected an integer of at least 1")
    return cls(dim, **options)


def describe(name: str) -> str:
    """The mixer's documentation: equation, shapes, state, options and source."""
    return inspect.cleandoc(get(name).__doc__ or "")


def suggest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.55)
    return f"; did you mean {near[0]!r}?" if near else ""


def _file(cls: type) -> str:
    return cls.__module__.rpartition(".")[2]


def _import_ours(name: str) -> None:
    if name not in _registered and name in ours:
        import_module(ours[name])


def _add(cls: Any, name: str) -> Any:
    if not (isinstance(cls, type) and issubclass(cls, SequenceMixer)):
        raise TypeError(f"mixer {name!r}: {cls!r} is not a subclass of SequenceMixer")
    if cls.__module__ != ours.get(name):
        _import_ours(name)
    known = _registered.get(name)
    if known is not None and known is not cls:
        raise ValueError(f"mixer {name!r} is already registered by {known.__module__}.{known.__qualname__}")
    _registered[name] = cls
    cls.registered_name = name  # type: ignore[attr-defined]
    return cls
