"""Packed sequences beside one that holds NaN and inf: on every backend of every op, the others do not see them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kernels.agreement import draw, pose
from kernels.catalogue import OPS
from kernels.op import Op
from kernels.problem import Arg

SIZES = {"B": 1, "N": 5, "T": 48, "S": 48, "H": 2, "G": 1, "K": 4, "V": 5, "D": 3, "W": 4, "J": 4}

BACKENDS = [(op.name, b.name) for op in OPS.values() for b in op.backends if not b.devices or "cpu" in b.devices]

# an index of a tensor's first axes
Index = tuple[int | slice, ...]


def rows(arg: Arg, n: int, cu_seqlens: list[int]) -> Index | None:
    """Where a tensor holds what belongs to a sequence; None of parameters, whose gradients are sums over all."""
    if "N" in arg.letters:
        return (n,)
    return (0, slice(cu_seqlens[n], cu_seqlens[n + 1])) if {"T", "S"} & set(arg.letters) else None


def spoilt(op: Op, tensors: dict[str, torch.Tensor | None], name: str, n: int, cu_seqlens: list[int]) -> None:
    """Puts inf into the first row of a tensor's sequence and NaN into its last; one of both where it has no rows."""
    arg = next(arg for arg in (*op.inputs, *op.outputs) if name in (arg.name, f"d{arg.name}"))
    where, tensor = rows(arg, n, cu_seqlens), tensors[name]
    if where is not None and tensor is not None and tensor.is_floating_point() and tensor[where].numel():
        tensors[name] = tensor = tensor.clone()
        ends = tensor[where].unbind(0)
        ends[0].fill_(math.inf)
        ends[-1].fill_(math.nan)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("name", "backend_name"), BACKENDS)
def test_what_is_not_finite_stays_in_its_sequence(name: str, backend_name: str, direction: str) -> None:
    op = OPS[name]
    backend = op.backend(backend_name)
    flags = [option for option, default in op.options.items() if isinstance(default, bool)]
    flags += ["pairs"] if any(arg.pairs for arg in op.inputs) else []
    optional = [arg.name for arg in op.inputs if arg.optional and arg.role != "index"]
    for given in (False, True):
        facts = {**dict.fromkeys((*flags, *optional), given), "packed": True}
        problem = pose(op, direction, SIZES, dtype=torch.float32, device=torch.device("cpu"), **facts)
        assert not backend.cannot(problem)
        inputs = draw(op, problem)
        assert inputs.cu_seqlens is not None
        cu_seqlens, names = inputs.cu_seqlens.tolist(), op.names(direction)
        # the longest with a neighbour on either side
        n = 1 + int(inputs.cu_seqlens.diff()[1:-1].argmax())
        for config in backend.configs(problem):
            if config.get("inductor"):
                continue
            expected = inputs.call(backend, config)()
            for some in (*((name,) for name in names), names):
                tensors = dict(zip(names, inputs.tensors))
                for each in some:
                    spoilt(op, tensors, each, n, cu_seqlens)
                found = replace(inputs, tensors=tuple(tensors.values())).call(backend, config)()
                for arg, one, two in zip(inputs.results, expected, found):
                    for m in {*range(5)} - {n}:
                        where = rows(arg, m, cu_seqlens)
                        if where is None or one is None:
                            continue
                        assert two is not None
                        assert torch.equal(one[where], two[where]), f"{arg.name} of {m}, {some} of {n} ({problem})"
