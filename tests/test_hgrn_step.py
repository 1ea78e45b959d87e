"""One token of an HGRN layer in one native call is what its modules and ops make of it, and only where nobody looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_calls import TOLERANCES, calls_of, check_close, on_threads
from torch import Tensor, nn

from kernels import jit_cpp
from kernels.hgru import step
from kernels.projections import ROWS
from mixers.hgrn import HGRN

pytestmark = pytest.mark.skipif(jit_cpp.reason(step.SOURCE) is not None, reason="no C++ compiler")

OPTIONS: dict[str, dict[str, Any]] = {
    "complex": {},
    "real": {"complex": False},
    "rms": {"norm": "rms", "bias": False, "expand": 2},
    "gate first": {"complex": False, "gate_first": True, "lower_bound": 0.3},
    "bound": {"gate_first": True, "norm": "rms", "lower_bound": torch.linspace(0, 0.9, 21)},
}


native = calls_of(step)


def _layer(dim: int, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    layer = HGRN(dim, **options).to(dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_token_alone(options: dict[str, Any], dtype: torch.dtype, native: list[str]) -> None:
    torch.manual_seed(0)
    layer = _layer(21, dtype, **options)
    for batch in (1, ROWS):
        # every other number, so that nothing lies side by side
        x = torch.randn(batch, 1, 42).to(dtype)[..., ::2]
        h = layer.init_state(batch)["h"]
        state = {"h": torch.randn_like(h)}
        before = state["h"].clone()
        native.clear()
        with torch.no_grad():
            y, after = layer(x, state)
        assert native == ["hgru_step"]
        want, want_after = layer(x, state)
        assert len(native) == 1
        assert want.requires_grad
        assert torch.equal(state["h"], before)
        assert after.keys() == state.keys()
        for found, right in ((y, want), (after["h"], want_after["h"])):
            check_close(found, right, dtype)


@torch.no_grad()
def test_bits_do_not_depend_on_threads(native: list[str]) -> None:
    torch.manual_seed(0)
    layer, x = _layer(200), torch.randn(1, 1, 200)
    assert layer.i_proj.weight.numel() >= step.SERIAL_SIZE
    made = on_threads(lambda: layer(x, {"h": torch.ones(1, 200, 2)}))
    assert len(native) == 15
    for y, state in made:
        assert torch.equal(y, made[0][0])
        assert torch.equal(state["h"], made[0][1]["h"])


class Doubled(HGRN):
    def recur(self, *args: Any) -> tuple[Tensor, Tensor]:
        h, last = super().recur(*args)
        return 2 * h, last


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _buffered(m: nn.Module) -> None:
    del m.bias
    m.register_buffer("bias", torch.ones(8))


def _with(change: Callable[[Any], Any], **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        layer = _layer(8, **options)
        change(layer)
        return layer

    return make


OTHERS: dict[str, Callable[[], Any]] = {
    "another backend": lambda: _layer(8, backend="naive"),
    "recompute": lambda: _layer(8, recompute=True),
    "convolution": lambda: _layer(8, short_conv=3),
    "bidirectional": lambda: _layer(8, bidirectional=True),
    "subclass": lambda: Doubled(8),
    "subclass inside": _with(lambda layer: setattr(layer, "o_proj", Scaled(16, 8))),
    "hook": _with(lambda layer: layer.f_proj.register_forward_hook(lambda _, __, y: 2 * y)),
    "hook of the norm": _with(lambda layer: layer.norm.register_forward_pre_hook(lambda *_: None)),
    "norm's activation": _with(lambda layer: setattr(layer.norm, "activation", "sigmoid")),
    "forward of its own": _with(lambda layer: setattr(layer.g_proj, "forward", lambda x: torch.ones(1, 1, 16))),
    "norm in float64": _with(lambda layer: layer.norm.double()),
    "buffer": _with(lambda layer: _buffered(layer.f_proj)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_whatever_is_not_just_that_layer_is_asked(name: str, native: list[str]) -> None:
    layer = OTHERS[name]()
    x = torch.randn(1, 1, 8)
    y, _ = layer(x)
    assert not native
    with torch.enable_grad():
        torch.testing.assert_close(y, layer(x)[0])


@torch.no_grad()
def test_who_looks_sees_the_ops(native: list[str]) -> None:
    layer, x = _layer(8), torch.randn(1, 1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x)[0].dtype == torch.bfloat16
    layer(x, cu_seqlens=torch.tensor([0, 1]))
    layer(x.expand(ROWS + 1, 1, 8))
    assert not native
    for state, error, what in (
        (torch.zeros(1, 9, 2), ValueError, "HGRN: state 'h'"),
        (torch.zeros(1, 8), ValueError, "HGRN: state 'h'"),
        (torch.zeros(1, 8, 2).double(), TypeError, "hgru: "),
    ):
        with pytest.raises(error, match=what):
            layer(x, {"h": state})
    with pytest.raises(TypeError, match="but its weights are"):
        layer(x.double())
    layer.theta = nn.Parameter(torch.zeros(1, 8, 1))
    with pytest.raises(ValueError, match="theta"):
        layer(x)
    assert not native


@torch.no_grad()
def test_parameters_are_those_of_the_moment(native: list[str]) -> None:
    layer, x = _layer(8), torch.randn(1, 1, 8)
    layer(x)
    layer.o_proj.weight.data = layer.o_proj.weight.data.new_zeros(16, 8).mT
    # what does not lie side by side is multiplied by its module
    assert torch.equal(layer(x)[0][0, 0], layer.o_proj.bias)
    assert len(native) == 1
    layer.o_proj.weight = nn.Parameter(torch.zeros(8, 16))
    assert torch.equal(layer(x)[0][0, 0], layer.o_proj.bias)
    assert len(native) == 2
    assert layer.double()(x.double())[0].dtype == torch.float64
    assert len(native) == 3
