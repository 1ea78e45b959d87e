"""Matrix-state ops beside softmax attention on a CPU: `python benchmarks/matrix_states.py`. Exit code 1 for a miss.

Ratios to F.scaled_dot_product_attention(is_causal=True) on the same sizes; what is compared is timed interleaved.
Beside them stand the other backends, and other libraries' PyTorch paths where they are installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from libraries import peers_of
from limits import Row, main, medians, trainer
from peers import prepared, sampled
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

import mixers
from kernels.agreement import pose
from kernels.delta_rule import OP as DELTA
from kernels.delta_rule import delta_rule
from kernels.gla import OP as GLA
from kernels.gla import gla

SIZES = {"B": 2, "T": 2048, "H": 8, "K": 64, "V": 64}
# forward, forward + backward
LIMITS = {
    "gla, a decay per head": (0.21, 0.18),
    "gla, a decay per key": (0.40, 0.42),
    "delta_rule, a decay per head": (0.45, 0.48),
}


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def subject(what: str, length: int, backend: str = "auto") -> tuple[Callable[..., Tensor], list[Tensor]]:
    """What is timed: a function of tensors, and the tensors."""
    op, function = (GLA, gla) if what.startswith("gla") else (DELTA, delta_rule)
    J = keys(what)
    sampled = op.sample({**SIZES, "T": length, "J": J}, initial_state=False)
    inputs = [x.squeeze(3) if name == "log_decay" and J == 1 else x for name, x in sampled.items() if x is not None]
    return (lambda *inputs: function(*inputs, backend=backend)[0]), inputs


def keys(what: str) -> int:
    """Decays of a head."""
    return 1 if "per head" in what else SIZES["K"]


def backends(what: str, direction: str) -> tuple[str, list[str]]:
    """The one that "auto" picks, and the others that can run here, but for the loop."""
    op = GLA if what.startswith("gla") else DELTA
    sizes = {**SIZES, "J": keys(what)}
    problem = pose(op, direction, sizes, dtype=torch.float32, device=torch.device("cpu"), initial_state=False)
    able = [b.name for b in op.backends[1:] if not b.cannot(problem)]
    picked = op.choose(problem).backend.name
    return picked, [name for name in able if name != picked]


def others_of(what: str, direction: str) -> dict[str, Callable[[], object]]:
    """Other libraries' functions for the same problem, by name; without those that are not there or take seconds."""
    case, device = what.replace(", a decay", ""), torch.device("cpu")
    given = sampled(case, SIZES, torch.float32, device)
    found = {}
    for peer in peers_of(case, device):
        subject = prepared(peer, given, direction, longest=1.0)
        if isinstance(subject, str):
            print(f"        {peer.name} is left out of {what}, {direction}: {subject}", flush=True)
        else:
            found[peer.name] = subject.run(direction)
    return found


def ratios(rounds: int) -> Iterator[Row]:
    """What "auto" picks is held to the limits; every other backend's time stands beside it."""
    heads_first = [torch.randn(SIZES["B"], SIZES["H"], SIZES["T"], SIZES["K"]) for _ in range(3)]
    for n, direction in enumerate(("forward", "backward")):
        make: Callable[..., Callable[[], object]] = trainer if n else partial
        for what, limits in LIMITS.items():
            picked, others = backends(what, direction)
            named = [subject(what, SIZES["T"], name) for name in ("auto", *others)]
            runs = [make(softmax, *heads_first), *(make(run, *inputs) for run, inputs in named)]
            theirs = others_of(what, "forward+backward" if n else "forward")
            base, seconds, *slower = medians([*runs, *theirs.values()], max(rounds // 2, 3))
            beside = "".join(f", {name} {time * 1e3:.1f} ms" for name, time in zip((*others, *theirs), slower))
            detail = f"{picked} {seconds * 1e3:.1f} ms, attention {base * 1e3:.1f} ms{beside}"
            name = f"{what}, {'forward + backward' if n else 'forward'}"
            yield Row(name, seconds / base, limits[n], "×", detail)


def growth(rounds: int) -> Iterator[Row]:
    """Cost is linear in T."""
    for name in LIMITS:
        runs = [partial(run, *inputs) for run, inputs in (subject(name, 2048), subject(name, 16384))]
        short, long = medians(runs, max(rounds // 5, 3))
        detail = f"{long * 1e3:.0f} ms, {short * 1e3:.1f} ms at T = 2,048"
        yield Row(f"{name}, T = 16,384", long / short, 9.0, "×", detail)


def decoding(rounds: int) -> Iterator[Row]:
    """One token at dim 512, batch 1, beside the layer's own projections alone."""
    x = torch.randn(1, 1, 512)
    for name in mixers.names():
        mixer = mixers.build(name, 512)
        if mixer.family != "matrix-state linear RNN":
            continue
        weights = [m.weight for m in mixer.modules() if isinstance(m, torch.nn.Linear)]
        inputs = [torch.randn(1, 1, weight.shape[1]) for weight in weights]

        def projections(weights: list[Tensor] = weights, inputs: list[Tensor] = inputs) -> None:
            for x, weight in zip(inputs, weights):
                linear(x, weight)

        with torch.no_grad():
            state = mixer(x)[1]

            def step(mixer: mixers.SequenceMixer = mixer, state: object = state) -> None:
                with torch.no_grad():
                    mixer(x, state)

            alone, whole = medians([projections, step], rounds)
        yield Row(f"decoding, {name}", whole / alone, 5.0, "×", f"{whole * 1e6:.0f} µs, {alone * 1e6:.0f} µs")


if __name__ == "__main__":
    sys.exit(main(__doc__, (ratios, growth, decoding)))
