"""The scan beside other libraries' PyTorch paths on a CPU: `python benchmarks/peers.py`. Exit code 1 for a miss.

Forward and backward, the same numbers for everybody, each in the layout of its own; what is compared is timed
interleaved. `python -m pytest benchmarks --peers` has more ops and lengths, and rows for the speed pages.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from libraries import CASES, Inputs, Peer, peers_of
from limits import Row, main, medians, trainer
from sizes import accelerated, drawn
from timing import seconds_of
from torch import Tensor

from autotune.device import synchronizer
from kernels.agreement import pose
from kernels.catalogue import OPS
from kernels.problem import Problem

# From 2 to 64 MiB a tensor; one length for most, because torch generates code for each
SHAPES = ((2, 2048, 128), (2, 2048, 512), (8, 2048, 1024), (2, 8192, 256))
# Ours takes at most this share of the fastest peer's time, and of everybody's in geometric mean.
BEST, MEAN = 1 / 3, 1 / 10
# Whoever takes longer for one call is not repeated.
LONGEST = 6.0
# A peer that gives something else is not compared: its largest error, in the result's scale.
CLOSE = 0.1


@dataclass(frozen=True)
class Subject:
    """What is timed: a function of tensors."""

    function: Callable[..., Tensor]
    inputs: Sequence[Tensor]

    def run(self, direction: str) -> Callable[[], object]:
        if direction != "forward":
            return trainer(self.function, *self.inputs)

        def forward() -> Tensor:
            with torch.no_grad():
                return self.function(*self.inputs)

        return forward

    def result(self, direction: str) -> Tensor:
        """With a graph behind it if that is what is timed: it may be other code."""
        with torch.set_grad_enabled(direction != "forward"):
            return self.function(*(x.detach().requires_grad_(direction != "forward") for x in self.inputs)).detach()


def posed(case: str, direction: str, sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> Problem:
    """The op's problem, without an initial state."""
    op, axes, facts = OPS[CASES[case].op], CASES[case].axes, CASES[case].facts
    return pose(op, direction, {**sizes, **axes}, dtype=dtype, device=device, initial_state=False, **facts)


def sampled(case: str, sizes: Mapping[str, int], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Its tensors."""
    problem = posed(case, "forward", sizes, dtype, device)
    op = OPS[problem.op]
    tensors = drawn(op, problem).tensors
    return {arg.name: t for arg, t in zip(op.inputs, tensors) if t is not None}


def ours(case: str, given: Inputs) -> Subject:
    """Through the op, on the backend that it chooses."""
    op = OPS[CASES[case].op]
    defaults = {**op.options, **({"scale": given["k"].shape[-1] ** -0.5} if "scale" in op.options else {})}

    def function(*tensors: Tensor) -> Tensor:
        known = dict(zip(given, tensors))
        return op(*(known.get(arg.name) for arg in op.inputs), None, *defaults.values(), "auto")[0]

    return Subject(function, list(given.values()))


def prepared(
    peer: Peer, given: Inputs, direction: str, *, longest: float = LONGEST, generate: bool = True
) -> Subject | str:
    """The peer, called once or twice; or why it is not compared. generate: wait for those that generate code."""
    first = next(iter(given.values()))
    length, wait = first.shape[1], synchronizer(first.device)
    if peer.compiles and not generate:
        return "code is generated for a minute or more"
    if length % peer.multiple:
        return f"takes multiples of {peer.multiple} rows"
    try:
        function, inputs, back = peer.prepare(given)
        # kernels are tuned for a length by their first call, and are never that slow
        if length > 256 and not peer.compiles and not accelerated(first.device):
            few = {name: t[:, :256] if t.ndim > 2 and t.shape[1] == length else t for name, t in given.items()}
            brief = Subject(*peer.prepare(few)[:2]).run(direction)
            seconds = seconds_of(brief, wait) * length / 256
            # the first call warms up
            seconds = min(seconds, seconds_of(brief, wait) * length / 256) if seconds < 10 * longest else seconds
            if seconds > longest:
                return f"one call takes {seconds:.0f} s or more"
        subject = Subject(function, inputs)
        result, expected = back(subject.result(direction)), ours(peer.case, given).result("forward")
        error = float((result - expected).abs().max() / expected.abs().max())
        if not error <= CLOSE:
            return f"gives something else: off by {error:.2g} of the result's scale"
        if accelerated(first.device):
            seconds_of(subject.run(direction), wait)
        seconds = seconds_of(subject.run(direction), wait)
        if seconds > longest and not peer.compiles:
            return f"one call takes {seconds:.0f} s"
    except ImportError as error:
        return f"not installed ({error})"
    except Exception as error:
        return f"fails here: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return subject


def ratios(rounds: int) -> Iterator[Row]:
    """Ours over the fastest peer at each shape, and over everybody at all of them."""
    logarithms = []
    for number, (B, T, D) in enumerate(SHAPES):
        shape = f"[{B}, {T}, {D}] float32"
        given = sampled("scan", {"B": B, "T": T, "D": D}, torch.float32, torch.device("cpu"))
        found: dict[str, Subject] = {}
        for peer in peers_of("scan", torch.device("cpu")):
            # for one length those that generate code are enough of a wait
            subject = prepared(peer, given, "forward+backward", generate=SHAPES[0][1] == T)
            if isinstance(subject, str):
                print(f"        {peer.name} is left out at {shape}: {subject}", flush=True)
            else:
                found[peer.name] = subject
        if not found:
            continue
        runs = [subject.run("forward+backward") for subject in (ours("scan", given), *found.values())]
        own, *others = medians(runs, max(3, rounds // (3 + number)))
        times = dict(zip(found, others))
        logarithms += [math.log(own / seconds) for seconds in others]
        detail = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in sorted(times.items(), key=lambda t: t[1]))
        yield Row(f"scan forward + backward / the fastest peer, {shape}", own / min(others), BEST, "×",
                  f"ours {own * 1e3:.2f} ms, {detail}")  # fmt: skip
    if logarithms:
        mean = math.exp(sum(logarithms) / len(logarithms))
        yield Row("the same, geometric mean over peers and shapes", mean, MEAN, "×", f"{len(logarithms)} ratios")


if __name__ == "__main__":
    sys.exit(main(__doc__, (ratios,)))
