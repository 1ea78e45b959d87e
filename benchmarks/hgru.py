"""HGRN's recurrence, its layer and a step of decoding: `python benchmarks/hgru.py`. Exit code 1 if a limit is missed.

A ratio to torch.add is to a float32 addition into memory that is there already, moving the same number of bytes. A
layer stands beside the products of its own projections. What is compared is timed interleaved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from limits import Row, main, medians, trainer
from torch import Tensor
from torch.nn.functional import linear

import mixers
from kernels.hgru import hgru

# forward, forward + backward
STREAMING = {torch.float32: (1.4, 2.2), torch.bfloat16: (1.8, 2.6)}
IN_CACHE = {torch.float32: 2.5, torch.bfloat16: 3.0}


def outputs(i: Tensor, f: Tensor, lower_bound: Tensor) -> Tensor:
    return hgru(i, f, lower_bound)[0]


def sampled(shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """i, f and a lower bound."""
    return [*(torch.randn(shape).to(dtype) for _ in range(2)), 0.9 * torch.rand(shape[2])]


def addition(size: int) -> Callable[[], object]:
    """Moves three tensors of `size` bytes."""
    a, b, out = (torch.rand(size // 4) for _ in range(3))
    return lambda: torch.add(a, b, out=out)


def streaming(rounds: int) -> Iterator[Row]:
    """Forward moves i, f and h, as much as one addition; backward i, f, h, dh, di and df, as much as two."""
    for dtype, limits in STREAMING.items():
        inputs = sampled((8, 2048, 1024), dtype)
        add = addition(inputs[0].nbytes)
        add_s, forward_s, train_s = medians([add, lambda i=inputs: outputs(*i), trainer(outputs, *inputs)], rounds)
        name = f"{list(inputs[0].shape)} {str(dtype).removeprefix('torch.')}"
        detail = f"add {add_s * 1e3:.2f} ms"
        yield Row(f"forward / add, {name}", forward_s / add_s, limits[0], "×", f"{forward_s * 1e3:.2f} ms, {detail}")
        detail = f"{train_s * 1e3:.2f} ms, three times {detail}"
        yield Row(f"forward + backward / add, {name}", train_s / (3 * add_s), limits[1], "×", detail)


def in_cache(rounds: int) -> Iterator[Row]:
    for dtype, limit in IN_CACHE.items():
        inputs = sampled((4, 1024, 512), dtype)
        add_s, forward_s = medians([addition(inputs[0].nbytes), lambda i=inputs: outputs(*i)], rounds)
        name = f"{list(inputs[0].shape)} {str(dtype).removeprefix('torch.')}"
        detail = f"{forward_s * 1e3:.2f} ms, add {add_s * 1e3:.2f} ms"
        yield Row(f"forward / add, {name}", forward_s / add_s, limit, "×", detail)


def layers(rounds: int) -> Iterator[Row]:
    for kind, limit in (("real", 1.15), ("complex", 1.25)):
        yield from layer_rows(mixers.build("hgrn", 512, complex=kind == "complex"), kind, limit, rounds)


def layer_rows(layer: mixers.SequenceMixer, kind: str, limit: float, rounds: int) -> Iterator[Row]:
    x = torch.randn(4, 2048, 512)

    def bare() -> list[Tensor]:
        with torch.no_grad():
            return projections(layer, x)

    def full() -> Tensor:
        with torch.no_grad():
            return layer(x)[0]

    alone, whole = medians([bare, full], max(rounds // 2, 3))
    detail = f"{whole * 1e3:.1f} ms, {alone * 1e3:.1f} ms"
    yield Row(f"layer / its projections, forward, {kind}", whole / alone, limit, "×", detail)
    steps = [training(lambda x: projections(layer, x), layer, x), training(lambda x: [layer(x)[0]], layer, x)]
    alone, whole = medians(steps, max(rounds // 2, 3))
    detail = f"{whole * 1e3:.1f} ms, {alone * 1e3:.1f} ms"
    yield Row(f"layer / its projections, forward + backward, {kind}", whole / alone, limit, "×", detail)


def decoding(rounds: int) -> Iterator[Row]:
    """One token of one sequence."""
    for kind in ("real", "complex"):
        layer, x = mixers.build("hgrn", 512, complex=kind == "complex"), torch.randn(1, 1, 512)
        with torch.no_grad():
            state = layer(x)[1]

        def bare(layer: mixers.SequenceMixer = layer, x: Tensor = x) -> None:
            with torch.no_grad():
                projections(layer, x)

        def step(layer: mixers.SequenceMixer = layer, x: Tensor = x, state: Any = state) -> None:
            with torch.no_grad():
                layer(x, state)

        alone, whole = medians([bare, step], 10 * rounds)
        detail = f"{whole * 1e6:.0f} µs, {alone * 1e6:.0f} µs"
        yield Row(f"decoding, layer / its projections, {kind}", whole / alone, 1.3, "×", detail)


def projections(layer: mixers.SequenceMixer, x: Tensor) -> list[Tensor]:
    """The layer's four linear maps and nothing else."""
    made = [linear(x, p.weight, p.bias) for p in (layer.i_proj, layer.f_proj, layer.g_proj)]
    return [*made, linear(made[0], layer.o_proj.weight, layer.o_proj.bias)]


def training(
    function: Callable[[Tensor], list[Tensor]], layer: mixers.SequenceMixer, x: Tensor
) -> Callable[[], object]:
    """Forward and backward with a gradient for the input and every parameter that takes part."""
    x = x.clone().requires_grad_()
    gradients = [torch.rand_like(y) for y in function(x)]
    leaves = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(function(x), leaves, gradients, allow_unused=True)


if __name__ == "__main__":
    sys.exit(main(__doc__, (streaming, in_cache, layers, decoding)))
