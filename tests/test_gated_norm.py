"""The gated norm: torch's own norms and activations, heads, layouts, threads, and numbers that are hard to norm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.agreement import Expected, draw, pose
from kernels.gated_norm import OP, gated_norm, naive
from kernels.gated_norm import native as backend
from kernels.gated_norm.step import step
from kernels.problem import state_dtype
from mixers.heads import GatedNorm
from tests.triton_interpreter import run

pytestmark = pytest.mark.usefixtures("nan_filled")
NATIVE, CPU = OP.backend("native"), torch.device("cpu")
FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
CONFIG = {"around_cache_mib": 24}
ACTIVATIONS = {
    "identity": lambda g: g, "silu": F.silu, "sigmoid": torch.sigmoid, "gelu": F.gelu, "relu": F.relu,
    "tanh": torch.tanh,
}  # fmt: skip


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = FLOAT64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed), dtype=FLOAT64).to(dtype)


@pytest.mark.parametrize("name", ["naive", "native"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_torchs_norms_and_activations(activation: str, name: str) -> None:
    """Outputs and all gradients, over the whole row and over heads with weights of their own or shared."""
    act, D, H = ACTIVATIONS[activation], 21, 3
    tensors = [t.requires_grad_() for t in (rows(2, 5, D), rows(2, 5, D, seed=1), rows(D), rows(D, seed=1))]
    x, gate, weight, bias = tensors
    if name == "native" and activation not in backend.ACTIVATIONS:
        with pytest.raises(RuntimeError, match=f"no kernel for activation '{activation}'"):
            gated_norm(x, gate, activation=activation, backend=name)
        return
    heads, of_heads = x.view(2, 5, H, -1), (weight.view(H, -1), bias.view(H, -1))
    how: dict[str, Any] = {"activation": activation, "eps": 1e-3, "backend": name}

    def grouped(u: Tensor) -> Tensor:
        return F.group_norm(u.reshape(10, D), H, weight, bias, 1e-3).view(u.shape)

    cases = [
        (gated_norm(x, gate, weight, bias, norm="layer", **how), F.layer_norm(x, (D,), weight, bias, 1e-3) * act(gate)),
        (gated_norm(x, gate, weight, **how), F.rms_norm(x, (D,), weight, 1e-3) * act(gate)),
        (gated_norm(x, gate, weight, gate_first=True, **how), F.rms_norm(x * act(gate), (D,), weight, 1e-3)),
        (gated_norm(heads, gate, *of_heads, norm="layer", **how).flatten(2), grouped(x) * act(gate)),
        (gated_norm(heads, gate, *of_heads, norm="layer", gate_first=True, **how).flatten(2), grouped(x * act(gate))),
        (gated_norm(heads, None, weight[:7], **how), F.rms_norm(heads, (7,), weight[:7], 1e-3)),
    ]
    dy = rows(2, 5, D, seed=2)
    for found, expected in cases:
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(y, tensors, dy.view(y.shape), allow_unused=True) for y in (found, expected)]
        for ours, theirs in zip(*gradients):
            assert (ours is None) == (theirs is None)
            torch.testing.assert_close(ours, theirs)


def test_the_slope_of_tanh_does_not_cancel() -> None:
    """1 − tanh² is 0 in float32 from 9 on; the gradient of a gate is not."""
    g = torch.tensor([-20.0, -9.0, 9.0, 20.0])
    torch.testing.assert_close(naive.ACTIVATIONS["tanh"][1](g).double(), g.double().cosh() ** -2, rtol=1e-6, atol=0)


WIDTHS = [(1, 2), (3, 3), (8, 2), (15, 1), (16, 2), (17, 3), (33, 1), (64, 2), (100, 1), (515, 1)]
DTYPES = [(FLOAT64, FLOAT64), (FLOAT32, FLOAT32), (FLOAT16, FLOAT16), (BFLOAT16, BFLOAT16), (BFLOAT16, FLOAT32)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_heads_that_fill_vectors_and_those_that_do_not(direction: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    for n, (width, heads) in enumerate(WIDTHS):
        sizes = {"B": 2, "T": 67 if width < 20 else 5, "H": heads, "V": width}
        facts = {"center": n % 2 == 0, "gate_first": n % 3 == 0, "activation": ("silu", "sigmoid", "identity")[n % 3]}
        problem = pose(
            OP, direction, sizes, dtype=dtypes[0], device=CPU, decay_dtype=dtypes[1], bias=n % 4 < 2, **facts
        )
        inputs = draw(OP, problem, seed=n)
        for config in backend.configs(problem):
            wrong = Expected.of(inputs).difference(inputs.call(NATIVE, config)())
            assert wrong is None, f"{wrong} ({problem})"


@pytest.mark.parametrize("name", ["naive", "native"])
def test_a_mean_far_from_zero_and_one_number_far_from_the_mean(name: str) -> None:
    far = rows(1, 3, 200, dtype=FLOAT32) + 3000
    lone = rows(1, 3, 200, dtype=FLOAT32)
    lone[..., 0] = 3000
    # a mean near 3000 is known to 2.4e-4
    for x in (far, lone):
        y = gated_norm(x, norm="layer", backend=name).double()
        torch.testing.assert_close(y, F.layer_norm(x.double(), (200,)), rtol=1e-4, atol=5e-4)


def test_16_bits_are_rounded_once() -> None:
    x, gate = (rows(2, 9, 70, seed=seed, dtype=BFLOAT16) for seed in (0, 1))
    exact = F.rms_norm(x.double(), (70,), eps=1e-5) * F.silu(gate.double())
    for name in ("naive", "native"):
        found = gated_norm(x, gate, backend=name).double()
        assert bool(((found - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()), name


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_layouts_and_threads_change_no_bit(direction: str) -> None:
    """Columns of a wider projection, time first, and columns that are apart; the last one is copied."""
    sizes = {"B": 2, "T": 300, "H": 2, "V": 60}
    inputs = draw(OP, pose(OP, direction, sizes, dtype=FLOAT32, device=CPU))
    expected = inputs.call(NATIVE, CONFIG)()
    run: Any = inputs.call(NATIVE, CONFIG)
    layouts = [
        lambda t: torch.cat([t, t + 1], 2)[:, :, :2],
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    ]
    for layout in layouts:
        given = [layout(t) if t is not None and t.ndim == 4 else t for t in inputs.tensors]
        assert not all(t.is_contiguous() for t in given if t is not None)
        assert all(torch.equal(f, e) for f, e in zip(run.func(*given, None, **run.keywords), expected))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        assert all(torch.equal(f, e) for f, e in zip(run(), expected))
    finally:
        torch.set_num_threads(threads)


def test_only_the_gradients_that_are_needed() -> None:
    inputs = draw(OP, pose(OP, "backward", {"B": 1, "T": 4, "H": 2, "V": 5}, dtype=FLOAT32, device=CPU))
    run: Any = inputs.call(NATIVE, CONFIG)
    every = run()
    for needed in range(16):
        needs = tuple(bool(needed >> i & 1) for i in range(4))
        found = run.func(*run.args, **{**run.keywords, "needs": needs})
        for need, gradient, expected in zip(needs, found, every):
            assert torch.equal(gradient, expected) if need else gradient is None


@torch.no_grad()
@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("heads", [None, 3])
@pytest.mark.parametrize("gate_first", [False, True])
def test_a_token_alone_has_the_bits_of_the_op(dtype: torch.dtype, heads: int | None, gate_first: bool) -> None:
    x, gate = rows(2, 1, 3, 21, dtype=dtype), rows(2, 1, 63, seed=1, dtype=dtype)
    center = heads is not None
    norm = GatedNorm(21, heads=heads, gate_first=gate_first, center=center, bias=center).to(dtype)
    for n, parameter in enumerate(norm.parameters()):
        parameter.copy_(rows(*parameter.shape, seed=n))
    given = norm.weight, norm.bias
    options = {"activation": "silu", "gate_first": gate_first, "eps": norm.eps}
    for g in (gate, gate.view_as(x), None):
        found = step(x, g, *given, center=center, **options)
        wide = [None if p is None else p.to(state_dtype(dtype)) for p in given]
        expected = gated_norm(x, g, *wide, norm="layer" if center else "rms", backend="native", **options)
        assert found is not None
        assert torch.equal(found, expected.flatten(-2))
        assert torch.equal(norm(x, g), found)


@torch.no_grad()
def test_a_token_alone_that_the_op_is_asked_for() -> None:
    x, gate, weight = rows(2, 1, 3, 21), rows(2, 1, 63), rows(21)
    options: dict[str, Any] = {"center": False, "activation": "silu", "gate_first": False, "eps": 1e-5}
    for case in (
        (x[..., ::2], None, None), (x, gate[..., :-1], None), (x, gate.float(), None), (x, gate, weight[1:]),
        (x.expand(2, 2, 3, 21), None, None), (x.float(), gate.bfloat16(), weight),
    ):  # fmt: skip
        assert step(*case, None, **options) is None
    assert step(x, gate, weight, None, **{**options, "activation": "gelu"}) is None
    with torch.enable_grad():
        assert step(x, gate, weight, None, **options) is None
    with torch.autocast("cpu"):
        assert step(x, gate, weight, None, **options) is None


def test_what_does_not_fit_is_named() -> None:
    x = torch.ones(2, 3, 4)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"norm": "batch"}, ValueError, "gated_norm: no norm 'batch'; there are 'layer', 'rms'"),
        ({"activation": "swish"}, ValueError, "no activation 'swish'; there are 'identity', 'silu'"),
        ({"gate": torch.ones(2, 3, 5)}, ValueError, r"gate is \[2, 3, 5\], which does not fit x \[2, 3, 4\]"),
        ({"weight": torch.ones(5)}, ValueError, "axis V is 4 in x but 5 in weight"),
        ({"gate": x.double()}, TypeError, "gate is float64 but x is float32"),
    ]
    for wrong, error, message in cases:
        with pytest.raises(error, match=message):
            gated_norm(x, **wrong)
    with pytest.raises(ValueError, match=r"x has 2 axes \[3, 4\], expected \[B, T, D\] or \[B, T, H, V\]"):
        gated_norm(x[0])


def test_triton_values_and_bytes() -> None:
    assert run("gated_norm_values.py", interpret=True, share=4) >= 40


@pytest.mark.long
def test_every_triton_kernel() -> None:
    assert run("gated_norm_compile.py", "-m", "long", interpret=False) >= 100
