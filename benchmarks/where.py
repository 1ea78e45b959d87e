"""Where the time goes: what `python benchmarks/targets.py` says of a target that was missed.

The parts of a whole are timed interleaved with it, each by itself; what is left over is a part too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import acceptance
import hgru as recurrence
import peers
import torch
from limits import medians, trainer
from torch import Tensor

import mixers
from kernels.hgru.step import SOURCE, step
from kernels.jit_cpp import reason

Part = tuple[str, Callable[[], object]]


def said(what: str, whole: float, parts: Sequence[tuple[str, float]], rest: str) -> str:
    listed = [*parts, (rest, whole - sum(seconds for _, seconds in parts))]
    each = ", ".join(f"{name} {1e3 * seconds:.2f} ms ({seconds / whole:.0%})" for name, seconds in listed)
    return f"{what}: {1e3 * whole:.2f} ms = {each}"


def passes(shape: Sequence[int], dtype: torch.dtype, rounds: int, *, gates: bool) -> Iterator[str]:
    """Scan and hgru in three parts: an addition moves the same bytes, the scan does the recurrence with decays that are
    there, hgru computes its gates too."""
    inputs = recurrence.sampled(tuple(shape), dtype)  # type: ignore[arg-type]
    decays = [torch.rand(*shape).to(dtype), inputs[0]]
    add = recurrence.addition(inputs[0].nbytes)
    what = f"{list(shape)} {str(dtype).removeprefix('torch.')}"
    for direction, make, scanned, gated in (
        ("forward", partial, 1.0, 1.0),
        ("forward + backward", trainer, acceptance.TENSORS, 3.0),
    ):
        scan, hgru = make(acceptance.outputs, *decays), make(recurrence.outputs, *inputs)
        add_s, scan_s, *hgru_s = medians([add, scan, *([hgru] if gates else [])], rounds)
        recurring = scan_s - scanned * add_s
        if hgru_s:
            moved = [("memory", gated * add_s), ("recurrence and the call", recurring)]
            yield said(f"hgru {direction}, {what}", hgru_s[0], moved, "gates")
        else:
            yield said(f"scan {direction}, {what}", scan_s, [("memory", scanned * add_s)], "recurrence and the call")


def scan(rounds: int) -> Iterator[str]:
    yield from passes(acceptance.SHAPE, torch.float32, rounds, gates=False)


def small_scan(rounds: int) -> Iterator[str]:
    yield from passes((1, 2048, 256), torch.float32, 4 * rounds, gates=False)


def beside_peers(rounds: int) -> Iterator[str]:
    for shape in peers.SHAPES:
        yield from passes(shape, torch.float32, rounds, gates=False)


def hgru(rounds: int) -> Iterator[str]:
    for dtype in recurrence.STREAMING:
        yield from passes((8, 2048, 1024), dtype, rounds, gates=True)


def hgru_in_cache(rounds: int) -> Iterator[str]:
    for dtype in recurrence.IN_CACHE:
        yield from passes((4, 1024, 512), dtype, rounds, gates=True)


def layers(rounds: int) -> Iterator[str]:
    for kind in ("real", "complex"):
        layer = mixers.build("hgrn", 512, complex=kind == "complex")
        for direction in ("forward", "forward + backward"):
            yield layer_parts(layer, torch.randn(4, 2048, 512), None, f"{kind} layer, {direction}", max(rounds // 4, 3))


def decoding(rounds: int) -> Iterator[str]:
    """The whole layer is one native call, beside which there is only what finds and checks the tensors it reads."""
    for kind in ("real", "complex"):
        layer: Any = mixers.build("hgrn", 512, complex=kind == "complex")
        x, what = torch.randn(1, 1, 512), f"a step of decoding, {kind}"
        with torch.no_grad():
            state = layer(x)[1]
        if reason(SOURCE):
            yield layer_parts(layer, x, state, what, 10 * rounds)
            continue
        maps = [(m.weight, m.bias) for m in (layer.i_proj, layer.f_proj, layer.g_proj, layer.o_proj)]
        norm, theta = layer.norm, layer.theta if layer.complex else None
        options = {"width": layer.width, "center": norm.center, "gate_first": norm.gate_first, "eps": norm.eps}
        call = partial(step, x, state["h"], maps, (norm.weight, norm.bias), theta, layer.lower_bound(), **options)
        runs = [partial(layer, x, state), call, partial(recurrence.projections, layer, x)]
        whole, called, projected = medians([without_gradients(run, [], layer) for run in runs], 10 * rounds)
        line = said(what, whole, [("the call", called)], "what goes before it")
        yield f"{line}; torch's projections alone {1e3 * projected:.2f} ms"


def layer_parts(layer: Any, x: Tensor, state: Any, what: str, rounds: int) -> str:
    """Projections, recurrence, norm with its gate, and the rest: checks, views, and memory that is fresh."""
    i, f, g = (proj(x).detach() for proj in (layer.i_proj, layer.f_proj, layer.g_proj))
    before = None if state is None else state["h"]
    parts: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
        "": (lambda x: layer(x, state)[0], [x]),
        "projections": (lambda x: recurrence.projections(layer, x), [x]),
        "recurrence": (lambda i, f: layer.recur(i, f, before, 0, None)[0], [i, f]),
        "norm and gate": (layer.norm, [i, g]),
    }
    make = training if "backward" in what else without_gradients
    whole, *seconds = medians([make(function, inputs, layer) for function, inputs in parts.values()], rounds)
    return said(what, whole, list(zip([*parts][1:], seconds)), "the rest")


def without_gradients(function: Callable[..., Any], inputs: list[Tensor], _: torch.nn.Module) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return function(*inputs)

    return run


def training(function: Callable[..., Any], inputs: list[Tensor], layer: torch.nn.Module) -> Callable[[], object]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    made = function(*leaves)
    gradients = [torch.rand_like(y) for y in (made if isinstance(made, list) else [made])]

    def run() -> object:
        made = function(*leaves)
        outputs = made if isinstance(made, list) else [made]
        return torch.autograd.grad(outputs, [*leaves, *layer.parameters()], gradients, allow_unused=True)

    return run
