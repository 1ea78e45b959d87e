"""The Triton short convolution's values, gradients and bytes in the interpreter. See test_short_conv_triton.py."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton_cases as tc
from triton_cases import size
from triton_interpreter import counting

from kernels.agreement import Inputs
from kernels.short_conv import OP
from kernels.short_conv import triton as backend

pytestmark = pytest.mark.usefixtures("nan_filled")

CT, BT = 4, 2
CONFIG = {"CT": CT, "BT": BT, "num_warps": 1, "num_stages": 3}
# At least the columns of a program with that config
BD = 64


def posed(
    direction: str, dtypes: tuple[torch.dtype, torch.dtype] = tc.DTYPES[1], batch: int = 2, length: int = 11,
    columns: int = 5, width: int = 4, **facts: Any,
) -> Inputs:  # fmt: skip
    """A problem with its tensors. dtypes: of the weights and of x."""
    sizes = {"B": batch, "T": length, "D": columns, "W": width}
    return tc.posed(OP, direction, sizes, dtype=dtypes[1], decay_dtype=dtypes[0], **facts)


FACTS = {
    "length": (1, 2, CT, CT + 1, 2 * CT + 3),
    "width": (1, 2, 3, 4, 6, 9),
    "columns": (1, 3, 5, 6, BD + 1),
    "dtypes": tc.DTYPES,
    "packed": (False, True),
    "activation": ("", "silu"),
    "reverse": (False, True),
    "bias": (False, True),
    "initial_state": (False, True),
}
CASES = tc.cases(FACTS, 24)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_problems_of_every_kind(case: dict[str, Any], direction: str) -> None:
    tc.agrees(posed(direction, **case), CONFIG)


@pytest.mark.parametrize("dtype", [tc.FLOAT32, tc.BFLOAT16, tc.FLOAT64], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_every_shipped_config(direction: str, dtype: torch.dtype) -> None:
    configs = backend.configs(posed(direction, (dtype, dtype)).problem)
    # How many rows a chunk has is no other code
    for config in {str(config): config for config in ({**config, "CT": 8} for config in configs)}.values():
        tc.agrees(posed(direction, (dtype, dtype), batch=1, length=11, activation="silu", width=2), config)


@pytest.mark.parametrize("missing", ["dy", "dfinal_state", "both"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_loss_on_one_output(packed: bool, missing: str) -> None:
    inputs = posed("backward", packed=packed)
    for name in ("dy", "dfinal_state") if missing == "both" else (missing,):
        inputs = tc.without(inputs, name)
    tc.agrees(inputs, CONFIG)


def test_only_the_gradients_that_are_needed() -> None:
    inputs = posed("backward", length=5, batch=1)
    run = {"activation": "", "reverse": False, "config": CONFIG}
    every = backend.backward(*inputs.tensors, None, needs=(True,) * 4, **run)
    for needs in itertools.product((False, True), repeat=4):
        with counting() as traffic:
            found = backend.backward(*inputs.tensors, None, needs=needs, **run)
        assert traffic.launches == 1 + (needs[1] or needs[2])
        for needed, gradient, expected in zip(needs, found, every):
            assert torch.equal(gradient, expected) if needed else gradient is None


def test_long_chunks_move_little_more_than_the_least() -> None:
    longest = max(backend.configs(posed("forward").problem), key=lambda config: config["CT"])
    length = longest["CT"] * 7 // 4
    tc.check_bytes(posed("forward", (tc.FLOAT32, tc.BFLOAT16), 1, length, 8, bias=False), longest, launches=1)


@pytest.mark.parametrize("dtype", [tc.FLOAT32, tc.BFLOAT16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_bytes_moved(packed: bool, dtype: torch.dtype) -> None:
    """Beside the rows at the borders of chunks, every byte of x, dy, dx and y is moved once."""
    inputs = posed("forward", (dtype, dtype), length=19, columns=24, packed=packed, bias=False)
    x, weight, _, state = inputs.tensors
    with counting() as forward:
        y, final = inputs.call(OP.backend("triton"), CONFIG)()
    chunks = 2 * -(-19 // CT) if not packed else 19 // CT + len(tc.PACKED) - 1
    row = 24 * dtype.itemsize
    assert (forward.launches, forward.outside) == (1, 0)
    assert forward.written == size(y, final)
    few = (chunks + 1) * size(weight) + 2 * size(state) + 24 * len(tc.PACKED) * chunks
    assert size(x, weight) <= forward.read <= size(x) + 3 * row * chunks + few

    inputs = posed("backward", (dtype, dtype), length=19, columns=24, packed=packed, bias=False)
    with counting() as backward:
        dx, dweight, _, dstate = inputs.call(OP.backend("triton"), CONFIG)()
    partial = chunks * 5 * 24 * 4
    assert (backward.launches, backward.outside) == (2, 0)
    assert backward.written == size(dx, dweight, dstate) + partial
    assert backward.read <= 2 * size(x) + 9 * row * chunks + few + partial


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("packed", [False, True])
def test_programs_in_any_order_give_the_same_bits(packed: bool, direction: str) -> None:
    tc.check_any_order(posed(direction, columns=BD + 1, length=9, width=2, packed=packed), CONFIG)


def test_strides() -> None:
    x, dy, weight = torch.randn(2, 7, 6), torch.randn(2, 7, 6), torch.randn(6, 2)
    run = {"activation": "", "reverse": False, "config": CONFIG}
    needs = (True, True, False, False)
    y, final = backend.forward(x, weight, None, None, None, **run)
    dx, dweight, *_ = backend.backward(dy, None, x, weight, None, None, None, needs=needs, **run)
    time_first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, dy)]
    every_other = [torch.stack((t, t.roll(1)), 2).flatten(1, 2)[:, ::2] for t in (x, dy)]
    columns_apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, dy)]
    for x_, dy_ in (time_first, every_other, columns_apart):
        assert not x_.is_contiguous()
        found = backend.forward(x_, weight.t().contiguous().t(), None, None, None, **run)
        again = backend.backward(dy_, None, x_, weight, None, None, None, needs=needs, **run)
        assert all(torch.equal(f, e) for f, e in zip((*found, *again[:2]), (y, final, dx, dweight)))


@pytest.mark.parametrize("reverse", [False, True])
def test_offsets_beyond_31_bits(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    # It would copy the memory of the arguments, of which this test touches a few pages only, onto itself
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far, weight = torch.empty(2**31 + 2**30, dtype=tc.BFLOAT16), torch.randn(8, 2)
    run = {"activation": "", "reverse": reverse, "config": CONFIG}
    for shape, strides in (([1, 3, 8], (0, 2**30, 1)), ([3, 2, 8], (2**30, 64, 1))):
        x = far.as_strided(shape, strides)
        x.copy_(torch.randn(shape))
        near = x.clone(memory_format=torch.contiguous_format)
        found, expected = (backend.forward(t, weight, None, None, None, **run) for t in (x, near))
        assert all(torch.equal(f, e) for f, e in zip(found, expected))


def test_what_it_cannot_do() -> None:
    problem = posed("forward", width=17).problem
    assert backend.cannot(problem) == ["17 taps; at most 16"]
    huge = replace(problem, sizes={**problem.sizes, "W": 4, "T": 2**30})
    assert backend.cannot(huge) == [f"an axis of {2**30}; at most {2**30 - 1}"]
