"""Timing, with a clock of our own: what is called when, and what is made of the readings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.measure import Interleaved, Timing, measure


class Bench:
    """A clock that only runs advance, and a log of the calls."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def clock(self) -> float:
        return self.now

    def run(self, name: str, *seconds: float) -> Callable[[], None]:
        """A run that takes these seconds in turn, the last for ever."""
        left = list(seconds)

        def call() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_rounds_are_interleaved_and_rotated(bench: Bench) -> None:
    timings = measure([bench.run(n, 1.0) for n in "abc"], rounds=4, clock=bench.clock)
    assert "".join(bench.log) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert timings == [Timing(1.0, 0.0, 4)] * 3


def test_median_and_interquartile_range(bench: Bench) -> None:
    warm_up, samples = 9.0, [1.0, 2.0, 3.0, 4.0, 100.0]
    (timing,) = measure([bench.run("a", warm_up, *samples)], rounds=5, clock=bench.clock)
    assert timing.median == 3.0
    assert timing.spread == pytest.approx(2.0)
    assert timing.rounds == 5


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=20))
def test_a_timing_lies_within_its_samples(samples: list[float]) -> None:
    timing = Timing.of(samples)
    assert timing.median == statistics.median(samples)
    assert 0 <= timing.spread <= max(samples) - min(samples)
    assert timing.rounds == len(samples)


def test_short_calls_are_repeated_until_they_last(bench: Bench) -> None:
    (timing,) = measure([bench.run("a", 1e-5)], rounds=2, clock=bench.clock)
    # The warm-up, then 1 + 2 + 4 + ... + 128 calls to find 128 (1.28 ms), then 128 at once.
    assert len(bench.log) == 1 + 255 + 128
    assert timing.median == pytest.approx(1e-5)


def test_a_clock_that_stands_still_does_not_hang() -> None:
    interleaved = Interleaved([lambda: None], clock=lambda: 0.0)
    interleaved.rounds(1)
    assert interleaved.timings[0].rounds == 1


def test_long_calls_are_not_repeated(bench: Bench) -> None:
    measure([bench.run("a", 0.5)], rounds=3, clock=bench.clock)
    assert len(bench.log) == 1 + 3


def test_no_sample_starts_after_the_time_is_over(bench: Bench) -> None:
    # Warm-up until 3, then a full round until 6, a at 7, and then it is over.
    timings = measure([bench.run(n, 1.0) for n in "abc"], rounds=99, seconds=6.5, clock=bench.clock)
    assert [t.rounds for t in timings] == [1, 2, 1]
    assert bench.now == 7.0


def test_who_got_no_round_has_no_time(bench: Bench) -> None:
    timings = measure([bench.run("a", 1.0), bench.run("b", 1.0)], rounds=3, seconds=2.5, clock=bench.clock)
    assert [t.rounds for t in timings] == [1, 0]
    assert math.isnan(timings[1].median)


def test_the_device_is_waited_for_on_both_sides_of_a_sample(bench: Bench) -> None:
    queued = [0.0]

    def launch() -> None:
        queued[0] += 2.0

    def wait() -> None:
        bench.now += queued[0]
        queued[0] = 0.0

    # What others have queued before does not count.
    queued[0] = 50.0
    interleaved = Interleaved([launch], synchronize=wait, clock=bench.clock)
    interleaved.rounds(3)
    assert interleaved.timings == [Timing(2.0, 0.0, 3)]
    assert bench.now == 56.0


def test_a_run_that_raises_is_taken_out_and_told(bench: Bench) -> None:
    calls = []

    def fails() -> None:
        calls.append(1)
        bench.now += 1.0
        if len(calls) == 3:
            raise RuntimeError("tired")

    good, bad = measure([bench.run("a", 1.0), fails], rounds=5, clock=bench.clock)
    assert (good.rounds, good.error) == (5, None)
    assert str(bad.error) == "tired"
    assert len(calls) == 3


def test_an_interrupt_leaves_what_was_measured(bench: Bench) -> None:
    calls = []

    def interrupted() -> None:
        calls.append(1)
        bench.now += 1.0
        if len(calls) == 3:
            raise KeyboardInterrupt

    interleaved = Interleaved([bench.run("a", 1.0), interrupted, bench.run("c", 2.0)], clock=bench.clock)
    with pytest.raises(KeyboardInterrupt):
        interleaved.rounds(9)
    # abc, bca, ca and then the third call of b.
    assert [t.rounds for t in interleaved.timings] == [3, 2, 3]
    assert [t.median for t in interleaved.timings] == [1.0, 1.0, 2.0]


def test_a_hopeless_run_gets_two_rounds(bench: Bench) -> None:
    runs = [bench.run("slow", 10.0), bench.run("fast", 1.0), bench.run("close", 3.9)]
    interleaved = Interleaved(runs, give_up=4.0, clock=bench.clock)
    interleaved.rounds(5)
    assert [t.rounds for t in interleaved.timings] == [2, 5, 5]


def test_nothing_to_measure() -> None:
    assert measure([]) == []
