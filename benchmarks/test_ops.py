"""Every op on every backend: lengths x dtypes, forward and forward + backward, through the public operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sizes import drawn, sizes_of
from torch import Tensor

from kernels.agreement import Inputs, pose
from kernels.catalogue import OPS
from kernels.comparison import fits
from kernels.op import Op
from kernels.problem import Problem
from mixers.tables import sources


def subjects() -> Iterator[Any]:
    for op in OPS.values():
        for variant in ("real", "complex") if any(arg.pairs for arg in op.inputs) else ("",):
            for backend in op.backends:
                yield pytest.param(
                    op, variant, backend.name, id="-".join(filter(None, [op.name, variant, backend.name]))
                )


@pytest.mark.parametrize("op, variant, name", list(subjects()))
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_op(
    op: Op, variant: str, name: str, direction: str, length: int, dtype_name: str, device: torch.device, timer: Any
) -> None:
    facts = {"pairs": True} if variant == "complex" else {}
    problems = [
        pose(op, part, sizes_of(op, length, device), dtype=getattr(torch, dtype_name), device=device, **facts)
        for part in direction.split("+")
    ]
    backend = op.backend(name)
    for problem in problems:
        if reasons := backend.cannot(problem):
            pytest.skip("; ".join(reasons))
        # the loop keeps intermediate results of every step
        if backend is op.backends[0] and not fits(op, problem):
            pytest.skip("the loop would need too much memory or time")
        if backend is op.backends[0] and timer.benchmark.disabled:
            pytest.skip("the loop has nothing to compile")
    inputs = drawn(op, problems[0])
    plans = [op.choose(problem) for problem in problems]
    run = forward(inputs, name) if direction == "forward" else forward_backward(inputs, name)
    timer(
        run,
        {**described(problems, variant), "backend": name, "chosen": all(plan.backend.name == name for plan in plans)},
    )


def forward(inputs: Inputs, backend: str) -> Callable[[], object]:
    op, args = inputs.op, arguments(inputs, backend)

    def run() -> object:
        with torch.no_grad():
            return op(*args)

    return run


def forward_backward(inputs: Inputs, backend: str) -> Callable[[], object]:
    """All gradients of a loss on every output."""
    op, args = inputs.op, arguments(inputs, backend)
    leaves = [arg.requires_grad_() for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
    through = [n for n, out in enumerate(op.outputs) if out.differentiable]
    with torch.no_grad():
        outputs = op(*args)
    gradients = [torch.randn_like(outputs[n]) for n in through]

    def run() -> object:
        outputs = op(*args)
        return torch.autograd.grad([outputs[n] for n in through], leaves, gradients, allow_unused=True)

    return run


def arguments(inputs: Inputs, backend: str) -> list[Any]:
    return [*inputs.tensors, inputs.cu_seqlens, *(inputs.problem.options[name] for name in inputs.op.options), backend]


def described(problems: list[Problem], variant: str) -> dict[str, Any]:
    first = problems[0]
    return {
        "kind": "op",
        "name": first.op,
        "variant": variant,
        "direction": "+".join(problem.direction for problem in problems),
        "dtype": first.dtype_name,
        "length": first.sizes["T"],
        "sizes": {axis: size for axis, size in first.sizes.items() if axis not in ("T", "N")},
        "source": sources("op", first.op, first.device.type),
        "bytes": sum(OPS[first.op].cost(problem).bytes for problem in problems),
        "flops": sum(OPS[first.op].cost(problem).flops for problem in problems),
    }
