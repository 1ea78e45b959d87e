"""Compiling C++ on first use: in a fresh cache, beside other processes, after a killed build, where it cannot work."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import filelock
import pytest
import torch

from kernels import jit_cpp
from kernels.scan import native

SOURCE = """
#include "part.h"
extern "C" void add(const int64_t* fields) { *reinterpret_cast<int64_t*>(fields[2]) = fields[0] + fields[1] + PART; }
"""
HEADER = "#pragma once\n#include <cstdint>\n#define PART 0\n"
# Writes a line for each call, then does what $BEFORE says, then compiles.
COMPILER = """#!/bin/sh
echo $$ >> "$LOG"
eval "$BEFORE"
exec c++ "$@"
"""
# What another process does: load, add, and report.
USE = """
import sys, ctypes
from pathlib import Path
from kernels import jit_cpp
out = ctypes.c_int64()
jit_cpp.load(Path(sys.argv[1])).function("add", 3)(40, 2, ctypes.addressof(out))
print(out.value)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "part.h").write_text(HEADER)
    path = tmp_path / "native.cpp"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A fresh cache, and a compiler that counts its calls."""
    script = tmp_path / "compiler"
    script.write_text(COMPILER)
    script.chmod(0o755)
    chosen = {"SEQUENCE_MIXERS_CACHE": str(tmp_path / "cache"), "CXX": str(script), "LOG": str(tmp_path / "log")}
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("BEFORE", raising=False)
    return {**os.environ, **chosen}


def calls(environment: dict[str, str]) -> list[int]:
    """The process ids of the compiler's calls so far."""
    log = Path(environment["LOG"])
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def add(library: jit_cpp.Library, a: int, b: int) -> int:
    out = torch.zeros(1, dtype=torch.int64)
    library.function("add", 3)(a, b, out.data_ptr())
    return int(out)


def start(source: Path, environment: dict[str, str], **extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", USE, str(source)], env={**environment, **extra}, stdout=subprocess.PIPE, text=True
    )


def answer(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return out.strip()


def wait_for_call(environment: dict[str, str]) -> int:
    for _ in range(600):
        if pids := calls(environment):
            return pids[0]
        time.sleep(0.05)
    raise AssertionError("the compiler was never called")


def test_builds_once_and_later_processes_reuse_it(source: Path, environment: dict[str, str], tmp_path: Path) -> None:
    assert jit_cpp.reason(source) is None
    library = jit_cpp.load(source)
    assert add(library, 40, 2) == 42
    assert library.path.parent == tmp_path / "cache" / "native"
    assert not list(library.path.parent.glob("*.tmp"))
    assert len(calls(environment)) == 1
    assert answer(start(source, environment)) == "42"
    assert len(calls(environment)) == 1


def test_two_processes_at_once_compile_once(source: Path, environment: dict[str, str]) -> None:
    both = [start(source, environment, BEFORE="sleep 1") for _ in range(2)]
    assert [answer(process) for process in both] == ["42", "42"]
    assert len(calls(environment)) == 1


def test_killed_build_blocks_nobody(source: Path, environment: dict[str, str], tmp_path: Path) -> None:
    killed = start(source, environment, BEFORE="exec sleep 60")
    compiler = wait_for_call(environment)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    try:
        began = time.monotonic()
        assert add(jit_cpp.load(source), 1, 2) == 3
        assert time.monotonic() - began < 20
        assert not list((tmp_path / "cache" / "native").glob("*.tmp")), "what the killed build left is still there"
    finally:
        os.kill(compiler, signal.SIGKILL)


def test_hanging_build_is_not_waited_for(
    source: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit_cpp, "LOCK_SECONDS", 0.1)
    target = Path(environment["SEQUENCE_MIXERS_CACHE"]) / "native" / jit_cpp._name(source, jit_cpp.compiler())
    target.parent.mkdir(parents=True)
    with filelock.FileLock(f"{target}.lock"):
        assert add(jit_cpp.load(source), 1, 2) == 3


def test_damaged_library_is_replaced(source: Path, environment: dict[str, str]) -> None:
    target = Path(environment["SEQUENCE_MIXERS_CACHE"]) / "native" / jit_cpp._name(source, jit_cpp.compiler())
    target.parent.mkdir(parents=True)
    target.write_bytes(b"no library")
    assert add(jit_cpp.load(source), 1, 2) == 3


@pytest.mark.parametrize("cxx", [None, "no-such-compiler -O2"])
def test_no_compiler(
    cxx: str | None, source: Path, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    if cxx is None:
        monkeypatch.delenv("CXX")
        expected = r"no C\+\+ compiler found \(looked for \$CXX, g\+\+, clang\+\+, c\+\+\)"
    else:
        monkeypatch.setenv("CXX", cxx)
        expected = "no C\\+\\+ compiler found .*'no-such-compiler'"
    with pytest.raises(jit_cpp.BuildError, match=expected):
        jit_cpp.load(source)


def test_broken_source_gives_the_compilers_words_and_is_not_tried_again(
    source: Path, environment: dict[str, str]
) -> None:
    source.write_text(SOURCE + "\nint broken = missing_name;\n")
    first = jit_cpp.reason(source)
    assert first is not None
    assert "the compiler failed" in first
    assert "missing_name" in first
    assert jit_cpp.reason(source) == first
    assert len(calls(environment)) == 1


def test_missing_header(source: Path, environment: dict[str, str]) -> None:
    source.write_text('#include "absent.h"\n')
    assert "absent.h" in (jit_cpp.reason(source) or "")
    assert calls(environment) == []


def test_cache_that_cannot_be_written(
    source: Path, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEQUENCE_MIXERS_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(jit_cpp, "_temporary", None)
    with pytest.warns(RuntimeWarning, match="SEQUENCE_MIXERS_CACHE"):
        library = jit_cpp.load(source)
    assert add(library, 40, 2) == 42
    other = source.with_name("other.cpp")
    other.write_text(SOURCE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert add(jit_cpp.load(other), 40, 2) == 42


def test_name_follows_everything_the_library_depends_on(
    source: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = jit_cpp.compiler()
    names = [jit_cpp._name(source, command), jit_cpp._name(source, [*command, "-g"])]
    with monkeypatch.context() as patch:
        patch.setattr(jit_cpp, "cpu_features", lambda: "another processor")
        names.append(jit_cpp._name(source, command))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "another torch")
        names.append(jit_cpp._name(source, command))
    with monkeypatch.context() as patch:
        patch.setattr(jit_cpp, "_flags", lambda: ["-O1"])
        names.append(jit_cpp._name(source, command))
    assert jit_cpp._name(source, command) == names[0]
    Path(command[0]).write_text(COMPILER + "# another compiler\n")
    names.append(jit_cpp._name(source, command))
    source.with_name("part.h").write_text(HEADER.replace("0", "1"))
    names.append(jit_cpp._name(source, command))
    source.write_text(SOURCE + "\n")
    names.append(jit_cpp._name(source, command))
    assert len(set(names)) == len(names) == 8


def test_vectors_are_as_wide_as_the_machine_allows() -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("widths are known for x86 only")
    features = set(jit_cpp.cpu_features().split())
    expected = 64 if features >= {"avx512f", "avx512bw", "avx512vl"} else 32 if features >= {"avx2", "fma"} else 16
    assert jit_cpp.load(native.SOURCE).vector_bytes() == expected


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_threads_are_torchs_own() -> None:
    program = """
import os, torch
from kernels import jit_cpp
from kernels.scan import native
torch.set_num_threads(3)
x = torch.rand(8, 512, 512)
x + x
threads = len(os.listdir("/proc/self/task"))
config = {"block": 64, "around_cache_mib": 24}
for _ in range(5):
    native.forward(x, x, None, None, reverse=False, config=config)
maps = open("/proc/self/maps").read().split()
runtimes = {word for word in maps if "libgomp" in word or "libomp" in word or "libiomp" in word}
print(threads, len(os.listdir("/proc/self/task")), len(runtimes), jit_cpp.load(native.SOURCE).threads())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after, runtimes, used = map(int, done.stdout.split())
    assert after == before, "the kernel started threads of its own"
    assert (runtimes, used) == (1, 3)
