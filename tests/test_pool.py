"""Memory for results: a freed block serves the next result of its size, never two at once."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch

from kernels import pool

pytestmark = pytest.mark.skipif(not pool.AVAILABLE, reason="the system has no MADV_FREE")


@pytest.fixture(autouse=True)
def empty_pool() -> Iterator[None]:
    gc.collect()
    pool.release()
    yield
    pool.release()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (2, 1001, 129), (1, 700, 513, 2)])
def test_looks_like_torch_empty_like(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.rand(shape).to(dtype).transpose(0, 1)
    y = pool.empty_like(x)
    expected = torch.empty_like(x, memory_format=torch.contiguous_format)
    assert (y.shape, y.dtype, y.stride(), y.device) == (x.shape, x.dtype, expected.stride(), expected.device)
    assert y._base is None
    assert y.untyped_storage().nbytes() >= y.nbytes
    assert torch.equal(y.copy_(x), x)


def test_a_block_is_used_again_only_when_nothing_refers_to_it() -> None:
    x = torch.rand(1 << 20)
    y = pool.empty_like(x)
    address = y.data_ptr()
    part = y[5:]
    del y
    assert pool.idle_bytes() == 0
    other = pool.empty_like(x)
    assert other.data_ptr() != address
    part.fill_(1)
    assert pool.empty_like(x).fill_(2)[0] == 2
    assert part.eq(1).all()
    del part
    assert pool.empty_like(x[: (1 << 20) - 1000]).data_ptr() == address


def test_values_survive_a_block_that_was_marked_as_free() -> None:
    x = torch.rand(pool.MARKED_BYTES // 4)
    for value in range(5):
        y = pool.empty_like(x).fill_(value)
        assert y.eq(value).all()
        del y


def test_small_results_and_deterministic_mode_use_torch() -> None:
    small = pool.empty_like(torch.rand(8))
    del small
    assert pool.idle_bytes() == 0
    torch.use_deterministic_algorithms(True)
    try:
        assert pool.empty_like(torch.rand(1 << 20)).isnan().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_idle_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "IDLE_BYTES", 3 << 20)
    held = [pool.empty_like(torch.empty(1 << 18)) for _ in range(6)]
    del held
    assert 0 < pool.idle_bytes() <= 3 << 20


def test_tensors_may_die_in_any_thread() -> None:
    x = torch.rand(1 << 17)
    wrong, before = [], set(pool._leases)

    def work(value: float) -> None:
        for _ in range(200):
            y = pool.empty_like(x).fill_(value)
            if not y.eq(value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert set(pool._leases) <= before
