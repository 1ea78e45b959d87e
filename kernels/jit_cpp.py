"""Compiles the C++ file beside a backend once, on first use, and loads it.

A source offers plain C functions that take one pointer to an array of 8-byte integers and addresses, and includes
nothing of torch: it compiles in seconds, fits every torch, and a call costs a microsecond and releases the GIL.
Its threads are torch's own: `parallel.h` gets the entry point of the OpenMP runtime that torch has loaded.

The library is kept in `<cache folder>/native` (see autotune/store.py) under a name that says what it depends on:
source and headers, compiler, flags, CPU features, torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import torch

from autotune.store import cache_folder

COMPILERS = ("g++", "clang++", "c++")
# A lock held longer than this belongs to a build that hangs; building twice does no harm.
LOCK_SECONDS = 120.0
COMPILE_SECONDS = 600.0
# of the compiler's messages
LAST_LINES = 12

_logger = logging.getLogger(__name__)
_guard = threading.RLock()
_results: dict[Path, Library | BuildError] = {}
_temporary: tempfile.TemporaryDirectory[str] | None = None


class BuildError(RuntimeError):
    """The library cannot be had here; the message says why."""


class Library:
    """A loaded library whose functions take one array of 8-byte fields."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._dll = ctypes.CDLL(str(path))
        # Symbols are looked up in torch's library and in what it is linked with: that finds torch's runtime, no other.
        with contextlib.suppress(AttributeError, OSError):
            team = ctypes.CDLL(torch._C.__file__).GOMP_parallel
            self._dll.use_openmp(ctypes.cast(team, ctypes.c_void_p))

    def function(self, name: str, fields: int | str) -> Callable[..., None]:
        """`void name(const int64_t fields[])` as a function of `fields` integers; an address is an integer too."""
        native, pack = self._entry(name, fields, None)

        def call(*values: int) -> None:
            native(pack(*values))

        return call

    def checked_function(self, name: str, fields: int | str) -> Callable[..., None]:
        """Likewise `int name(...)`, which returns 0, or anything else where memory ran out: a MemoryError.

        fields: how many integers; with doubles among them what they are, like "11qd3q" (see the module struct).
        """
        native, pack = self._entry(name, fields, ctypes.c_int)

        def call(*values: float) -> None:
            if native(pack(*values)):
                raise MemoryError(f"{name}: out of memory")

        return call

    def _entry(self, name: str, fields: int | str, result: Any) -> tuple[Callable[[bytes], Any], Callable[..., bytes]]:
        native = self._dll[name]
        native.argtypes, native.restype = [ctypes.c_char_p], result
        return native, struct.Struct(f"{fields}q" if isinstance(fields, int) else fields).pack

    def vector_bytes(self) -> int:
        """Width of the vectors that the library was compiled for."""
        return int(self._dll.vector_bytes())

    def threads(self) -> int:
        """How many threads share the work of a call."""
        torch.get_num_threads()
        return int(self._dll.team_size())


def load(source: Path) -> Library:
    """The library compiled from `source`. Raises BuildError; the result of the first call is remembered."""
    with _guard:
        if source not in _results:
            try:
                _results[source] = _find_or_build(source)
            except BuildError as error:
                _results[source] = error
        result = _results[source]
    if isinstance(result, BuildError):
        raise result
    return result


def reason(source: Path) -> str | None:
    """Why `load(source)` fails here, or None. Builds the library if this is its first use."""
    try:
        load(source)
    except BuildError as error:
        return str(error)
    return None


def reasons(source: Path) -> list[str]:
    """`reason` as a backend's `cannot` gives it."""
    why = reason(source)
    return [] if why is None else [why]


def functions(source: Path) -> Callable[[str, int | str], Callable[..., None]]:
    """`load(source).checked_function`, each function made once, when it is first asked for."""
    return functools.cache(lambda name, fields: load(source).checked_function(name, fields))


def compiler() -> list[str]:
    """The command that starts the C++ compiler: $CXX, else the first of COMPILERS on PATH. Raises BuildError."""
    command = shlex.split(os.environ.get("CXX", ""))
    for candidate in [command] if command else [[name] for name in COMPILERS]:
        if path := shutil.which(candidate[0]):
            return [path, *candidate[1:]]
    if command:
        raise BuildError(f"no C++ compiler found ($CXX is {command[0]!r}, which is no program on PATH)")
    raise BuildError(f"no C++ compiler found (looked for $CXX, {', '.join(COMPILERS)})")


def cpu_features() -> str:
    """What this machine's processor can do: a library for one must not be run by another."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
        for line in lines:
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return " ".join(sorted(value.split()))
    return platform.processor() or platform.machine()


def _flags() -> list[str]:
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    native = "-march=native" if x86 else "-mcpu=native"
    return ["-O2", native, "-ffp-contract=fast", "-fno-math-errno", "-std=c++20", "-fPIC", "-shared", "-w"]


def _with_headers(source: Path) -> Iterator[Path]:
    """The file and the headers that it includes in quotes."""
    seen, todo = set(), [source.resolve()]
    while todo:
        path = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        yield path
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            todo.append((path.parent / name).resolve())


def _name(source: Path, command: list[str]) -> str:
    program = Path(command[0]).resolve()
    # Size and date stand for the version: asking the compiler would start it in every process.
    stat = program.stat()
    parts = [*command, str(program), str(stat.st_size), str(stat.st_mtime_ns), *_flags()]
    parts += [torch.__version__, sys.platform, platform.machine(), cpu_features()]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in _with_headers(source):
        digest.update(path.read_bytes() + b"\0")
    return f"{source.parent.name}-{source.stem}-{digest.hexdigest()[:24]}.so"


def _find_or_build(source: Path) -> Library:
    command = compiler()
    try:
        name = _name(source, command)
    except OSError as error:
        raise BuildError(f"cannot read {source} and what it includes: {error}") from error
    folder = cache_folder() / "native"
    try:
        return _build(source, command, folder / name)
    except OSError as error:
        # read-only, full, or mounted without the right to run programs
        try:
            return _build(source, command, _temporary_folder(folder, error) / name)
        except OSError as again:
            raise BuildError(f"cannot build {source.name}: {again}") from again


def _temporary_folder(instead: Path, error: OSError) -> Path:
    """A folder of this process, removed when it ends."""
    global _temporary
    if _temporary is None:
        warnings.warn(
            f"cannot keep compiled kernels in {instead} ({error}): they are compiled again in every process. "
            "SEQUENCE_MIXERS_CACHE names another folder.",
            RuntimeWarning,
            stacklevel=2,
        )
        _temporary = tempfile.TemporaryDirectory(prefix="sequence-mixers-")
    return Path(_temporary.name)


def _build(source: Path, command: list[str], target: Path) -> Library:
    with contextlib.suppress(OSError):
        return Library(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target) as alone:
        # Another process may have finished it meanwhile. A file that cannot be loaded is replaced.
        with contextlib.suppress(OSError):
            return Library(target)
        if alone:
            _remove_unfinished(target)
        _logger.info("compiling %s with %s", source, command[0])
        handle, unfinished = tempfile.mkstemp(prefix=f"{target.stem}-", suffix=".tmp", dir=target.parent)
        os.close(handle)
        try:
            _compile([*command, *_flags(), "-o", unfinished, str(source)])
            os.replace(unfinished, target)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
    return Library(target)


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[bool]:
    """One build at a time where the file system can lock. The lock of a process that dies is free at once."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(filelock.FileLock(f"{target}.lock", timeout=LOCK_SECONDS))
            alone = True
        except (OSError, NotImplementedError):
            alone = False
        yield alone


def _remove_unfinished(target: Path) -> None:
    """What killed builds have left."""
    for path in target.parent.glob(f"{target.stem}-*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=COMPILE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"the compiler was stopped after {COMPILE_SECONDS:.0f} s: {shlex.join(command)}") from error
    if done.returncode != 0:
        last = done.stdout.decode(errors="replace").strip().splitlines()[-LAST_LINES:]
        raise BuildError("\n".join([f"the compiler failed (exit {done.returncode}): {shlex.join(command)}", *last]))
