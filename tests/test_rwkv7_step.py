"""One token of an RWKV-7 layer in one native call is what its modules and ops make of it, where nobody looks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_calls import TOLERANCES, calls_of, check_close, on_threads
from torch import Tensor, nn

from kernels import jit_cpp
from kernels.dplr import step
from kernels.projections import ROWS
from mixers.heads import GatedNorm
from mixers.rwkv7 import RWKV7

pytestmark = pytest.mark.skipif(jit_cpp.reason(step.SOURCE) is not None, reason="no C++ compiler")

# heads of 7, of 1, of 22 and of 70 numbers: parts of vectors, and some behind four
LAYERS: dict[str, dict[str, Any]] = {
    "heads": {"dim": 21, "heads": 3, "rank": 5, "gate_rank": 33},
    "one number each": {"dim": 5, "heads": 5, "rank": 1, "gate_rank": 1},
    "biases": {"dim": 44, "heads": 2, "rank": 37, "gate_rank": 3},
    "one head": {"dim": 70, "heads": 1},
}


native = calls_of(step)


def _layer(dtype: torch.dtype = torch.float32, *, biases: bool = False, **options: Any) -> Any:
    layer = RWKV7(**{"dim": 8, "heads": 2, **options})
    with torch.no_grad():
        for module in layer.children():
            if biases and isinstance(module, nn.Linear):
                module.bias = nn.Parameter(torch.zeros(module.out_features))
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer.to(dtype)


def _state(layer: Any, batch: int) -> dict[str, Tensor]:
    return {name: torch.randn_like(part) for name, part in layer.init_state(batch).items()}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_token_alone(name: str, dtype: torch.dtype, native: list[str]) -> None:
    torch.manual_seed(0)
    layer = _layer(dtype, biases=name == "biases", **LAYERS[name])
    for batch in (1, ROWS):
        # every other number, so that nothing lies side by side
        x, state = torch.randn(batch, 1, 2 * layer.dim).to(dtype)[..., ::2], _state(layer, batch)
        before = {key: part.clone() for key, part in state.items()}
        native.clear()
        with torch.no_grad():
            y, after = layer(x, state)
        assert native == ["dplr_step"]
        want, want_after = layer(x, state)
        assert len(native) == 1
        assert want.requires_grad
        assert all(torch.equal(state[key], before[key]) for key in before)
        assert after.keys() == want_after.keys()
        assert after["x"].data_ptr() != x.data_ptr()
        for found, right in ((y, want), *((after[key], want_after[key]) for key in after)):
            check_close(found, right, dtype)


@torch.no_grad()
@pytest.mark.parametrize("logit", [-200.0, 200.0])
def test_saturated_gates(logit: float, native: list[str]) -> None:
    """Decays, rates and gates at their ends, and a key that is 0."""
    torch.manual_seed(0)
    layer = _layer(torch.float64, biases=True)
    for up in (layer.w_up, layer.a_up, layer.g_down):
        up.bias.fill_(logit)
    layer.k_scale[:4] = 0
    x, state = torch.randn(1, 1, 8).double(), _state(layer, 1)
    y, after = layer(x, state)
    assert native == ["dplr_step"]
    with torch.enable_grad():
        want, want_after = layer(x, state)
    torch.testing.assert_close((y, after), (want.detach(), {k: v.detach() for k, v in want_after.items()}))


@torch.no_grad()
def test_bits_do_not_depend_on_threads(native: list[str]) -> None:
    torch.manual_seed(0)
    layer, x = _layer(dim=264, heads=4), torch.randn(1, 1, 264)
    assert layer.r_proj.weight.numel() >= step.SERIAL_SIZE
    state = _state(layer, 1)
    made = on_threads(lambda: layer(x, state))
    assert len(native) == 15
    for y, after in made:
        assert torch.equal(y, made[0][0])
        assert torch.equal(after["S"], made[0][1]["S"])


class Doubled(RWKV7):
    def mix(self, *args: Any) -> Any:
        y, state = super().mix(*args)
        return 2 * y, state


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _buffered(m: nn.Module) -> None:
    weight = m.weight.data
    del m.weight
    m.register_buffer("weight", weight)


def _with(change: Callable[[Any], Any], **options: Any) -> Callable[[], Any]:
    def make() -> Any:
        layer = _layer(**options)
        change(layer)
        return layer

    return make


OTHERS: dict[str, Callable[[], Any]] = {
    "another backend": lambda: _layer(backend="naive"),
    "subclass": lambda: Doubled(8),
    "subclass inside": _with(lambda layer: setattr(layer, "w_up", Scaled(32, 8))),
    "sequence inside": _with(lambda layer: setattr(layer, "a_down", nn.Sequential(layer.a_down, nn.ReLU()))),
    "hook": _with(lambda layer: layer.g_down.register_forward_hook(lambda _, __, y: 2 * y)),
    "hook of the norm": _with(lambda layer: layer.norm.register_forward_pre_hook(lambda *_: None)),
    "norm without a mean": _with(lambda layer: setattr(layer.norm, "center", False)),
    "norm of one weight": _with(lambda layer: setattr(layer, "norm", GatedNorm(4, center=True))),
    "forward of its own": _with(lambda layer: setattr(layer.o_proj, "forward", lambda x: 2 * x)),
    "buffer": _with(lambda layer: _buffered(layer.v_proj)),
    "ranks of their own": _with(lambda layer: setattr(layer, "w_up", nn.Sequential(nn.Linear(32, 3), nn.Linear(3, 8)))),
}


@torch.no_grad()
@pytest.mark.parametrize("name", OTHERS)
def test_whatever_is_not_just_that_layer_is_asked(name: str, native: list[str]) -> None:
    torch.manual_seed(0)
    layer = OTHERS[name]()
    x, state = torch.randn(1, 1, 8), _state(layer, 1)
    y, _ = layer(x, state)
    assert not native
    with torch.enable_grad():
        torch.testing.assert_close(y, layer(x, state)[0].detach())


@torch.no_grad()
def test_who_looks_sees_the_ops(native: list[str]) -> None:
    layer, x = _layer(), torch.randn(1, 1, 8)
    state = _state(layer, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x)[0].dtype == torch.bfloat16
    layer(x, cu_seqlens=torch.tensor([0, 1]))
    layer(x.expand(ROWS + 1, 1, 8))
    layer(x.expand(1, 2, 8))
    # the token before in another dtype is converted
    layer(x, {**state, "x": state["x"].double()})
    assert not native
    for part, error, what in (
        ({"S": state["S"][..., 1:]}, ValueError, "RWKV7: state 'S'"),
        ({"S": state["S"].view(1, 1, 8, 4)}, ValueError, "RWKV7: state 'S'"),
        ({"S": state["S"].double()}, TypeError, "dplr: "),
        ({"x": state["x"][..., 1:]}, ValueError, "RWKV7: state 'x'"),
    ):
        with pytest.raises(error, match=what):
            layer(x, {**state, **part})
    with pytest.raises(TypeError, match="but its weights are"):
        layer(x.double())
    layer.k_rate = None
    with pytest.raises(AttributeError, match="NoneType"):
        layer(x)
    assert not native


@torch.no_grad()
def test_parameters_are_those_of_the_moment(native: list[str]) -> None:
    layer, x = _layer(), torch.randn(1, 1, 8)
    layer(x)
    layer.o_proj.weight = nn.Parameter(torch.zeros(8, 8))
    assert not layer(x)[0].any()
    layer.o_proj = nn.Linear(8, 8)
    nn.init.zeros_(layer.o_proj.weight)
    assert torch.equal(layer(x)[0][0, 0], layer.o_proj.bias)
    assert layer.double()(x.double())[0].dtype == torch.float64
    assert len(native) == 4
    # what does not lie side by side is multiplied by its module
    layer.o_proj.weight.data = layer.o_proj.weight.data.mT
    assert torch.equal(layer(x.double())[0][0, 0], layer.o_proj.bias)
    assert len(native) == 4
