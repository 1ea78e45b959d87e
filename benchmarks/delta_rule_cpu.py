"""The gated delta rule in chunks against causal attention of the same shape: `python benchmarks/delta_rule_cpu.py`.

Exit code 1 if a limit is missed. What is compared is timed interleaved, so that a busy machine slows down both sides.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import autotune
from autotune.measure import measure
from kernels.delta_rule import OP, delta_rule

ROUNDS = 15
B, T, H, D = 2, 2048, 8, 64


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def ours(*inputs: Tensor) -> Tensor:
    return delta_rule(*inputs, backend="compiled")[0]


def trainer(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    gradient = torch.rand_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, gradient)


def ratios(rounds: int) -> Iterator[tuple[str, float, float, str]]:
    """(what, ratio, limit, detail)"""
    sizes = {"B": B, "T": T, "H": H, "K": D, "V": D}
    heads_first = [torch.randn(B, H, T, D) for _ in range(3)]
    runs: list[Callable[[], object]] = [lambda: attention(*heads_first), trainer(attention, *heads_first)]
    names = []
    for what, J in (("per head", 1), ("per key", D)):
        sampled = [x for x in OP.sample({**sizes, "J": J}, initial_state=False).values() if x is not None]
        # [B, T, H] is one decay for all keys of a head
        sampled[-1] = sampled[-1] if J > 1 else sampled[-1][..., 0]
        runs += [partial(ours, *sampled), trainer(ours, *sampled)]
        names.append(what)
    timings = measure(runs, rounds=rounds)
    for timing in timings:
        if timing.error is not None:
            raise timing.error
    forward, both, *rest = [timing.median for timing in timings]
    for i, name in enumerate(names):
        limits = (0.45, 0.48) if name == "per head" else (float("inf"), float("inf"))
        for seconds, beside, limit, what in zip(rest[2 * i :], (forward, both), limits, ("forward", "both ways")):
            detail = f"{seconds * 1e3:.1f} ms, attention {beside * 1e3:.1f} ms"
            yield f"decay {name}, {what}", seconds / beside, limit, detail


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    machine = f"{autotune.fingerprint(torch.device('cpu'))}, torch {torch.__version__}, {given.threads} threads"
    print(f"{machine}, B={B} T={T} H={H} K=V={D} float32, {given.rounds} interleaved rounds, medians")
    missed = 0
    for what, ratio, limit, detail in ratios(given.rounds):
        verdict = "      " if limit == float("inf") else "ok    " if ratio <= limit else "MISSED"
        print(f"{verdict}  {ratio:5.2f} x of {limit:4.2f}  {what}  ({detail})", flush=True)
        missed += ratio > limit
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
