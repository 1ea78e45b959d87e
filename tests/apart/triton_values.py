"""The Triton scan's values and gradients in the interpreter, held to a loop in float64. See test_triton_values.py."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_cases import BFLOAT16, DTYPES, FLOAT32, FLOAT64, PACKED, cases
from triton_interpreter import shuffled

from kernels.problem import Problem, state_dtype
from kernels.scan import naive
from kernels.scan import triton as backend

pytestmark = pytest.mark.usefixtures("nan_filled")

HARD_DECAYS = (0.0, 1e-30, 1e-3, 0.5, 1.0, -0.9)
BT = 8
CONFIG = {"BT": BT, "num_warps": 1, "num_stages": 3}
# The columns of a program with that config
BD = 32
# Time split over programs: chunks of two tiles
SPLIT = {"BT": 2, "num_warps": 1, "num_stages": 3, "split": 4}
# A result may be wrong by this multiple of what the plain loop in the same dtype gets wrong, plus 2 ulp of its scale
MULTIPLE = 2


def to64(tensor: Tensor | None, pairs: bool) -> Any:
    if tensor is None:
        return None
    wide = tensor.double().contiguous()
    return (torch.view_as_complex(wide) if pairs else wide).numpy()


def loop(
    a: Tensor, x: Tensor, initial: Tensor | None, dh: Tensor | None, dfinal: Tensor | None, h: Tensor,
    cu_seqlens: Tensor | None, reverse: bool,
) -> dict[str, Any]:  # fmt: skip
    """The definition, sequence by sequence, with numpy's numbers. The gradients are those at the given h."""
    pairs = x.ndim == 4
    a64, x64, dh64, h64 = (to64(t, pairs) for t in (a, x, dh, h))
    bounds = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    places = [(b, s, e) for b in range(x.shape[0]) for s, e in itertools.pairwise(bounds)]
    shape = (len(places), x.shape[2])
    state, gradient = (np.zeros(shape, x64.dtype) if t is None else to64(t, pairs).copy() for t in (initial, dfinal))
    start = state.copy()
    result = {name: np.zeros_like(x64) for name in ("h", "da", "dx")}
    for n, (b, begin, end) in enumerate(places):
        rows = range(begin, end)[:: -1 if reverse else 1]
        for t in rows:
            state[n] = a64[b, t] * state[n] + x64[b, t]
            result["h"][b, t] = state[n]
        for k, t in reversed(list(enumerate(rows))):
            reaching = gradient[n] + (0 if dh64 is None else dh64[b, t])
            before = h64[b, rows[k - 1]] if k else start[n]
            result["dx"][b, t] = reaching
            result["da"][b, t] = reaching * before.conj()
            gradient[n] = a64[b, t].conj() * reaching
    return result | {"final": state, "dinitial": gradient}


def run(
    dtypes: tuple[torch.dtype, torch.dtype] = (FLOAT32, FLOAT32), batch: int = 2, length: int = 2 * BT + 3,
    width: int = BD + 1, pairs: bool = False, reverse: bool = False, packed: bool = False, initial: bool = True,
    dh: bool = True, dfinal: bool = True, config: dict[str, int] = CONFIG, index_dtype: torch.dtype = torch.int32,
) -> None:  # fmt: skip
    """One forward and one backward launch against the loop."""
    generator = torch.Generator().manual_seed(length * 1000 + width)
    two = [2] if pairs else []
    batch = 1 if packed else batch
    hard = torch.tensor(HARD_DECAYS)[torch.randint(len(HARD_DECAYS), [batch, length, width], generator=generator)]
    if pairs:
        angle = torch.rand(hard.shape, generator=generator) * 2 * torch.pi
        hard = torch.stack((hard * angle.cos(), hard * angle.sin()), -1)

    def normal(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.randn([*shape, *two], generator=generator, dtype=FLOAT64).to(dtype)

    a, x = hard.to(dtypes[0]), normal(hard.shape[:3], dtypes[1])
    bounds = sorted(length if b is None else min(b, length) for b in PACKED)
    cu_seqlens = torch.tensor(bounds, dtype=index_dtype) if packed else None
    states = [len(bounds) - 1 if packed else batch, width], state_dtype(dtypes[1])
    initial_state = normal(*states) if initial else None
    grad_h = normal(hard.shape[:3], dtypes[1]) if dh else None
    grad_final = normal(*states) if dfinal else None
    plain_h, plain_final = naive.forward(a, x, initial_state, cu_seqlens, reverse=reverse)
    saved = grad_h, grad_final, a, plain_h, initial_state, cu_seqlens
    exact = loop(a, x, initial_state, grad_h, grad_final, plain_h, cu_seqlens, reverse)
    needs = (True, True, initial)
    plain = plain_h, plain_final, *naive.backward(*saved, reverse=reverse, needs=needs)
    kernel = (
        *backend.forward(a, x, initial_state, cu_seqlens, reverse=reverse, config=config),
        *backend.backward(*saved, reverse=reverse, needs=needs, config=config),
    )
    for name, ours, naively in zip(("h", "final", "da", "dx", "dinitial"), kernel, plain):
        if naively is None:
            assert ours is None, f"{name}: expected None"
            continue
        assert ours is not None, f"{name}: missing"
        assert (ours.dtype, ours.shape) == (naively.dtype, naively.shape), name
        assert ours.is_contiguous(), name
        scale = np.abs(exact[name]).max(initial=0)
        allowed = MULTIPLE * np.abs(to64(naively, pairs) - exact[name]).max() + 2 * torch.finfo(ours.dtype).eps * scale
        wrong = np.abs(to64(ours, pairs) - exact[name]).max()
        assert wrong <= allowed, f"{name}: wrong by {wrong}, allowed {allowed}"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("width", [1, 3, BD + 1])
@pytest.mark.parametrize("length", [1, BT - 1, BT, BT + 1, 2 * BT + 3])
def test_lengths_and_widths_around_the_tile(length: int, width: int, reverse: bool) -> None:
    run(length=length, width=width, reverse=reverse)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_dtypes(dtypes: tuple[torch.dtype, torch.dtype], pairs: bool, packed: bool) -> None:
    run(dtypes, pairs=pairs, packed=packed, reverse=pairs != packed, width=BD // 2 + 1)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [4, BT, 3 * BT + 1])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_packed(index_dtype: torch.dtype, length: int, reverse: bool) -> None:
    run(length=length, width=5, packed=True, reverse=reverse, index_dtype=index_dtype)


@pytest.mark.parametrize("dh, dfinal", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("pairs, packed", [(False, False), (True, False), (False, True)])
def test_states_and_gradients_that_are_absent(pairs: bool, packed: bool, initial: bool, dh: bool, dfinal: bool) -> None:
    run(pairs=pairs, packed=packed, initial=initial, dh=dh, dfinal=dfinal, width=5, length=BT + 2)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[1], DTYPES[3], DTYPES[5]], ids=str)
def test_every_shipped_config(dtypes: tuple[torch.dtype, torch.dtype], pairs: bool) -> None:
    options = {"pairs": pairs, "packed": False, "initial_state": True, "reverse": False}
    names = {"forward": ("a", "x"), "backward": ("a", "h")}
    found = []
    for direction, (decay, sequence) in names.items():
        named = {decay: dtypes[0], sequence: dtypes[1]}
        problem = Problem("scan", direction, torch.device("cpu"), named, {"B": 1, "T": 64, "D": 8, "N": 1}, options)
        assert backend.cannot(problem) == []
        found += backend.configs(problem)
    for config in {tuple(config.items()): config for config in found}.values():
        run(dtypes, batch=1, length=2 * config["BT"] + 1, width=9, pairs=pairs, config=config)


FACTS = {
    "dtypes": DTYPES,
    "length": (4, 5, 8, 11),
    "width": (1, 3, BD + 1),
    "pairs": (False, True),
    "packed": (False, True),
    "reverse": (False, True),
    "initial": (False, True),
    "dh": (True, True, False),
    "dfinal": (False, True),
}
CASES = cases(FACTS, 8)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_time_split_over_programs(case: dict[str, Any]) -> None:
    run(**case, config=SPLIT)


def test_many_packed_sequences_find_their_chunks() -> None:
    a, x = torch.rand(2, 1, 31, 3)
    cu_seqlens = torch.tensor([0, 0, 4, 12, 12, 13, 17, 25, 25, 25, 31])
    initial = torch.rand(10, 3)
    found = backend.forward(a, x, initial, cu_seqlens, reverse=False, config=SPLIT)
    for ours, plain in zip(found, naive.forward(a, x, initial, cu_seqlens, reverse=False)):
        torch.testing.assert_close(ours, plain)


def test_needs_skip_what_is_not_needed_and_leave_the_rest_alone() -> None:
    a, h, dh = torch.rand(3, 1, 11, 5)
    initial, dfinal = torch.randn(2, 1, 5)
    everything = None
    for config, needs in itertools.product((CONFIG, SPLIT), itertools.product((True, False), repeat=3)):
        found = backend.backward(dh, dfinal, a, h, initial, None, reverse=False, needs=needs, config=config)
        everything = found if all(needs) else everything
        for needed, gradient, expected in zip(needs, found, everything):
            assert torch.equal(gradient, expected) if needed else gradient is None


@pytest.mark.parametrize("pairs", [False, True])
def test_strides(pairs: bool) -> None:
    shape = [3, 13, 6, *([2] if pairs else [])]
    a, x, dh = torch.rand(3, *shape)
    plain = backend.forward(a, x, None, None, reverse=False, config=CONFIG)
    gradients = backend.backward(dh, None, a, plain[0], None, None, reverse=False, needs=(True,) * 3, config=CONFIG)
    time_first = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (a, x, dh)]
    every_other = [torch.stack((t, t.roll(1)), 2).flatten(1, 2)[:, ::2] for t in (a, x, dh)]
    columns_apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (a, x, dh)]
    for a_, x_, dh_ in (time_first, every_other, columns_apart):
        assert not x_.is_contiguous()
        found = backend.forward(a_, x_, None, None, reverse=False, config=CONFIG)
        again = backend.backward(dh_, None, a_, found[0], None, None, reverse=False, needs=(True,) * 3, config=CONFIG)
        assert all(torch.equal(f, p) for f, p in zip(found, plain))
        assert all(torch.equal(f, p) for f, p in zip(again[:2], gradients[:2]))
    # One gradient for all rows, as h.sum().backward() makes it
    same = torch.ones([1] * len(shape)).expand(shape)
    backend.backward(same, None, a, plain[0], None, None, reverse=False, needs=(True,) * 3, config=CONFIG)


@pytest.mark.parametrize("reverse", [False, True])
def test_offsets_beyond_31_bits(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    # It would copy the memory of the arguments, of which this test touches a few pages only, onto itself
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = torch.empty(2**31 + 2**30, dtype=BFLOAT16)
    for shape, strides in (([1, 3, 8], (0, 2**30, 1)), ([2, 2, 8], (2**31, 64, 1))):
        x = far.as_strided(shape, strides)
        x.copy_(torch.randn(shape))
        near = x.clone(memory_format=torch.contiguous_format)
        for first, second in ((x, near), (near, x)):
            expected = backend.forward(near, near, None, None, reverse=reverse, config=CONFIG)
            found = backend.forward(first, second, None, None, reverse=reverse, config=CONFIG)
            assert all(torch.equal(f, e) for f, e in zip(found, expected))


@pytest.mark.parametrize("config", [CONFIG, SPLIT], ids=["carried", "split"])
@pytest.mark.parametrize("pairs, packed", [(False, False), (True, False), (False, True)])
def test_programs_in_any_order_give_the_same_bits(pairs: bool, packed: bool, config: dict[str, int]) -> None:
    two, width = [2] if pairs else [], 3 if config is SPLIT else 2 * BD + 1
    a, x, dh = torch.rand(3, 1 if packed else 2, BT + 1, width, *two)
    cu_seqlens = torch.tensor([0, 4, 4, BT + 1]) if packed else None
    initial = torch.rand(3 if packed else 2, width, *two)

    def everything() -> tuple[Tensor, ...]:
        h, final = backend.forward(a, x, initial, cu_seqlens, reverse=False, config=config)
        saved = dh, final, a, h, initial, cu_seqlens
        return h, final, *backend.backward(*saved, reverse=False, needs=(True, True, True), config=config)

    expected = everything()
    for seed in range(2):
        with shuffled(seed):
            assert all(torch.equal(f, e) for f, e in zip(everything(), expected))


@triton.jit
def _leaning(x, SIZE: tl.constexpr):
    # Every program reads what the program before it wrote
    i = tl.program_id(0)
    tl.store(x + i + 1, tl.load(x + i) + 1)


def test_a_program_that_leans_on_another_is_noticed() -> None:
    def counted() -> Tensor:
        x = torch.zeros(17)
        _leaning[(16,)](x, SIZE=16)
        return x

    assert torch.equal(counted(), torch.arange(17.0))
    with shuffled(0):
        assert not torch.equal(counted(), torch.arange(17.0))
