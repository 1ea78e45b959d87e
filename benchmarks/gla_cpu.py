"""Gated linear attention on CPU against softmax attention: `python benchmarks/gla_cpu.py`. Exit code 1 if a limit is
missed.

Ratios to F.scaled_dot_product_attention(is_causal=True) on the same sizes; what is compared is timed interleaved.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

import autotune
from autotune.measure import measure
from kernels.gla import gla

B, T, H, K = 2, 2048, 8, 64
# Of the time of softmax attention: forward, forward and backward
LIMITS = {"per head": (0.21, 0.18), "per key": (0.40, 0.42)}


def trainer(run: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    gradient = torch.rand_like(run(*inputs))
    return lambda: torch.autograd.grad(run(*leaves), leaves, gradient)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{autotune.fingerprint(torch.device('cpu'))}, torch {torch.__version__}, {options.threads} threads, medians")
    q, k, v = (torch.randn(B, T, H, K) for _ in range(3))
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    decays = {"per key": logsigmoid(3 + 2 * torch.randn(B, T, H, K))}
    decays["per head"] = decays["per key"][..., 0].contiguous()

    def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    def linear(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        return gla(q, k, v, log_decay, backend=options.backend)[0]

    missed = 0
    for training, what in enumerate(("forward", "forward + backward")):
        make = trainer if training else partial
        runs = [make(softmax, *heads_first), *(make(linear, q, k, v, decay) for decay in decays.values())]
        base, *timings = measure(runs, rounds=options.rounds)
        for name, timing in zip(decays, timings):
            ratio, limit = timing.median / base.median, LIMITS[name][training]
            missed += ratio > limit
            verdict = "ok    " if ratio <= limit else "MISSED"
            detail = f"{timing.median * 1e3:.1f} ms, softmax attention {base.median * 1e3:.1f} ms"
            print(f"{verdict}  {ratio:5.2f} of {limit:.2f}  decay {name}, {what}  ({detail})", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
