"""A table file: JSON lines that are only ever appended, by any number of processes, killed at any moment or not."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import filelock
import platformdirs

from autotune.record import NewerSchema, Record

ENVIRONMENT = "SEQUENCE_MIXERS_CACHE"
# Appending takes milliseconds; who holds the lock for longer hangs, and its death frees the lock.
LOCK_SECONDS = 30.0
# A writer needs microseconds between the two halves of a line that a reader may catch it in.
SECOND_LOOK_SECONDS = 0.02
SHOWN_LINES = 5

# Called with the path and the record after every append of this process: the look-up keeps its memory up to date.
appended: list[Callable[[Path, Record], None]] = []


def cache_folder() -> Path:
    """The user's cache folder: the environment variable SEQUENCE_MIXERS_CACHE, else the system's place for caches."""
    chosen = os.environ.get(ENVIRONMENT) or platformdirs.user_cache_dir("sequence-mixers", appauthor=False)
    return Path(chosen).expanduser().absolute()


class Store:
    """The records of one file, which need not exist yet; the folder and the file are made by the first append."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    def append(self, record: Record) -> None:
        """Adds one line, and returns when it is on the disk. Safe beside other threads and processes.

        Raises:
            OSError: the file cannot be written; filelock.Timeout (a TimeoutError): it was locked for 30 s.
            ValueError, TypeError: the record holds something that JSON cannot.
        """
        line = record.to_line().encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{self.path}.lock", timeout=LOCK_SECONDS):
            # O_BINARY: on Windows, text mode would write \r\n.
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
            descriptor = os.open(self.path, flags, 0o666)
            try:
                _write(descriptor, line)
            finally:
                os.close(descriptor)
        for notify in appended:
            notify(self.path, record)

    def read(self) -> list[Record]:
        """Every record of the file, oldest first; empty if there is none.

        Lines that are no records are left where they are and skipped with one warning; so is a file that cannot be
        read. Lines that a later version of the package wrote are skipped without a word.
        """
        records, bad, cut = self._read()
        if cut:
            # The last line has no end: it may be in the middle of being written rather than left behind.
            time.sleep(SECOND_LOOK_SECONDS)
            records, bad, cut = self._read()
        if bad:
            shown = [str(number) for number, _ in bad[:SHOWN_LINES]]
            numbers = ", ".join(shown if len(bad) <= SHOWN_LINES else [*shown, "..."])
            what = f"line {numbers} is no record" if len(bad) == 1 else f"lines {numbers} are no records"
            warnings.warn(f"autotune: {self.path}: {what}, skipped ({bad[0][1]})", RuntimeWarning, stacklevel=3)
        return records

    def _read(self) -> tuple[list[Record], list[tuple[int, str]], bool]:
        """The records; number and fault of each bad line; whether the last line is bad and lacks its newline."""
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return [], [], False
        except OSError as error:
            warnings.warn(f"autotune: cannot read the table {self.path}: {error}", RuntimeWarning, stacklevel=4)
            return [], [], False
        records, bad = [], []
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                records.append(Record.from_line(line))
            except NewerSchema:
                continue
            except ValueError as error:
                bad.append((number, str(error)))
        return records, bad, bool(bad) and bad[-1][0] == len(lines)


def _write(descriptor: int, line: bytes) -> None:
    """Appends a whole line in one write; starts with a newline if a killed writer left half a line behind."""
    size = os.lseek(descriptor, 0, os.SEEK_END)
    if size:
        os.lseek(descriptor, -1, os.SEEK_END)
        if os.read(descriptor, 1) != b"\n":
            line = b"\n" + line
    written = os.write(descriptor, line)
    # A full disk or a signal can cut a write short.
    while written < len(line):
        written += os.write(descriptor, line[written:])
    os.fsync(descriptor)
