"""The table file: whatever happens to a writer or to the file, no record that was written whole is lost."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotune import Record, Store, cache_folder
from autotune import store as store_module

# Appends records named after the process's tag, and tells each one that is on the disk.
WRITER = """
import sys
from autotune import Key, Record, Store
store, tag, count = Store(sys.argv[1]), sys.argv[2], int(sys.argv[3])
key = Key("scan", "forward", "toy", "float32", (), (), 1)
for i in range(count):
    store.append(Record(key, "native", {}, "error", message=f"{tag} {i}", source="x" * (i % 7 * 400)))
    print(i, flush=True)
"""

# Dies in the middle of a line, holding the lock.
TORN = """
import os, signal, sys
from autotune import Key, Record, Store
key = Key("scan", "forward", "toy", "float32", (), (), 1)
real = os.write
def half(descriptor, data):
    real(descriptor, data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
os.write = half
Store(sys.argv[1]).append(Record(key, "native", {}, "wrong", message="torn"))
"""


def spawn(script: str, *args: object, told: Path | None = None) -> subprocess.Popen[bytes]:
    """A process that runs the script; what it prints goes to the file `told`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, *map(str, args)]
    with open(told or os.devnull, "wb") as output:
        return subprocess.Popen(command, stdout=output, env=environment)


def told_to(path: Path) -> int:
    """How many whole lines a process has printed."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_what_is_appended_is_read_in_order(tmp_path: Path, make_record: Callable[..., Record]) -> None:
    store = Store(tmp_path / "deep" / "down" / "table.jsonl")
    assert store.read() == []
    records = [make_record("native", float(i)) for i in range(1, 5)]
    for record in records:
        store.append(record)
    assert store.read() == records
    assert store.path.read_bytes().count(b"\n") == 4


def test_a_line_is_one_write_and_is_flushed(
    tmp_path: Path, make_record: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bytes] = []
    real_write, real_fsync = os.write, os.fsync

    def write(descriptor: int, data: bytes) -> int:
        calls.append(bytes(data))
        return real_write(descriptor, data)

    def fsync(descriptor: int) -> None:
        calls.append(b"fsync")
        real_fsync(descriptor)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(os, "fsync", fsync)
    record = make_record("native")
    Store(tmp_path / "table.jsonl").append(record)
    # The lock may write something of its own before.
    assert calls[-2:] == [record.to_line().encode() + b"\n", b"fsync"]


def test_a_short_write_is_completed(
    tmp_path: Path, make_record: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:100]))
    store = Store(tmp_path / "table.jsonl")
    store.append(make_record("native", message="x" * 1000))
    assert len(store.read()) == 1


GARBAGE = [
    b"not json",
    b"{}",
    b"[1, 2]",
    b"null",
    b"\x00\xff\xfe\x80binary\x00",
    b'{"schema": 1, "key": {"op": "scan"}}',
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"9" * 5000,
    "\ufeff{}".encode(),
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda g: repr(g[:12]))
def test_garbage_is_skipped_and_left_alone(garbage: bytes, tmp_path: Path, make_record: Callable[..., Record]) -> None:
    store, records = Store(tmp_path / "table.jsonl"), [make_record("naive"), make_record("native")]
    content = b"\n".join([records[0].to_line().encode(), garbage, b"", records[1].to_line().encode(), b""])
    store.path.write_bytes(content)
    with pytest.warns(RuntimeWarning) as caught:
        assert store.read() == records
    assert len(caught) == 1
    assert f"{store.path}: line 2 is no record" in str(caught[0].message)
    assert store.path.read_bytes() == content
    store.append(records[0])
    assert store.path.read_bytes().startswith(content)


def test_many_bad_lines_are_one_short_warning(tmp_path: Path) -> None:
    store = Store(tmp_path / "table.jsonl")
    store.path.write_bytes(b"?\n" * 50)
    with pytest.warns(RuntimeWarning) as caught:
        store.read()
    assert len(caught) == 1
    assert "lines 1, 2, 3, 4, 5, ... are no records" in str(caught[0].message)


@given(st.lists(st.binary(max_size=60), max_size=6), st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_a_record_survives_among_any_bytes(tmp_path_factory, make_record, junk: list[bytes], place: int) -> None:  # type: ignore[no-untyped-def]
    store, record = Store(tmp_path_factory.mktemp("junk") / "table.jsonl"), make_record("native")
    lines = [*junk[:place], record.to_line().encode(), *junk[place:]]
    store.path.write_bytes(b"\n".join(lines))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert store.read() == [record]
        store.append(make_record("naive"))
        assert store.read() == [record, make_record("naive")]


def test_a_line_cut_anywhere_swallows_no_other(tmp_path: Path, make_record: Callable[..., Record]) -> None:
    store, record = Store(tmp_path / "table.jsonl"), make_record("native")
    whole = record.to_line().encode() + b"\n"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cut in range(1, len(whole), 7):
            store.path.write_bytes(whole + whole[:cut])
            store.append(make_record("naive"))
            assert [r.backend for r in store.read()] == ["native", "naive"]
    # All but the newline is a whole record.
    store.path.write_bytes(whole[:-1])
    store.append(make_record("naive"))
    assert [r.backend for r in store.read()] == ["native", "naive"]


def test_a_line_that_is_being_written_is_no_garbage(
    tmp_path: Path, make_record: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, record = Store(tmp_path / "table.jsonl"), make_record("native")
    whole = record.to_line().encode() + b"\n"
    store.path.write_bytes(whole[:50])

    def finish(_: float) -> None:
        store.path.write_bytes(whole)

    monkeypatch.setattr(store_module.time, "sleep", finish)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.read() == [record]


def test_lines_of_a_later_version_are_passed_over_in_silence(
    tmp_path: Path, make_record: Callable[..., Record]
) -> None:
    store, record = Store(tmp_path / "table.jsonl"), make_record("native")
    store.path.write_text(f'{{"schema": 999, "what": "ever"}}\n{record.to_line()}\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.read() == [record]


def test_an_unreadable_table_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "table.jsonl"):
        with pytest.warns(RuntimeWarning, match="cannot read the table"):
            assert Store(path).read() == []


def test_an_unwritable_table_is_an_error(tmp_path: Path, make_record: Callable[..., Record]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        Store(tmp_path / "file" / "table.jsonl").append(make_record("native"))


def test_a_full_disk_is_an_error_and_costs_one_line(
    tmp_path: Path, make_record: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, write = Store(tmp_path / "table.jsonl"), os.write
    store.append(make_record("naive"))

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 100:
            return write(descriptor, data[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left"):
            store.append(make_record("compiled", message="x" * 50))
    store.append(make_record("native"))
    with pytest.warns(RuntimeWarning, match="line 2 is no record"):
        assert [r.backend for r in store.read()] == ["naive", "native"]


def test_who_holds_the_lock_for_ever_blocks_nobody_for_ever(
    tmp_path: Path, make_record: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "LOCK_SECONDS", 0.1)
    store = Store(tmp_path / "table.jsonl")
    with filelock.FileLock(f"{store.path}.lock"), pytest.raises(OSError):
        store.append(make_record("native"))
    store.append(make_record("native"))
    assert len(store.read()) == 1


def test_threads_may_append_at_once(tmp_path: Path, make_record: Callable[..., Record]) -> None:
    store = Store(tmp_path / "table.jsonl")

    def append(tag: int) -> None:
        for i in range(20):
            store.append(make_record(f"{tag} {i}"))

    threads = [threading.Thread(target=append, args=(tag,)) for tag in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(r.backend for r in store.read()) == sorted(f"{i} {j}" for i in range(4) for j in range(20))


def test_two_processes_may_append_at_once(tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    writers = [spawn(WRITER, path, tag, 150) for tag in "ab"]
    for writer in writers:
        assert writer.wait(timeout=120) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        messages = [record.message for record in Store(path).read()]
    for tag in "ab":
        assert [m for m in messages if m.startswith(tag)] == [f"{tag} {i}" for i in range(150)]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_processes_killed_at_random_moments_lose_nothing(tmp_path: Path) -> None:
    path, moments, tags = tmp_path / "table.jsonl", random.Random(0), ["0a", "0b", "1a", "1b"]
    for pair in (tags[:2], tags[2:]):
        writers = {tag: spawn(WRITER, path, tag, 1_000_000, told=tmp_path / tag) for tag in pair}
        # Both are at work before either is killed.
        deadline = time.monotonic() + 60
        while min(told_to(tmp_path / tag) for tag in pair) == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        for writer in writers.values():
            time.sleep(moments.uniform(0.02, 0.3))
            writer.send_signal(signal.SIGKILL)
            assert writer.wait(timeout=60) == -signal.SIGKILL
        assert spawn(TORN, path).wait(timeout=60) == -signal.SIGKILL
    with pytest.warns(RuntimeWarning, match="no record") as caught:
        messages = [record.message for record in Store(path).read()]
    assert len(caught) == 1
    assert not any("torn" in message for message in messages)
    for tag in tags:
        kept, count = [m for m in messages if m.startswith(tag)], told_to(tmp_path / tag)
        assert count > 0
        # A record may be on the disk without having been told.
        assert len(kept) in (count, count + 1)
        assert kept == [f"{tag} {i}" for i in range(len(kept))]


def test_the_cache_folder_is_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEQUENCE_MIXERS_CACHE", str(tmp_path / "elsewhere"))
    assert cache_folder() == tmp_path / "elsewhere"
    for unset in (None, ""):
        if unset is None:
            monkeypatch.delenv("SEQUENCE_MIXERS_CACHE")
        else:
            monkeypatch.setenv("SEQUENCE_MIXERS_CACHE", unset)
        assert cache_folder().name == "sequence-mixers"
