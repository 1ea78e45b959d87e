"""What only the native scan promises: the same bits with any threads, blocks and stores, and outputs of the caller."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor

from kernels import jit_cpp
from kernels.agreement import pose
from kernels.memory import FORMATS
from kernels.scan import OP, naive, native

CPU = torch.device("cpu")
# odd widths, blocks that end inside a vector, stores around the cache in aligned and unaligned rows
CONFIGS = [
    {"block": 4096, "around_cache_mib": 1 << 20},
    {"block": 4096, "around_cache_mib": 0},
    {"block": 32, "around_cache_mib": 1 << 20},
    {"block": 288, "around_cache_mib": 0},
    {"block": 33, "around_cache_mib": 0},
]


@pytest.fixture(autouse=True)
def every_size_in_parallel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if reason := jit_cpp.reason(native.SOURCE):
        pytest.skip(reason)
    monkeypatch.setattr(native, "SERIAL_SIZE", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(
    inputs: Mapping[str, Tensor], reverse: bool, cu_seqlens: Tensor | None, config: Mapping[str, int]
) -> list[Tensor]:
    a, x, s, dh, df = inputs.values()
    h, final = native.forward(a, x, s, cu_seqlens, reverse=reverse, config=config)
    grads = native.backward(dh, df, a, h, s, cu_seqlens, reverse=reverse, needs=(True, True, True), config=config)
    return [h, final, *[g for g in grads if g is not None]]


@pytest.mark.parametrize("columns", [1, 3, 6, 17, 257, 1030, 4100])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("a_dtype", "dtype"), FORMATS)
def test_bits_depend_neither_on_threads_nor_on_config(
    columns: int, pairs: bool, a_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    torch.manual_seed(columns)
    packed, reverse = columns % 2 == 0, columns % 3 == 0
    length, batch = 11, 1 if packed else 3
    cu_seqlens = torch.tensor([0, 4, 4, 9, length], dtype=torch.int32) if packed else None
    tail = (columns, 2) if pairs else (columns,)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    states = (4 if packed else batch, *tail)
    inputs = {
        "a": (torch.rand(batch, length, *tail) * 0.7).to(a_dtype),
        "x": torch.randn(batch, length, *tail).to(dtype),
        "initial_state": torch.randn(states, dtype=state),
        "dh": torch.randn(batch, length, *tail).to(dtype),
        "dfinal_state": torch.randn(states, dtype=state),
    }
    torch.set_num_threads(1)
    expected = run(inputs, reverse, cu_seqlens, CONFIGS[0])
    for threads, config in zip((2, 1, 3, 2, 2), CONFIGS):
        torch.set_num_threads(threads)
        for got, wanted in zip(run(inputs, reverse, cu_seqlens, config), expected):
            assert torch.equal(got, wanted), (threads, config)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("a_dtype", "dtype"), FORMATS)
def test_bits_are_the_same_in_the_cache(
    a_dtype: torch.dtype, dtype: torch.dtype, pairs: bool, reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups that overlap, sequences of no row, of one, and of some more than a group walks down at once."""
    torch.manual_seed(0)
    bounds = None if pairs else torch.tensor([0, 0, 70, 71, 103], dtype=torch.int32)
    tail = (150, 2) if pairs else (300,)
    states = (1 if bounds is None else 4, *tail)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    a, x, dh = (torch.rand(1, 103, *tail).sub_(0.2).to(each) for each in (a_dtype, dtype, dtype))
    inputs = {"a": a, "x": x, "s": torch.rand(states, dtype=state), "dh": dh, "df": torch.rand(states, dtype=state)}
    config = {"block": 160, "around_cache_mib": 1 << 20}
    cached = run(inputs, reverse, bounds, config)
    for needs in ((True, False, True), (False, True, False)):
        grads = native.backward(
            dh, inputs["df"], a, cached[0], inputs["s"], bounds, reverse=reverse, needs=needs, config=config
        )
        assert all(torch.equal(got, wanted) for got, wanted in zip(grads, cached[2:]) if got is not None)
    monkeypatch.setattr(native, "CACHED_BYTES", -1)
    for got, wanted in zip(cached, run(inputs, reverse, bounds, config)):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(("a_dtype", "dtype"), FORMATS)
def test_bits_are_the_same_in_waves(a_dtype: torch.dtype, dtype: torch.dtype, pairs: bool, sequences: int) -> None:
    """Threads that share rows chunk by chunk, more of them than there are processors, beside one that has all rows."""
    torch.manual_seed(0)
    length, tail = 64 * 35 + 5, (150, 2) if pairs else (300,)
    states = (sequences, *tail)
    state = torch.float64 if dtype == torch.float64 else torch.float32
    a, x, dh = (torch.rand(sequences, length, *tail).sub_(0.2).to(each) for each in (a_dtype, dtype, dtype))
    inputs = {"a": a, "x": x, "s": torch.rand(states, dtype=state), "dh": dh, "df": torch.rand(states, dtype=state)}

    def results(threads: int, reverse: bool) -> list[Tensor]:
        torch.set_num_threads(threads)
        found = run(inputs, reverse, None, CONFIGS[0])
        # where nobody wants the gradient of a state, what is carried has no place among the results
        da, dx, _ = native.backward(
            dh, None, a, found[0], None, None, reverse=reverse, needs=(True, True, False), config=CONFIGS[0]
        )
        assert da is not None
        assert dx is not None
        return [*found, da, dx]

    for reverse in (False, True):
        expected = results(1, reverse)
        for threads in (2, 2, 2, 4, 5):
            assert all(torch.equal(got, wanted) for got, wanted in zip(results(threads, reverse), expected)), threads


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("columns", [1, 7, 70])
def test_split_time_is_the_same_scan(columns: int, pairs: bool, packed: bool) -> None:
    """Empty sequences and chunks, chunks of a row, any number of threads."""
    torch.manual_seed(columns)
    batch, length, tail = (1, 29, (columns, 2)) if pairs else (2 - packed, 29, (columns,))
    cu_seqlens = torch.tensor([0, 2, 2, 21, length]) if packed else None
    state = (4 if packed else batch, *tail)
    shapes = [(batch, length, *tail)] * 2 + [state, (batch, length, *tail), state]
    names = ("a", "x", "initial_state", "dh", "dfinal_state")
    inputs = {name: torch.randn(shape, dtype=torch.float64) / 2 for name, shape in zip(names, shapes)}
    for reverse in (False, True):
        expected = run(inputs, reverse, cu_seqlens, CONFIGS[0])
        for split in (2, 3, 8):
            found = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(run(inputs, reverse, cu_seqlens, CONFIGS[threads] | {"split": split}))
            for one, two, wanted in zip(*found, expected):
                assert torch.equal(one, two)
                torch.testing.assert_close(one, wanted, rtol=1e-12, atol=1e-12)


def test_a_split_of_time_is_a_candidate_where_columns_are_too_few_for_the_threads() -> None:
    cases = ((4, 16, 1 << 15, True), (4, 256, 1 << 15, False), (4, 16, 100, False), (2, 16, 1 << 15, True))
    for threads, columns, length, offered in cases:
        torch.set_num_threads(threads)
        problem = pose(OP, "forward", {"B": 1, "T": length, "D": columns}, dtype=torch.float32, device=CPU)
        splits = [config["split"] for config in native.configs(problem)]
        assert splits[0] == 1
        assert (threads + 1 in splits) == offered


def test_forward_out_writes_the_same_and_nothing_else() -> None:
    torch.set_num_threads(2)
    a, x = torch.rand(2, 9, 300), torch.randn(2, 9, 300)
    for config in CONFIGS:
        h, final = torch.full((4, 9, 300), 7.0), torch.full((4, 300), 7.0)
        native.forward_out(a, x, None, None, h[1:3], final[1:3], reverse=False, config=config)
        expected = native.forward(a, x, None, None, reverse=False, config=config)
        assert torch.equal(h[1:3], expected[0])
        assert torch.equal(final[1:3], expected[1])
        assert h[[0, 3]].eq(7).all()
        assert final[[0, 3]].eq(7).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_results_round_to_nearest_even_and_keep_nan_and_infinity_but_no_denormal(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # every exponent, ties, denormals
    bits = torch.randint(-(2**31), 2**31, (1, 1, 4099), dtype=torch.int64).to(torch.int32)
    bits[..., ::3] &= ~0x7FFF
    bits[..., :6] = torch.tensor([0x7F800000, 0x7F800001, 0x7FC00000, 0x7F7FFFFF, 1, 0x8000], dtype=torch.int32)
    state = bits.view(torch.float32)
    one, zero = torch.ones_like(state, dtype=dtype), torch.zeros_like(state, dtype=dtype)
    for columns in (4099, 16, 9, 4, 3, 1):
        part = state[..., :columns]
        h, _ = native.forward(one[..., :columns], zero[..., :columns], part[0], None, reverse=False, config=CONFIGS[0])
        expected = torch.where(part.abs() < torch.finfo(torch.float32).tiny, 0.0, part).to(dtype)
        torch.testing.assert_close(h, expected, rtol=0, atol=0, equal_nan=True)


def test_gradients_that_nobody_needs_are_not_returned_and_change_no_other() -> None:
    torch.manual_seed(0)
    a, x, s = torch.rand(2, 5, 40), torch.randn(2, 5, 40), torch.randn(2, 40)
    h, _ = native.forward(a, x, s, None, reverse=False, config=CONFIGS[0])
    everything = naive.backward(x, None, a, h, s, None, reverse=False)
    for mask in range(8):
        needs = (bool(mask & 1), bool(mask & 2), bool(mask & 4))
        for config in CONFIGS:
            got = native.backward(x, None, a, h, s, None, reverse=False, needs=needs, config=config)
            for gradient, wanted, needed in zip(got, everything, needs):
                assert (gradient is not None) == needed
                if gradient is not None:
                    torch.testing.assert_close(gradient, wanted)
