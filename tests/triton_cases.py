"""Problems for Triton kernels, which apart/*_values.py run in the interpreter and apart/*_compile.py compile."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.agreement import Expected, Inputs, draw, pose
from kernels.catalogue import OPS
from kernels.op import Backend, Op
from kernels.triton_aot import Compiled

FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# Of decays or parameters, and of sequences
DTYPES = [(d, d) for d in (FLOAT64, FLOAT32, FLOAT16, BFLOAT16)] + [(FLOAT32, FLOAT16), (FLOAT32, BFLOAT16)]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# A tile of 32 numbers to a program, a state kept before every fourth row
CONFIG = {"numbers": 1, "num_warps": 1, "rows": 4}
HARD = torch.tensor([-math.inf, math.log(1e-30), math.log(1e-3), math.log(0.5), 0.0], dtype=torch.float64)
# An empty sequence at either end, two in a row in the middle, one of a single row, some that end with a chunk
PACKED = (0, 0, 3, 3, 3, 4, 8, None, None)
# Of the delta rule and dplr in chunks: none that is whole, or one and one of a single row; one tile of keys, or more
CHUNKS_OF_RANK_ONE = {
    "length": (3, 17),
    "keys": (8, 20, 40),
    "values": (1, 19),
    "dtype": (FLOAT32, FLOAT16, BFLOAT16, BFLOAT16),
    "per_key": (False, True, True),
    "log_decay": (True, True, False),
    "hard": (False, True),
    "packed": (False, True),
    "initial_state": (False, True),
}


@pytest.fixture(autouse=True)
def uninitialised_is_nan(nan_filled: None) -> None:
    """For whoever imports it."""


def triton(op: str) -> Backend:
    return OPS[op].backend("triton")


def cases(facts: Mapping[str, Sequence[Any]], count: int) -> list[dict[str, Any]]:
    """Random combinations, the same ones each time, in which the values of a fact occur equally often (to one)."""
    columns = {}
    for name, values in facts.items():
        assert count >= len(values), name
        columns[name] = random.Random(name).sample([values[i % len(values)] for i in range(count)], count)
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


def posed(
    op: Op, direction: str, sizes: Mapping[str, int], *, dtype: torch.dtype = FLOAT32, packed: bool = False,
    hard: bool = False, **facts: Any,
) -> Inputs:  # fmt: skip
    """A problem with its tensors; packed: one batch, cut at PACKED; hard: half of its log decays are of HARD."""
    length = sizes["T"]
    sizes = {**sizes, "B": 1, "N": len(PACKED) - 1} if packed else sizes
    problem = pose(op, direction, sizes, dtype=dtype, device=torch.device("cpu"), packed=packed, **facts)
    inputs = draw(op, problem, seed=length)
    tensors = dict(zip(op.names(direction), inputs.tensors))
    mild = tensors.get("log_decay")
    if hard and mild is not None:
        generator = torch.Generator().manual_seed(length)
        chosen = HARD[torch.randint(len(HARD), mild.shape, generator=generator)].to(mild.dtype)
        tensors["log_decay"] = torch.where(torch.rand(mild.shape, generator=generator) < 0.5, chosen, mild)
    bounds = sorted(length if b is None else min(b, length) for b in PACKED)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32) if packed else None
    return replace(inputs, tensors=tuple(tensors.values()), cu_seqlens=cu_seqlens)


def without(inputs: Inputs, name: str) -> Inputs:
    """The same where one of the tensors is None."""
    names = inputs.op.names(inputs.problem.direction)
    return replace(inputs, tensors=tuple(None if n == name else t for n, t in zip(names, inputs.tensors)))


def distinct(configs: Sequence[dict[str, int]]) -> list[dict[str, int]]:
    """Without those that are no other code: how many steps a chunk has is an argument."""
    return list({str({**config, "split": "split" in config}): config for config in configs}.values())


def check_resources(found: Compiled) -> None:
    """No spills, and a quarter of the warps resident; and that of a kernel, not of the bare trap that the compiler can
    leave in its place."""
    assert found.registers >= 16, found
    assert sum(found.stores.values()) > 0, found
    assert found.spills == 0, found
    assert found.occupancy >= 0.25, found


def size(*tensors: torch.Tensor | None) -> int:
    """In bytes."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def agrees(inputs: Inputs, config: Mapping[str, int] = CONFIG) -> None:
    wrong = Expected.of(inputs).difference(inputs.call(inputs.op.backend("triton"), config)())
    assert wrong is None, f"{wrong} ({inputs.problem})"


def check_bytes(inputs: Inputs, config: Mapping[str, int], launches: int, limit: float = 1.05) -> None:
    """So many launches, and nothing beside them, move at most so many times the bytes of what goes in and comes out."""
    from triton_interpreter import counting

    with counting() as traffic:
        found = inputs.call(inputs.op.backend("triton"), config)()
    assert (traffic.launches, traffic.outside) == (launches, 0)
    least = size(*inputs.tensors, *found)
    assert 0.97 * least <= traffic.moved <= limit * least, (inputs.problem, config)


def check_any_order(inputs: Inputs, config: Mapping[str, int] = CONFIG) -> None:
    """Programs in random order give the same bits."""
    from triton_interpreter import shuffled

    call = inputs.call(inputs.op.backend("triton"), config)
    expected = call()
    with shuffled(0):
        found = call()
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        assert f is None or (e is not None and torch.equal(f, e))


def check_needs(inputs: Inputs, sums: Sequence[str] = (), **options: Any) -> None:
    """Only the gradients that are needed come back, with the bits that they have beside all others, in two launches and
    one for each of those that are `sums` of parts."""
    from triton_interpreter import counting

    names = [argument.name for argument in inputs.op.inputs]
    count, function = len(names), inputs.op.backend("triton").function("backward")

    def gradients(needs: tuple[bool, ...]) -> tuple[torch.Tensor | None, ...]:
        return function(*inputs.tensors, None, **options, needs=needs, config=CONFIG)

    every = gradients((True,) * count)
    for one in range(count):
        for needed in (False, True):
            needs = tuple((i == one) == needed for i in range(count))
            with counting() as traffic:
                found = gradients(needs)
            assert traffic.launches == 2 + sum(wanted and name in sums for wanted, name in zip(needs, names))
            for wanted, gradient, expected in zip(needs, found, every, strict=True):
                assert (gradient is not None) == wanted
                assert gradient is None or (expected is not None and torch.equal(gradient, expected))
