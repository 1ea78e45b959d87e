"""hgru: the paper's equation, gates near 0 and 1, activations, and what only the native backend promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import jit_cpp
from kernels.agreement import Expected, draw, pose
from kernels.hgru import OP, hgru, native
from kernels.hgru.gates import ACTIVATIONS
from kernels.memory import DTYPES

CPU = torch.device("cpu")


def test_the_equation_of_the_paper() -> None:
    """One channel, complex numbers as Python has them (arXiv 2311.04823, equations 3 to 8)."""
    torch.manual_seed(0)
    i, f, state = torch.randn(1, 5, 1, 2).double(), torch.randn(1, 5, 1).double(), torch.randn(1, 1, 2).double()
    lower, angle = 0.3, 0.7
    h, final = hgru(i, f, torch.tensor([lower], dtype=i.dtype), torch.tensor([angle], dtype=i.dtype), state)
    expected = complex(*state.flatten().tolist())
    for t in range(5):
        decay = lower + (1 - lower) / (1 + math.exp(-f[0, t, 0].item()))
        candidate = complex(*(x / (1 + math.exp(-x)) for x in i[0, t, 0].tolist()))
        turn = complex(math.cos(angle), math.sin(angle))
        expected = decay * turn * expected + (1 - decay) * candidate
        assert complex(*h[0, t, 0].tolist()) == pytest.approx(expected, rel=1e-12)
    assert torch.equal(final, h[:, -1])


@pytest.mark.parametrize("backend", ["naive", "compiled", "native"])
def test_saturated_gates_do_not_cancel(backend: str) -> None:
    """From a state of zeros the input's share is all there is: σ(−f), also where it is far below an ulp of 1."""
    f = torch.tensor([-80.0, -40.0, -17.0, 0.0, 17.0, 40.0, 80.0])
    one = torch.ones(1, 1, 7)
    share, _ = hgru(one, f.expand(1, 1, 7), activation="identity", backend=backend)
    torch.testing.assert_close(share[0, 0], torch.sigmoid(-f.double()).float(), rtol=1e-6, atol=0)
    kept, _ = hgru(0 * one, f.expand(1, 1, 7), None, None, one[0], activation="identity", backend=backend)
    torch.testing.assert_close(kept[0, 0], torch.sigmoid(f.double()).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", ["naive", "compiled", "native"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_out_and_near_zero(activation: str, backend: str) -> None:
    """act(i) and its slope are right relative to their own size, down to the smallest normal numbers."""
    act, slope = ACTIVATIONS[activation]
    x = torch.tensor([-3e38, -1e4, -40.0, -9.0, -1.0, -1e-3, -1e-30, 0.0, 1e-30, 1e-3, 1.0, 9.0, 40.0, 1e4, 1e37])
    i = x.view(1, 1, -1).requires_grad_()
    # a gate of zeros gives the input a half
    h, _ = hgru(i, torch.zeros(1, 1, len(x)), activation=activation, backend=backend)
    found = torch.autograd.grad(h.sum(), i)[0]
    torch.testing.assert_close(2 * h[0, 0].double(), act(x.double()), rtol=2e-6, atol=1e-35)
    torch.testing.assert_close(2 * found[0, 0].double(), slope(x.double()), rtol=2e-6, atol=1e-35)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_far_out(dtype: torch.dtype) -> None:
    """Any gate meets any input and any state: nothing overflows that is finite."""
    x = torch.tensor([-6e4, -100.0, -64.0, -20.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 20.0, 64.0, 100.0, 6e4, math.inf])
    f, i = (side.flatten().view(1, 1, -1).to(dtype) for side in torch.meshgrid(x, x[:-1], indexing="ij"))
    for size in (0.0, 1.0, 1e30):
        state = torch.full((1, f.shape[2]), size)
        _, found = hgru(i, f, None, None, state, backend="native")
        _, exact = hgru(i.double(), f.double(), None, None, state.double(), backend="naive")
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-7 * max(1.0, size))


def test_both_gates_of_every_bfloat16() -> None:
    """From a state of zeros what is left is sigmoid(-f) silu(i): each right relative to its own size, except that silu
    may stay what it is at -64, which is next to nothing."""
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    x = x[x.abs() <= 80].view(1, 1, -1)
    exact, still = x.double(), torch.zeros_like(x)
    # x log2(e) may be rounded
    allowed = 1e-6 * (1 + exact.abs() / 4)
    silu, gate = exact.sigmoid() * exact, (-exact).sigmoid()
    nothing = torch.where(exact < -64, 64.1 * math.exp(-64), 0)
    for i, f, right, beyond in ((x, still, silu / 2, nothing / 2), (still + 64, x, gate * 64, 0 * nothing)):
        _, found = hgru(i, f, backend="native")
        assert ((found - right[0]).abs() <= allowed[0] * right[0].abs() + beyond[0] + 1e-37).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_keep_every_nan(dtype: torch.dtype) -> None:
    """Also one all of whose bits are set, which rounding like a number would make a zero."""
    nan = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    i, f, dh = torch.randn(3, 1, 3, 5 * 64).to(dtype)
    i[..., ::5], f[..., 1::5] = torch.tensor(-1, dtype=torch.int16).view(dtype), math.nan
    bound, state = torch.zeros(5 * 64), torch.zeros(1, 5 * 64)
    bound[2::5], state[:, 3::5] = nan, nan
    leaves = [x.requires_grad_() for x in (i, f, bound, state)]
    h, final = hgru(leaves[0], leaves[1], leaves[2], None, leaves[3], backend="native")
    di, df, *_ = torch.autograd.grad(h, leaves, dh)
    for found in (h, final, df):
        assert found.isnan().reshape(-1, 64, 5).all(1).all(0).tolist() == [True] * 4 + [False]
    assert di.isnan().reshape(-1, 64, 5).all(1).all(0).tolist()[:3] == [True] * 3
    assert not any(found[..., 4::5].isnan().any() for found in (h, final, di, df))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_agrees_with_the_loop(activation: str, pairs: bool) -> None:
    """test_ops.py draws the flags and the shapes; names it leaves at their defaults."""
    for backend in (backend for backend in OP.backends[1:] if not backend.foreign):
        for direction, dtype in (("forward", torch.bfloat16), ("backward", torch.float32)):
            sizes = {"B": 2, "N": 2, "T": 35, "D": 21}
            problem = pose(OP, direction, sizes, dtype=dtype, device=CPU, activation=activation, theta=pairs)
            if backend.cannot(problem):
                continue
            inputs = draw(OP, problem)
            wrong = Expected.of(inputs).difference(inputs.call(backend, backend.configs(problem)[0])())
            assert wrong is None, f"{backend.name}: {wrong}"


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_every_activation(activation: str, pairs: bool) -> None:
    drawn = OP.sample({"B": 1, "N": 3, "T": 5, "D": 2}, dtype=torch.float64, theta=pairs)
    given = [drawn[arg.name] for arg in OP.inputs]
    leaves = [x.requires_grad_() for x in given if x is not None]
    cu_seqlens = torch.tensor([0, 2, 2, 5])

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        queue = list(leaves)
        tensors = [None if x is None else queue.pop(0) for x in given]
        options: dict[str, Any] = {"activation": activation, "reverse": pairs, "backend": "naive"}
        return hgru(*tensors, cu_seqlens=cu_seqlens, **options)  # type: ignore[arg-type]

    torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_gradients_of_bounds_and_angles_over_many_rows() -> None:
    """Sums over 20,000 rows in float32 stay near those in float64, on every backend."""
    torch.manual_seed(0)
    tensors = OP.sample({"B": 2, "T": 10_000, "D": 3}, theta=True, initial_state=False)
    names = ("i", "f", "lower_bound", "theta")

    def gradients(dtype: torch.dtype, backend: str) -> tuple[Tensor, ...]:
        leaves = [tensors[name].detach().to(dtype).requires_grad_() for name in names]  # type: ignore[union-attr]
        h, _ = hgru(*leaves, backend=backend)
        return torch.autograd.grad(h.square().sum(), leaves[2:])

    exact = gradients(torch.float64, "compiled")
    for backend in ("compiled", "native"):
        for found, right in zip(gradients(torch.float32, backend), exact):
            assert found.dtype == torch.float32
            assert (found - right).abs().max() <= 1e-5 * right.abs().max(), backend


def test_what_is_not_given_is_zeros() -> None:
    torch.manual_seed(1)
    i, f = torch.randn(2, 9, 5, 2), torch.randn(2, 9, 5)
    for backend in ("naive", "compiled", "native"):
        bare = hgru(i, f, backend=backend)
        full = hgru(i, f, torch.zeros(5), torch.zeros(5), torch.zeros(2, 5, 2), backend=backend)
        assert all(torch.equal(one, two) for one, two in zip(bare, full)), backend


@pytest.fixture
def any_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if reason := jit_cpp.reason(native.SOURCE):
        pytest.skip(reason)
    monkeypatch.setattr(native, "SERIAL_SIZE", 0)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("any_threads")
@pytest.mark.parametrize("columns", [1, 17, 41, 512, 1030, 2049])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_depend_neither_on_threads_nor_on_config(columns: int, pairs: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(columns)
    packed, reverse = columns % 2 == 0, columns % 3 == 0
    sizes = {"B": 1 if packed else 2, "N": 4 if packed else 2, "T": 9, "D": columns}
    cu_seqlens = torch.tensor([0, 4, 4, 7, 9], dtype=torch.int32) if packed else None
    given = list(OP.sample(sizes, dtype=dtype, theta=pairs).values())
    options: dict[str, Any] = {"reverse": reverse, "activation": "silu" if columns % 4 < 2 else "tanh"}
    states, dh = torch.randn_like(given[4]), torch.randn_like(given[0])  # type: ignore[arg-type]

    def run(config: dict[str, int]) -> list[Tensor]:
        h, final = native.forward(*given, cu_seqlens, **options, config=config)
        residuals = (given[0], given[1], h, *given[2:])
        grads = native.backward(dh, states, *residuals, cu_seqlens, **options, needs=(True,) * 5, config=config)
        return [h, final, *[g for g in grads if g is not None]]

    torch.set_num_threads(1)
    expected = run({"block": 2048, "around_cache_mib": 24})
    for threads, block, around in ((2, 4096, 0), (1, 32, 24), (2, 288, 0), (2, 33, 0)):
        torch.set_num_threads(threads)
        for got, wanted in zip(run({"block": block, "around_cache_mib": around}), expected):
            assert torch.equal(got, wanted), (threads, block)


@pytest.mark.usefixtures("any_threads")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("columns", [3, 41])
def test_split_time_is_the_same(columns: int, pairs: bool, packed: bool) -> None:
    """Empty sequences and chunks, chunks of a row, any number of threads."""
    torch.manual_seed(columns)
    sizes = {"B": 1 if packed else 2, "N": 4 if packed else 2, "T": 29, "D": columns}
    cu_seqlens = torch.tensor([0, 2, 2, 21, 29]) if packed else None
    given = list(OP.sample(sizes, dtype=torch.float64, theta=pairs).values())
    states, dh = torch.randn_like(given[4]), torch.randn_like(given[0])  # type: ignore[arg-type]

    def run(reverse: bool, split: int, threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        options: dict[str, Any] = {"activation": "silu", "reverse": reverse}
        options["config"] = {"block": 2048, "around_cache_mib": 24, "split": split}
        h, final = native.forward(*given, cu_seqlens, **options)
        residuals = (given[0], given[1], h, *given[2:])
        grads = native.backward(dh, states, *residuals, cu_seqlens, needs=(True,) * 5, **options)
        return [h, final, *[g for g in grads if g is not None]]

    for reverse in (False, True):
        expected = run(reverse, 1, 1)
        for split in (2, 3, 8):
            for one, two, wanted in zip(run(reverse, split, 1), run(reverse, split, 2), expected):
                assert torch.equal(one, two)
                torch.testing.assert_close(one, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("any_threads")
def test_sixteen_bits_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches and rows may have any strides; what the backend makes beside its results is small."""
    torch.manual_seed(2)
    both = torch.randn(2, 40, 192).bfloat16()
    i, f, bound = both[..., :64].unflatten(-1, (32, 2)), both[..., 64:96], torch.rand(32)
    config = {"block": 2048, "around_cache_mib": 24}
    options: dict[str, Any] = {"activation": "silu", "reverse": False, "config": config}
    made: list[int] = []

    class Counts(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                made.append(out.numel())
            return out

    with Counts():
        h, _ = native.forward(i, f, bound, bound, None, None, **options)
        native.backward(h, None, i, f, h, bound, bound, None, None, needs=(True,) * 5, **options)
    results = sorted((h.numel(), i.numel(), f.numel()))
    assert sorted(n for n in made if n > 1000) == results
    expected, _ = hgru(i.contiguous(), f.contiguous(), bound, bound)
    assert torch.equal(h, expected)


WRONG: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "activation": (ValueError, "hgru: no activation 'relu'; there are 'silu', 'identity'",
                   lambda: hgru(torch.rand(1, 2, 3), torch.rand(1, 2, 3), activation="relu")),
    "theta": (ValueError, r"hgru: theta rotates pairs, expected i as \[B, T, D, 2\], but i has 3 axes",
              lambda: hgru(torch.rand(1, 2, 3), torch.rand(1, 2, 3), None, torch.rand(3))),
    "width": (ValueError, "hgru: axis D is 3 in i but 4 in f", lambda: hgru(torch.rand(1, 2, 3), torch.rand(1, 2, 4))),
    "bound": (ValueError, "hgru: axis D is 3 in i but 1 in lower_bound",
              lambda: hgru(torch.rand(1, 2, 3), torch.rand(1, 2, 3), torch.rand(1))),
    "narrow bound": (TypeError, "lower_bound is bfloat16 but i is bfloat16, so lower_bound must be float32",
                     lambda: hgru(*torch.rand(2, 1, 2, 3).bfloat16(), torch.rand(3).bfloat16())),
    "pairs": (ValueError, r"hgru: axis pair is 4 in i, expected 2",
              lambda: hgru(torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3))),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    error, message, call = WRONG[name]
    with pytest.raises(error, match=message):
        call()
