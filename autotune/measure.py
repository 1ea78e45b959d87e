"""Times callables against one another so that the ratios can be trusted: interleaved, in rotated order."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

# Short enough that a dozen candidates take a fraction of a second, long enough for the clock and for launches.
SAMPLE_SECONDS = 1e-3
MAX_REPEATS = 1 << 20
# How many rounds a run is in before it may be given up.
TRIES = 2


@dataclass(frozen=True)
class Timing:
    """Median and interquartile range in seconds per call over the rounds; rounds is 0 and both are nan if it got none.

    error: what the call raised; then it was taken out, and its times do not count.
    """

    median: float
    spread: float
    rounds: int
    error: Exception | None = None

    @classmethod
    def of(cls, samples: Sequence[float], error: Exception | None = None) -> Timing:
        if not samples:
            return cls(math.nan, math.nan, 0, error)
        spread = 0.0
        if len(samples) > 1:
            lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
            spread = upper - lower
        return cls(statistics.median(samples), spread, len(samples), error)


class Interleaved:
    """Rounds of samples, one of each run a round, each round starting with another run.

    runs: the callables. synchronize: waits for the device, called before each reading of the clock. give_up: a run
    that took more than so many times the fastest one's median, after two rounds, is not repeated further: it has lost,
    and would take most of the time. watch: given the number of a run and the last result of each of its samples, while
    the clock stands; what it raises counts as the run's error. clock: seconds, for tests.

    Whoever is interrupted in `rounds` still finds in `timings` what was measured so far.
    """

    def __init__(
        self,
        runs: Sequence[Callable[[], object]],
        *,
        synchronize: Callable[[], None] | None = None,
        give_up: float | None = None,
        watch: Callable[[int, object], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.runs = list(runs)
        self.give_up = give_up
        self.watch = watch
        self.clock = clock
        self._synchronize = synchronize or (lambda: None)
        self._repeats = [0] * len(self.runs)
        self._samples: list[list[float]] = [[] for _ in self.runs]
        self._errors: dict[int, Exception] = {}

    @property
    def timings(self) -> list[Timing]:
        """One a run, in the order of the runs."""
        return [Timing.of(samples, self._errors.get(i)) for i, samples in enumerate(self._samples)]

    def warm_up(self, seconds: float = math.inf) -> None:
        """Calls each run once, untimed."""
        deadline = self.clock() + seconds
        for i in range(len(self.runs)):
            if self.clock() < deadline:
                self._guarded(i, partial(self._time, i, 1))

    def rounds(self, count: int, seconds: float = math.inf, progress: Callable[[int], None] | None = None) -> None:
        """Up to `count` rounds; no sample is started when `seconds` are over. progress: told the rounds done."""
        deadline = self.clock() + seconds
        size = len(self.runs)
        for number in range(count):
            hopeless = self._hopeless() if number >= TRIES else set()
            for i in ((number + place) % size for place in range(size)):
                if self.clock() >= deadline:
                    return
                if i not in self._errors and i not in hopeless:
                    self._guarded(i, partial(self._sample, i))
            if progress:
                progress(number + 1)

    def _guarded(self, i: int, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self._errors[i] = error

    def _hopeless(self) -> set[int]:
        medians = {i: statistics.median(s) for i, s in enumerate(self._samples) if s and i not in self._errors}
        if self.give_up is None or not medians:
            return set()
        limit = self.give_up * min(medians.values())
        return {i for i, median in medians.items() if median > limit}

    def _sample(self, i: int) -> None:
        """Adds the seconds of one call. The first time, the number of calls is doubled until they last long enough."""
        repeats = self._repeats[i] or 1
        elapsed = self._time(i, repeats)
        while not self._repeats[i] and elapsed < SAMPLE_SECONDS and repeats < MAX_REPEATS:
            repeats *= 2
            elapsed = self._time(i, repeats)
        self._repeats[i] = repeats
        self._samples[i].append(elapsed / repeats)

    def _time(self, i: int, repeats: int) -> float:
        run = self.runs[i]
        self._synchronize()
        start = self.clock()
        # a result is let go before the next is made, as in a program: where memory is reused, that counts
        for _ in range(repeats - 1):
            run()
        result = run()
        self._synchronize()
        elapsed = self.clock() - start
        if self.watch:
            self.watch(i, result)
        return elapsed


def measure(
    runs: Sequence[Callable[[], object]],
    *,
    rounds: int = 7,
    seconds: float = math.inf,
    synchronize: Callable[[], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timing]:
    """Seconds per call of each run: the median of up to `rounds` interleaved rounds, after one call to warm up.

    Each sample repeats the call until it lasts about 1 ms. No sample is started when `seconds` are over, so that a
    run may have got fewer rounds than another, or none. A run that raises is taken out; its Timing has the error.
    """
    start = clock()
    interleaved = Interleaved(runs, synchronize=synchronize, clock=clock)
    interleaved.warm_up(seconds)
    interleaved.rounds(rounds, seconds - (clock() - start))
    return interleaved.timings
