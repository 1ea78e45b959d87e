"""The demo's text and its yardsticks: splitting, unknown characters, Witten-Bell by hand, xz, and every error."""

from __future__ import annotations

import lzma
import math
import random
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mixers.demo.ngram import NGram, Yardsticks, xz_bits_per_character, yardsticks
from mixers.demo.text import UNKNOWN, join_topics, load, split

PROSE = "The quick brown fox jumps over the lazy dog; the dog sleeps. " * 20


def brute_force(train: list[int], size: int, history: list[int], target: int) -> float:
    """Witten-Bell as it is written: the probability of target after the whole history, by counting afresh."""
    probability = 1 / size
    for k in range(len(history) + 1):
        context = history[len(history) - k :]
        after = Counter(train[t] for t in range(k, len(train)) if train[t - k : t] == context)
        if after:
            probability = (after[target] + len(after) * probability) / (after.total() + len(after))
    return probability


def test_the_last_tenth_is_held_out() -> None:
    text = "abcdefghi" * 111 + "j"
    corpus = split(text, source="letters", minimum=10)
    assert (len(corpus.train), len(corpus.held_out)) == (900, 100)
    assert corpus.train_text + corpus.held_out_text == text
    assert corpus.train.dtype == corpus.held_out.dtype == torch.int64
    assert corpus.decode(corpus.train) == corpus.train_text
    assert corpus.source == "letters"


def test_characters_that_training_lacks_are_unknown() -> None:
    corpus = split("ba" * 45 + "abz\N{GRINNING FACE}abab" + "ab", source="letters", minimum=10)
    assert (corpus.vocabulary, corpus.unknown, corpus.size) == ("ab", 2, 3)
    assert corpus.held_out.tolist() == [0, 1, 2, 2, 0, 1, 0, 1, 0, 1]
    assert corpus.decode(corpus.held_out) == "ab" + 2 * UNKNOWN + "ababab"
    assert corpus.held_out_text == "abz\N{GRINNING FACE}ababab"
    assert all(math.isfinite(bits) for bits in NGram(corpus.train, corpus.size).bits_per_character(corpus.held_out))


@given(st.text(max_size=50))
@example("")
@example("\0\uffff\U0010ffff\ud800")
def test_encode_and_decode_are_inverse_on_the_vocabulary(text: str) -> None:
    corpus = split(PROSE + text, source="drawn", minimum=10)
    ids = corpus.encode(text)
    assert ids.shape == (len(text),)
    known = "".join(character if character in corpus.vocabulary else UNKNOWN for character in text)
    assert corpus.decode(ids) == corpus.decode(ids.tolist()) == known
    assert corpus.decode(corpus.train) == corpus.train_text


def test_topics_are_ordered_by_key_and_deduplicated() -> None:
    assert join_topics({"b": "two", "c": "one", "a": "one", "d": "three"}) == "one\n\ntwo\n\nthree"
    corpus = load()
    text = corpus.train_text + corpus.held_out_text
    assert len(text) == sum(map(len, set(topics.values()))) + 2 * (len(set(topics.values())) - 1)
    assert text == join_topics(dict(reversed(topics.items())))
    assert text.startswith(topics[min(topics)])
    assert "pydoc_data" in corpus.source


def test_a_file_loses_its_mark_and_foreign_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"one\r\ntwo\rthree\n" * 10)
    corpus = load(path, minimum=10)
    assert corpus.train_text + corpus.held_out_text == "one\ntwo\nthree\n" * 10
    assert corpus.source == str(path)
    shorter = load(str(path), minimum=10, maximum=20)
    assert shorter.train_text + shorter.held_out_text == "one\ntwo\nthree\none\ntw"
    assert shorter.source == f"{path} (first 20 of 140 characters)"
    assert load(path, minimum=10, maximum=140).source == str(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; at least 10,000 characters"),
        (b" \n\t" * 9000, "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"a" * 9_999, "has 9,999 characters; at least 10,000 are needed"),
        (b"a" * 20_000 + b"\0", "is not text: there is a zero byte at offset 20,000"),
        (b"text " * 3000 + b"caf\xe9", r"is not UTF-8: .* at offset 15,003 \(byte 0xe9\)"),
    ],
)
def test_files_that_are_no_text_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read .*absent\.txt: No such file"):
        load(tmp_path / "absent.txt")
    with pytest.raises(ValueError, match="cannot read"):
        load(tmp_path)


def test_a_python_without_its_documentation_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(RuntimeError, match="--text FILE"):
        load()


@pytest.mark.parametrize("wrong", [-1, 3])
def test_decoding_a_foreign_id_is_refused(wrong: int) -> None:
    corpus = split("ab" * 50, source="letters", minimum=10)
    with pytest.raises(ValueError, match=f"id {wrong} is outside .* 0 to 2"):
        corpus.decode([0, wrong])


def test_witten_bell_by_hand() -> None:
    a, b, unknown = 0, 1, 2
    model = NGram(torch.tensor([a, b, a, a, b]), 3, context=2)
    by_hand = {
        # no context: a 3 times, b twice, 2 different, 1/3 below
        (0, (unknown, unknown)): [Fraction(11, 21), Fraction(8, 21), Fraction(2, 21)],
        # after a: a once, b twice; after b: a once; nothing ever followed the unknown
        (1, (b, a)): [Fraction(43, 105), Fraction(58, 105), Fraction(4, 105)],
        (1, (a, b)): [Fraction(16, 21), Fraction(4, 21), Fraction(1, 21)],
        (1, (a, unknown)): [Fraction(11, 21), Fraction(8, 21), Fraction(2, 21)],
        # ab was followed by a, aa by b, and bb was never seen: the model of context 1 stands
        (2, (a, b)): [Fraction(37, 42), Fraction(2, 21), Fraction(1, 42)],
        (2, (a, a)): [Fraction(43, 210), Fraction(163, 210), Fraction(2, 105)],
        (2, (b, b)): [Fraction(16, 21), Fraction(4, 21), Fraction(1, 21)],
    }
    for (k, context), expected in by_hand.items():
        got = model.probabilities(torch.tensor([context] * 3), torch.arange(3))[k]
        assert got.tolist() == pytest.approx([float(p) for p in expected], rel=1e-12), (k, context)
    # a after ab, b after ba, unknown after ab
    bits = model.bits_per_character(torch.tensor([a, b, unknown]))[2]
    assert bits == pytest.approx(-math.log2(37 / 42 * 29 / 105 * 1 / 42) / 3, rel=1e-12)


@given(st.integers(1, 5), st.integers(0, 3), st.lists(st.integers(0, 4), min_size=4, max_size=40), st.data())
def test_every_context_length_agrees_with_counting_afresh(
    size: int, context: int, ids: list[int], data: st.DataObject
) -> None:
    train = [value % size for value in ids]
    held_out = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=10))
    bits = NGram(torch.tensor(train), size, context=context).bits_per_character(torch.tensor(held_out))
    text = train + held_out
    for k in range(context + 1):
        by_counting = [
            -math.log2(brute_force(train, size, text[t - k : t], text[t])) for t in range(len(train), len(text))
        ]
        assert bits[k] == pytest.approx(sum(by_counting) / len(held_out), rel=1e-9, abs=1e-12)


def test_probabilities_sum_to_one_over_the_vocabulary_and_unknown() -> None:
    corpus = load()
    model = NGram(corpus.train, corpus.size)
    generator = torch.Generator().manual_seed(0)
    # contexts that held-out text really has, contexts of random ids, and mixtures of both
    starts = torch.randint(len(corpus.held_out) - 6, (100,), generator=generator)
    real = corpus.held_out.unfold(0, 6, 1)[starts]
    drawn = torch.randint(corpus.size, real.shape, generator=generator)
    mixed = torch.where(torch.rand(real.shape, generator=generator) < 0.3, drawn, real)
    contexts = torch.cat([real, drawn, mixed, torch.full((1, 6), corpus.unknown)])
    targets = torch.arange(corpus.size).repeat(len(contexts))
    probabilities = model.probabilities(contexts.repeat_interleave(corpus.size, dim=0), targets)
    assert probabilities.shape == (7, len(contexts) * corpus.size)
    assert (probabilities > 0).all()
    totals = probabilities.view(7, len(contexts), corpus.size).sum(-1)
    torch.testing.assert_close(totals, torch.ones_like(totals), rtol=1e-12, atol=0)


def test_a_wide_vocabulary_does_not_overflow() -> None:
    # 100,000 ids to the power of 7 is beyond 64 bits
    rng = random.Random(0)
    train = [rng.randrange(100_000) for _ in range(2000)]
    model = NGram(torch.tensor(train), 100_000)
    held_out = train[500:510]
    text = train + held_out
    expected = -sum(math.log2(brute_force(train, 100_000, text[t - 6 : t], text[t])) for t in range(2000, 2010))
    assert model.bits_per_character(torch.tensor(held_out))[6] == pytest.approx(expected / 10, rel=1e-9)


def test_xz_is_the_size_of_the_file() -> None:
    rng = random.Random(0)
    train = "".join(rng.choice("abcdefgh\u00e9") for _ in range(400_000))
    held_out = train[1000:3000]
    texts = (held_out, train + held_out, train)
    sizes = [len(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)) for text in texts]
    alone, continued = xz_bits_per_character(train, held_out)
    assert alone == 8 * sizes[0] / 2000
    assert continued == 8 * (sizes[1] - sizes[2]) / 2000
    assert continued < 0.1 < 3 < alone


def test_wrong_input_to_the_yardsticks_is_refused() -> None:
    ids = torch.tensor([0, 1, 0, 1, 0, 1, 0])
    with pytest.raises(ValueError, match="7 training ids are too few for a context of 7"):
        NGram(ids, 2, context=7)
    with pytest.raises(ValueError, match="context must be at least 0, got -1"):
        NGram(ids, 2, context=-1)
    with pytest.raises(ValueError, match=r"ids must be in 0\.\.0, got 0 to 1"):
        NGram(ids, 1)
    with pytest.raises(ValueError, match=r"one axis, got shape \[1, 7\]"):
        NGram(ids[None], 2)
    with pytest.raises(ValueError, match="held-out part is empty"):
        NGram(ids, 2).bits_per_character(ids[:0])
    with pytest.raises(ValueError, match=r"ids must be in 0\.\.1, got -1 to -1"):
        NGram(ids, 2).bits_per_character(-torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="held-out part is empty"):
        xz_bits_per_character("abc", "")


def test_the_best_ngram_is_the_shortest_of_the_best() -> None:
    result = Yardsticks({1: 3.0, 2: 2.0, 3: 2.0, 4: 2.5}, xz_alone=2.0, xz_continued=1.5)
    assert (result.best_context, result.best_ngram) == (2, 2.0)


def test_yardsticks_of_the_documentation() -> None:
    result = yardsticks(load())
    assert list(result.ngram) == [1, 2, 3, 4, 5, 6]
    assert result.best_ngram == min(result.ngram.values()) < result.ngram[1]
    assert result.xz_continued < result.xz_alone
    if sys.version_info[:2] == (3, 11):
        figures = {2: 2.47, 3: 2.02, 4: 1.90}
        assert {k: result.ngram[k] for k in figures} == pytest.approx(figures, abs=0.01)
        assert result.best_context == 4
        assert (result.xz_alone, result.xz_continued) == pytest.approx((2.01, 1.41), abs=0.01)
