"""The text that the demo learns: a corpus of characters with its last tenth held out."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# what an unknown character decodes to: U+FFFD, the replacement character
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Corpus:
    """A text as character ids, split into a training part and a held-out part that follows it.

    train, held_out: int64 tensors [characters] on the CPU, each id in 0..size-1.
    vocabulary: the characters of the training part, sorted; the id of a character is its place here.
    source: where the text came from, for people.
    train_text, held_out_text: the same two parts as they were written, unknown characters included.

    The id after the last character, `unknown`, stands for every character that the training part lacks.
    """

    train: Tensor
    held_out: Tensor
    vocabulary: str
    source: str
    train_text: str
    held_out_text: str

    @property
    def unknown(self) -> int:
        """The id of every character outside the vocabulary."""
        return len(self.vocabulary)

    @property
    def size(self) -> int:
        """How many ids there are: the vocabulary and the unknown character."""
        return len(self.vocabulary) + 1

    def encode(self, text: str) -> Tensor:
        """The ids of a text, int64 [len(text)]; characters outside the vocabulary become `unknown`."""
        return _encode(text, self.vocabulary)

    def decode(self, ids: Tensor | Iterable[int]) -> str:
        """The text of ids [characters]; `unknown` becomes U+FFFD. Raises ValueError for an id outside 0..size-1."""
        values = ids.flatten().tolist() if isinstance(ids, Tensor) else list(ids)
        wrong = next((value for value in values if not 0 <= value < self.size), None)
        if wrong is not None:
            raise ValueError(f"text: id {wrong} is outside the vocabulary, whose ids are 0 to {self.size - 1}")
        symbols = self.vocabulary + UNKNOWN
        return "".join(symbols[value] for value in values)


def load(path: str | Path | None = None, *, minimum: int = 10_000, maximum: int | None = None) -> Corpus:
    """The corpus of a UTF-8 file, or of the Python documentation that every Python carries when path is None.

    Line ends become newlines and a byte-order mark is dropped. Of a text longer than `maximum` characters only the
    beginning is kept, and `source` says so. The last tenth of the characters, rounded down, is held out.
    Raises ValueError if the file cannot be read, is empty, is not text or has fewer than `minimum` characters,
    and RuntimeError if this Python was packaged without its documentation.
    """
    if path is None:
        text, source = _topics(), f"pydoc_data.topics of Python {platform.python_version()}"
    else:
        text, source = _read(Path(path)), str(path)
    if maximum is not None and len(text) > maximum:
        text, source = text[:maximum], f"{source} (first {maximum:,} of {len(text):,} characters)"
    return split(text, source=source, minimum=minimum)


def split(text: str, *, source: str, minimum: int = 10_000) -> Corpus:
    """Hold out the last tenth of a text; the vocabulary comes from the rest. Raises ValueError if it is too short."""
    # ten characters are the fewest of which a tenth is something
    minimum = max(minimum, 10)
    if not text.strip():
        raise ValueError(f"text: {source} is empty; at least {minimum:,} characters are needed")
    if len(text) < minimum:
        raise ValueError(f"text: {source} has {len(text):,} characters; at least {minimum:,} are needed")
    border = len(text) - len(text) // 10
    train, held_out = text[:border], text[border:]
    vocabulary = "".join(sorted(set(train)))
    return Corpus(_encode(train, vocabulary), _encode(held_out, vocabulary), vocabulary, source, train, held_out)


def join_topics(topics: Mapping[str, str]) -> str:
    """One text from help topics: ordered by key, a text that several keys share taken once, blank lines between."""
    return "\n\n".join(dict.fromkeys(topics[key] for key in sorted(topics)))


def _topics() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise RuntimeError("text: this Python comes without pydoc_data.topics; give a text with --text FILE") from error
    return join_topics(topics)


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"text: cannot read {path}: {error.strerror or error}") from error
    zero = data.find(b"\0")
    if zero >= 0:
        raise ValueError(f"text: {path} is not text: there is a zero byte at offset {zero:,}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text: {path} is not UTF-8: {error.reason} at offset {error.start:,} (byte 0x{data[error.start]:02x})"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _encode(text: str, vocabulary: str) -> Tensor:
    # sorted characters are sorted code points
    known, wanted = _code_points(vocabulary), _code_points(text)
    place = torch.searchsorted(known, wanted).clamp_(max=len(known) - 1)
    return torch.where(known[place] == wanted, place, len(vocabulary))


def _code_points(text: str) -> Tensor:
    # frombuffer refuses an empty buffer
    if not text:
        return torch.empty(0, dtype=torch.int64)
    # an explicit byte order keeps the codec from adding a byte-order mark; lone surrogates are characters too
    data = text.encode("utf-32-le" if sys.byteorder == "little" else "utf-32-be", "surrogatepass")
    return torch.frombuffer(bytearray(data), dtype=torch.int32).to(torch.int64)
