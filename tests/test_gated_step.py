"""One token in one native call, from projections to gated norm, is what gla and the norm make of it, and only where
nobody looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_calls import TOLERANCES, calls_of, check_close, on_threads
from torch import Tensor, nn

import mixers
from kernels import jit_cpp
from kernels.gla import gated_step
from mixers.hgrn2 import HGRN2

pytestmark = pytest.mark.skipif(jit_cpp.reason(gated_step.SOURCE) is not None, reason="no C++ compiler")

# heads of 7 to 38 numbers: fewer than a vector has, and more that are no multiple of one
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gla": ("gla", {"dim": 42, "heads": 3, "expand_v": 2.0}),
    "gla, sigmoid": ("gla", {"dim": 38, "heads": 1, "expand_k": 1.0, "gate": "sigmoid", "temperature": 2.0}),
    "gla, identity": ("gla", {"dim": 36, "heads": 2, "gate": "identity"}),
    "gla, no gate": ("gla", {"dim": 36, "heads": 2, "gate": None}),
    "hgrn2": ("hgrn2", {"dim": 42, "heads": 3}),
    "hgrn2, a bound": ("hgrn2", {"dim": 21, "heads": 3, "lower_bound": 0.3}),
    "hgrn2, bounds": ("hgrn2", {"dim": 38, "heads": 1, "lower_bound": torch.linspace(0, 0.9, 38)}),
    "rwkv6": ("rwkv6", {"dim": 42, "heads": 3, "rank": 5, "decay_rank": 7, "depth": 0.5}),
}


native = calls_of(gated_step)


def _layer(what: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    name, given = LAYERS[what]
    layer = mixers.build(name, **{**given, **options}).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("what", LAYERS)
def test_a_token_alone(what: str, dtype: torch.dtype, native: list[str]) -> None:
    torch.manual_seed(0)
    layer = _layer(what, dtype)
    for batch in (1, 3):
        # every other number, so that nothing lies side by side
        x = torch.randn(batch, 1, 2 * layer.dim).to(dtype)[..., ::2]
        state = layer.init_state(batch)
        state = {name: torch.randn(*s.shape[:-1], 2 * s.shape[-1]).to(s.dtype)[..., ::2] for name, s in state.items()}
        before = state["S"].clone()
        native.clear()
        with torch.no_grad():
            y, after = layer(x, state)
        assert native == ["gla_gated_step"]
        want, want_after = layer(x, state)
        assert len(native) == 1
        assert want.requires_grad
        assert torch.equal(state["S"], before)
        for found, right in ((y, want), (after["S"], want_after["S"])):
            check_close(found, right, dtype)


@torch.no_grad()
@pytest.mark.parametrize("whole", [False, True])
def test_bits_do_not_depend_on_threads(whole: bool) -> None:
    torch.manual_seed(0)
    q, k, v, f, g = torch.randn(5, 5, 1, 210).unbind()
    state = torch.randn(5, 3, 70, 70)
    assert state.numel() >= gated_step.SERIAL_SIZE
    options: dict[str, Any] = {"weight": None, "bias": None, "center": True, "activation": "silu", "eps": 1e-5}
    options |= {"heads": 3, "temperature": 16.0, "whole": whole}
    made = on_threads(lambda: gated_step.step(q, k, v, f, g, state, **options))
    for y, after in made:
        assert torch.equal(y, made[0][0])
        assert torch.equal(after, made[0][1])


@torch.no_grad()
@pytest.mark.parametrize("z", [-200.0, -20.0, 20.0, 200.0])
@pytest.mark.parametrize("what", ["gla", "hgrn2", "hgrn2, a bound"])
def test_extreme_gates(what: str, z: float, native: list[str]) -> None:
    """As the ops where a decay is next to 1, of which 1 less that decay would leave nothing, or next to 0."""
    torch.manual_seed(0)
    layer = _layer(what)
    gates = layer.f_proj if what.startswith("hgrn2") else layer.decay_proj[1]
    gates.weight.zero_()
    gates.bias = nn.Parameter(torch.full((gates.out_features,), z))
    x, full = torch.randn(1, 1, layer.dim), layer.init_state(1)
    full["S"] = torch.randn_like(full["S"])
    for state in (None, full):
        native.clear()
        found = layer(x, state)[1]["S"]
        assert len(native) == 1
        with torch.enable_grad():
            torch.testing.assert_close(found, layer(x, state)[1]["S"], rtol=1e-5, atol=0 if state is None else 1e-6)


class Halved(HGRN2):
    def gates(self, f: Tensor) -> tuple[Tensor, Tensor]:
        log_decay, k = super().gates(f)
        return log_decay, 0.5 * k


def _with(change: Callable[[Any], Any], what: str = "gla", **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        layer = _layer(what, **options)
        change(layer)
        return layer

    return make


OTHERS: dict[str, Callable[[], Any]] = {
    "another backend": lambda: _layer("gla", backend="naive"),
    "another activation": lambda: _layer("gla", gate="gelu"),
    "subclass": lambda: Halved(21, heads=3),
    "hook of the norm": _with(lambda layer: layer.norm.register_forward_hook(lambda _, __, y: 2 * y), "hgrn2"),
    "another norm": _with(lambda layer: setattr(layer, "norm", nn.Sequential(layer.norm)), "hgrn2"),
    "forward of its own": _with(lambda layer: setattr(layer.norm, "forward", lambda x, g: 2 * g)),
    "gate first": _with(lambda layer: setattr(layer.norm, "gate_first", True)),
    "norm in float64": _with(lambda layer: layer.norm.double()),
    "bonus in float64": _with(lambda layer: setattr(layer, "bonus", nn.Parameter(layer.bonus.double())), "rwkv6"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_whatever_is_not_just_that_layer_is_asked(name: str, native: list[str]) -> None:
    layer = OTHERS[name]()
    x = torch.randn(1, 1, layer.dim)
    y, _ = layer(x)
    assert not native
    with torch.enable_grad():
        torch.testing.assert_close(y, layer(x)[0])


@torch.no_grad()
@pytest.mark.parametrize("what", ["gla", "hgrn2", "rwkv6"])
def test_who_looks_sees_the_ops(what: str, native: list[str]) -> None:
    layer = _layer(what)
    x = torch.randn(1, 1, layer.dim)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x)[0].dtype == torch.bfloat16
    layer(x, cu_seqlens=torch.tensor([0, 1]))
    layer(x.expand(1, 2, layer.dim))
    assert not native
    layer(x)
    assert len(native) == 1


@torch.no_grad()
@pytest.mark.parametrize("what", ["gla", "hgrn2", "rwkv6"])
def test_nothing_of_another_shape_or_dtype_is_read(what: str, native: list[str]) -> None:
    layer = _layer(what)
    x, state = torch.randn(2, 1, layer.dim), layer.init_state(2)
    S = state["S"]
    for wrong in (S[..., 1:], S[:, :, 1:], S[:, 1:], S[0:2, 0], S.view(2, S.shape[1], 1, -1)):
        with pytest.raises(ValueError, match="state 'S'"):
            layer(x, {**state, "S": wrong})
    with pytest.raises(TypeError, match="float64"):
        layer(x, {**state, "S": S.double()})
    layer.norm.weight = nn.Parameter(torch.ones(5))
    with pytest.raises(ValueError, match="gla: weight"):
        layer(x)
    assert not native


@torch.no_grad()
def test_projections_may_come_in_another_dtype(native: list[str]) -> None:
    layer = _layer("gla")
    x = torch.randn(1, 1, layer.dim)
    expected = layer(x)[0]
    layer.k_proj.register_forward_hook(lambda _, __, k: k.double())
    torch.testing.assert_close(layer(x)[0], expected)
    assert len(native) == 2
