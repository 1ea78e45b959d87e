"""Gated linear attention in C++: borders of chunks and steps, widths of vectors, threads, layouts of the inputs."""

from __future__ import annotations

import platform
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels.agreement import Expected, Inputs, draw, pose
from kernels.gla import OP, native

BACKEND = OP.backend("native")
CPU = torch.device("cpu")
# rows of a chunk of the backward pass, in which states are made again every 16 rows
SMALL = {"chunk": 32}

pytestmark = pytest.mark.skipif(
    BACKEND.loaded is not native or native.jit_cpp.reason(native.SOURCE) is not None, reason="no C++ compiler"
)


def posed(direction: str, sizes: dict[str, int], **facts: object) -> Inputs:
    whole = {"B": 1, "T": 20, "H": 2, "K": 5, "V": 3, "J": 5, **sizes}
    return draw(OP, pose(OP, direction, whole, dtype=torch.float32, device=CPU, **facts), seed=sum(whole.values()))


def same(some: tuple[Tensor | None, ...], others: tuple[Tensor | None, ...]) -> bool:
    return all(torch.equal(a, b) if a is not None and b is not None else a is b for a, b in zip(some, others))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_borders_of_chunks_and_steps(direction: str) -> None:
    for length in (15, 16, 17, 32, 33, 97):
        inputs = posed(direction, {"T": length}, bonus=length % 2 == 0)
        assert Expected.of(inputs).difference(inputs.call(BACKEND, SMALL)()) is None, length


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("K", "V"), [(1, 1), (4, 70), (17, 16), (70, 4), (33, 130)])
def test_widths_that_fill_vectors_and_tiles_or_do_not(K: int, V: int, direction: str) -> None:
    inputs = posed(direction, {"K": K, "V": V, "J": K if V % 2 else 1})
    assert Expected.of(inputs).difference(inputs.call(BACKEND, SMALL)()) is None


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_bits_do_not_depend_on_threads(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more threads than sequences and heads, these share the columns of a state."""
    monkeypatch.setattr(native, "SERIAL_SIZE", 0)
    threads, found = torch.get_num_threads(), []
    for inputs in (
        posed(direction, {"T": 70, "H": 1, "K": 20, "V": 75, "J": 20}, bonus=True),
        posed(direction, {"T": 70, "H": 3, "V": 40, "N": 4}, packed=True),
    ):
        try:
            for count in (1, 2, 7):
                torch.set_num_threads(count)
                found.append(inputs.call(BACKEND, SMALL)())
        finally:
            torch.set_num_threads(threads)
        alone, *others = found
        for other in others:
            assert same(alone, other)
        found.clear()


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_any_layout(direction: str) -> None:
    """Heads first in memory, rows that lie apart, columns that do not lie side by side."""
    inputs = posed(direction, {"T": 35, "B": 2})
    call = inputs.call(BACKEND, SMALL)

    def apart(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.ndim != 4 else x.repeat_interleave(2, 1)[:, ::2]

    def heads_first(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.ndim != 4 else x.transpose(1, 2).contiguous().transpose(1, 2)

    def columns_first(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.ndim != 4 else x.mT.contiguous().mT

    for lay in (apart, heads_first, columns_first):
        others = replace(inputs, tensors=tuple(map(lay, inputs.tensors))).call(BACKEND, SMALL)()
        assert same(call(), others), lay.__name__


@pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="elsewhere small numbers are as fast as others"
)
def test_a_state_that_fades_away_is_zero_before_it_gets_slow() -> None:
    """The smallest numbers, which have fewer digits, count as zero meanwhile, but not for the caller."""
    q = k = v = torch.zeros(1, 95, 1, 4)
    log_decay, initial = torch.full((1, 95, 1, 1), -1.0), torch.ones(1, 1, 4, 4)
    final = native.forward(q, k, v, log_decay, initial, None, None, scale=1.0, config={})[1]
    assert bool((final == 0).all())
    assert float(torch.tensor([1e-40]) * 1.0) > 0
