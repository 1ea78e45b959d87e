"""How many bytes the Triton scan moves, counted in the interpreter. See test_triton_values.py."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton_cases import size
from triton_interpreter import counting

from kernels.problem import Problem, state_dtype
from kernels.scan import triton as backend

DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]
# Of the least possible, which is every input read once and every output written once
LIMIT = 1.05
# Where time is split: a and x are read twice, and of every 64 rows some states are kept
SPLIT_LIMIT = 1.75


@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("length", [24, 27])
@pytest.mark.parametrize("pairs, packed", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_every_byte_is_moved_once(
    dtypes: tuple[torch.dtype, torch.dtype], pairs: bool, packed: bool, length: int, states: bool
) -> None:
    two = [2] if pairs else []
    width = 40
    a, x = torch.rand(1, length, width, *two).to(dtypes[0]), torch.rand(1, length, width, *two).to(dtypes[1])
    cu_seqlens = torch.tensor([0, 9, length], dtype=torch.int32) if packed else None
    shape = [2 if packed else 1, width, *two]
    initial, dfinal = torch.rand(2, *shape, dtype=state_dtype(dtypes[1])) if states else (None, None)
    options = {"pairs": pairs, "packed": packed, "initial_state": states, "reverse": False}
    sizes = {"B": 1, "T": length, "D": width, "N": shape[0]}

    def default(direction: str, sequence: str) -> dict[str, int]:
        named = {"a": dtypes[0], sequence: dtypes[1]}
        return backend.configs(Problem("scan", direction, x.device, named, sizes, options))[0]

    with counting() as forward:
        h, final = backend.forward(a, x, initial, cu_seqlens, reverse=False, config=default("forward", "x"))
    assert (forward.launches, forward.outside) == (1, 0)
    least = size(a, x, initial, h, final)
    assert 0.97 * least <= forward.moved <= LIMIT * least

    with counting() as backward:
        saved, config = (h, dfinal, a, h, initial, cu_seqlens), default("backward", "h")
        gradients = backend.backward(*saved, reverse=False, needs=(True, True, True), config=config)
    assert (backward.launches, backward.outside) == (1, 0)
    assert backward.written == size(*gradients)
    least = size(h, dfinal, a, h, initial, *gradients)
    assert 0.97 * least <= backward.moved <= LIMIT * least


@pytest.mark.parametrize("dtype, pairs, packed", [(torch.float32, True, False), (torch.bfloat16, False, True)])
def test_time_split_over_programs(dtype: torch.dtype, pairs: bool, packed: bool) -> None:
    length, two = 150, [2] if pairs else []
    a, x = torch.rand(2, 1, length, 8, *two).to(dtype)
    cu_seqlens = torch.tensor([0, 70, length], dtype=torch.int32) if packed else None
    config = {"BT": 8, "num_warps": 1, "num_stages": 3, "split": 64}
    with counting() as forward:
        h, final = backend.forward(a, x, None, cu_seqlens, reverse=False, config=config)
    assert (forward.launches, forward.outside) == (3, 0)
    assert 1.2 * size(a, x, h, final) < forward.moved <= SPLIT_LIMIT * size(a, x, h, final)
    with counting() as backward:
        da, dx, _ = backend.backward(
            h, None, a, h, None, cu_seqlens, reverse=False, needs=(True, True, True), config=config
        )
    assert (backward.launches, backward.outside) == (3, 0)
    assert 1.2 * size(h, a, h, da, dx) < backward.moved <= SPLIT_LIMIT * size(h, a, h, da, dx)


def test_gradients_that_are_not_needed_move_nothing() -> None:
    a, h, dh = torch.rand(3, 2, 11, 8)
    initial = torch.rand(2, 8)
    config = {"BT": 4, "num_warps": 1, "num_stages": 2}
    cases = ((True, False, False), (a, h, dh)), ((False, True, False), (a, dh)), ((False, False, True), (a, dh))
    for needs, reads in cases:
        with counting() as traffic:
            found = backend.backward(dh, None, a, h, initial, None, reverse=False, needs=needs, config=config)
        assert traffic.written == size(*found)
        assert 0.9 * size(*reads) <= traffic.read <= size(*reads, initial)


@triton.jit
def _twice(x, y, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y + i, tl.load(x + i, i < 10, other=0.0) + tl.load(x + i))


def test_the_count_sees_masks_and_second_reads() -> None:
    x, y = torch.rand(2, 16)
    with counting() as traffic:
        _twice[(1,)](x, y, SIZE=16)
    assert (traffic.launches, traffic.read, traffic.written, traffic.outside) == (1, 4 * (10 + 16), 4 * 16, 0)


def test_the_count_sees_what_torch_does() -> None:
    x = torch.rand(16)
    with counting() as traffic:
        torch.empty_like(x).view(4, 4).t()
        assert traffic.outside == 0
        x.to(torch.bfloat16)
    assert traffic.outside == 16 * (4 + 2)
