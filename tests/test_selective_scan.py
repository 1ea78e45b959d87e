"""The selective scan: its closed form, transformers' scan, hard steps, long sequences, wrong calls."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import jit_cpp
from kernels.selective_scan import OP, compiled, native, selective_scan

pytestmark = pytest.mark.usefixtures("nan_filled")

FLOAT64 = torch.float64
NAMES = [arg.name for arg in OP.inputs]
BACKENDS = [backend.name for backend in OP.backends if not backend.devices or "cpu" in backend.devices]


def sample(dtype: torch.dtype = FLOAT64, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
    sizes = {"B": 2, "T": 9, "D": 5, "K": 3} | sizes
    found = OP.sample(sizes, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    return {name: found[name] for name in NAMES}  # type: ignore[misc]


def with_gradients(inputs: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """y, the final state, and the gradients of all inputs through both."""
    leaves: dict[str, Any] = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    y, final = selective_scan(**leaves, **options)
    # the same numbers in every dtype
    weights = [torch.linspace(-1, 1, out.numel()).bfloat16().to(out.dtype).view_as(out) for out in (y, final)]
    return [y.detach(), final.detach(), *torch.autograd.grad((y, final), list(leaves.values()), weights)]


def closed_form(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, initial_state: Tensor) -> Any:
    """Every token's share in every later one, without a recurrence: exp(A (Δ[s+1] + ... + Δ[t])) Δ[s] x[s] B[s]."""
    passed = delta.cumsum(1)
    between = (passed[:, :, None] - passed[:, None])[..., None] * A
    T = x.shape[1]
    decay = between.exp().masked_fill(torch.ones(T, T).triu(1).bool()[..., None, None], 0)
    h = torch.einsum("btsdk,bsd,bsk->btdk", decay, delta * x, B)
    h = h + (passed[..., None] * A).exp() * initial_state[:, None]
    return torch.einsum("btdk,btk->btd", h, C) + D * x, h[:, -1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [{}, {"B": 1, "T": 70, "D": 19, "K": 1}, {"T": 1}, {"T": 34, "K": 8, "D": 33}])
def test_closed_form(backend: str, sizes: dict[str, int]) -> None:
    inputs = sample(FLOAT64, **sizes)
    for found, right in zip(selective_scan(**inputs, backend=backend), closed_form(**inputs)):
        assert torch.allclose(found, right, atol=1e-12)


def test_agrees_with_transformers() -> None:
    """Their torch path, which has [B, D, T]: outputs, the final state, and what autograd makes of it."""
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    theirs = getattr(modeling, "mamba_selective_scan", None)
    if theirs is None:
        pytest.skip("this version of transformers has its scan inside the layer")
    inputs = sample(torch.float32, T=37, D=12, K=7)
    del inputs["initial_state"]
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    x, delta, A, B, C, D = leaves.values()
    rows = (t.transpose(1, 2) for t in (x, delta, B, C))
    y, final = theirs(*itertools.islice(rows, 2), A, *rows, D=D, return_last_state=True)
    y = y.transpose(1, 2)
    weights = [torch.randn_like(y), torch.randn_like(final)]
    right = torch.autograd.grad((y, final), list(leaves.values()), weights)
    for backend in BACKENDS:
        found = selective_scan(x, delta, A, B, C, D, backend=backend)
        for one, two in zip((*found, *torch.autograd.grad(found, list(leaves.values()), weights)), (y, final, *right)):
            assert (one - two).abs().max() <= 1e-5 * two.abs().max()


@pytest.mark.parametrize("backend", BACKENDS[1:])
@settings(max_examples=15)
@given(
    step=st.sampled_from((0.0, 1e-8, 1e-3, 1.0, 1e3)),
    rate=st.sampled_from((0.0, -1e-8, -1.0, -1e3, -1e30)),
    mixed=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    seed=st.integers(0, 100),
)
def test_hard_steps(backend: str, step: float, rate: float, mixed: bool, dtype: torch.dtype, seed: int) -> None:
    """Steps that do nothing or everything, states that never decay or at once: no error grows, nothing overflows."""
    inputs = sample(dtype, seed, T=67, D=18)
    hard = torch.full_like(inputs["delta"], step)
    # hard ones alone, or among ordinary ones
    inputs["delta"] = torch.where(torch.arange(67)[:, None] % 3 > 0, inputs["delta"], hard) if mixed else hard
    inputs["A"] = torch.full_like(inputs["A"], rate)
    right = with_gradients({name: tensor.double() for name, tensor in inputs.items()}, backend="naive")
    for name, found, exact in zip(["y", "final", *NAMES], with_gradients(inputs, backend=backend), right):
        assert found.isfinite().all(), name
        scale = float(exact.abs().max())
        assert (found - exact).abs().max() <= max(2 * torch.finfo(found.dtype).eps, 3e-5) * scale, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_zero_changes_no_bit_of_the_state(backend: str) -> None:
    inputs = sample(torch.float32, T=70, D=40)
    inputs["delta"] = torch.zeros_like(inputs["delta"])
    y, final = selective_scan(**inputs, backend=backend)
    assert torch.equal(final, inputs["initial_state"])
    right = torch.einsum("bdk,btk->btd", final, inputs["C"]) + inputs["D"] * inputs["x"]
    assert torch.allclose(y, right, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_long_sequences_are_their_parts(backend: str) -> None:
    """5000 rows at once, and in parts of uneven length that hand on their state; gradients come back through it."""
    inputs = sample(torch.float32, B=1, T=5000, D=3, K=2)
    inputs["delta"] = inputs["delta"] / 20
    cuts = [0, 1, 63, 2048, 5000]
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    state, ys = leaves["initial_state"], []
    for start, end in itertools.pairwise(cuts):
        rows = {name: leaves[name][:, start:end] for name in ("x", "delta", "B", "C")}
        y, state = selective_scan(**rows, A=leaves["A"], D=leaves["D"], initial_state=state, backend=backend)
        ys.append(y)
    whole = selective_scan(**leaves, backend=backend)
    for one, two in zip((torch.cat(ys, 1), state), whole):
        assert (one - two).abs().max() <= 1e-5 * two.abs().max()
    found = [
        torch.autograd.grad(y.sum() + s.sum(), list(leaves.values())) for y, s in ((torch.cat(ys, 1), state), whole)
    ]
    for one, two in zip(*found):
        assert (one - two).abs().max() <= 1e-4 * two.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_are_separate_ones(backend: str) -> None:
    lengths = [40, 0, 31, 1, 70]
    inputs = sample(B=1, T=sum(lengths), N=5, D=20)
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    y, final = selective_scan(**inputs, cu_seqlens=borders, backend=backend)
    for n, (start, end) in enumerate(itertools.pairwise(borders.tolist())):
        state = inputs["initial_state"][n : n + 1]
        if start < end:
            rows = {name: inputs[name][:, start:end] for name in ("x", "delta", "B", "C")}
            part, state = selective_scan(**rows, A=inputs["A"], D=inputs["D"], initial_state=state, backend="naive")
            assert torch.allclose(y[:, start:end], part, atol=1e-12)
        assert torch.allclose(final[n : n + 1], state, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_and_second_gradients(backend: str) -> None:
    inputs = sample(B=1, T=3, D=2, K=2)
    tensors = [tensor.requires_grad_() for tensor in inputs.values()]

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(*tensors, backend=backend)

    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_strides_do_not_matter_and_gradients_that_nobody_needs_are_not_made(backend: str) -> None:
    plain = sample(torch.float32, D=6)
    strided = {
        name: tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor.repeat_interleave(2)[::2]
        for name, tensor in plain.items()
    }
    for one, two in zip(with_gradients(plain, backend=backend), with_gradients(strided, backend=backend)):
        assert torch.allclose(one, two, rtol=1e-5, atol=1e-5)
    module: Any = {"native": native, "compiled": compiled}[backend]
    config: Any = OP.backend(backend)
    problem = OP.problem_of("forward", (*plain.values(), None, "auto"))
    given = (plain["x"], None, *plain.values(), None)
    everything: Any = OP.backend("naive").function("backward")(*given, needs=(True,) * 7)
    for needed in range(7):
        needs = tuple(i == needed for i in range(7))
        found = module.backward(*given, needs=needs, config=config.configs(problem)[0])
        assert [g is not None for g in found] == list(needs)
        assert torch.allclose(found[needed], everything[needed], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("formats", native.FORMATS)
def test_bits_of_native_do_not_depend_on_threads(
    formats: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := jit_cpp.reason(native.SOURCE):
        pytest.skip(reason)
    monkeypatch.setattr(native, "SERIAL_SIZE", 0)
    step, dtype = formats
    before = torch.get_num_threads()
    for sizes, cu_seqlens in (({}, None), ({"B": 1, "N": 3}, torch.tensor([0, 33, 33, 90]))):
        inputs = sample(dtype, **{"T": 90, "D": 150, **sizes})
        inputs["delta"] = inputs["delta"].to(step)
        runs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(with_gradients(inputs, cu_seqlens=cu_seqlens, backend="native"))
        torch.set_num_threads(before)
        for one, two, three in zip(*runs):
            assert torch.equal(one, two)
            assert torch.equal(one, three)


class Largest(TorchDispatchMode):
    """The numbers in the largest tensor that anything returned."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_states_of_all_rows_never_exist() -> None:
    """T D K numbers are 4,096,000; a part of 64 rows has 131,072 and x has 256,000."""
    inputs = sample(torch.float32, B=1, T=2000, D=128, K=16)
    given = (inputs["x"], None, *inputs.values(), None)
    modules: list[Any] = [compiled, native]
    for module in modules:
        config = {"rows": 64, "chunk": 8, "inductor": 0}
        with Largest() as largest:
            module.forward(*inputs.values(), None, config=config)
            module.backward(*given, needs=(True,) * 7, config=config)
        assert 0 < largest.numbers <= 262_144
    with Largest() as largest:
        closed = torch.exp(inputs["delta"][..., None] * inputs["A"])
    assert largest.numbers == closed.numel() == 4_096_000


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"delta": torch.ones(2, 9, 4)}, ValueError, "selective_scan: axis D is 5 in x but 4 in delta"),
        ({"B": torch.ones(2, 9, 4)}, ValueError, "selective_scan: axis K is 3 in A but 4 in B"),
        ({"C": torch.ones(2, 8, 3)}, ValueError, "selective_scan: axis T is 9 in x but 8 in C"),
        ({"A": torch.ones(5)}, ValueError, "selective_scan: A has 1 axes"),
        ({"A": -torch.ones(5, 3, dtype=FLOAT64)}, TypeError, "A is float64 but x is float32, so A must be float32"),
        ({"B": torch.ones(2, 9, 3, dtype=torch.bfloat16)}, TypeError, "B is bfloat16 but x is float32"),
        ({"D": torch.ones(4)}, ValueError, "selective_scan: axis D is 5 in x but 4 in D"),
        ({"initial_state": torch.ones(3, 5, 3)}, ValueError, "axis N is 3 in initial_state but the batch B is 2"),
        ({"cu_seqlens": torch.tensor([0, 4, 9])}, ValueError, "axis B is 2, but packed sequences"),
        ({"x": None}, TypeError, "selective_scan: x is missing"),
        ({"backend": "fast"}, ValueError, "no backend 'fast'; there are auto, naive, compiled, native"),
    ],
)
def test_wrong_calls(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        selective_scan(**{**sample(torch.float32), **change})
