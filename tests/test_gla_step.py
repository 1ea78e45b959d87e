"""One token in one native call is what the layer's ops make of it, and only where nobody wants a gradient."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from native_calls import TOLERANCES, calls_of, check_close

import mixers
from kernels import jit_cpp
from kernels.gla import step
from mixers.state import leaves

pytestmark = pytest.mark.skipif(jit_cpp.reason(step.SOURCE) is not None, reason="no C++ compiler")

LAYERS: dict[str, dict[str, Any]] = {
    "based": {"heads": 3, "feature_dim": 5, "window": None},
    "linear_attention": {"heads": 3},
    "mlstm": {"heads": 3, "gate_cap": None},
    "gsa": {"heads": 3, "slots": 5},
    "rwkv6": {"heads": 3, "rank": 5, "decay_rank": 7, "depth": 0.5},
    "retnet": {"heads": 3, "expand_v": 1.0},
    "mamba2": {"heads": 6, "groups": 3, "state_dim": 5},
}


native = calls_of(step)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_token_alone(name: str, dtype: torch.dtype, native: list[str]) -> None:
    torch.manual_seed(0)
    mixer = mixers.build(name, 30, **LAYERS[name]).to(dtype)
    # every other number, so that nothing lies side by side
    x = torch.randn(2, 5, 2 * mixer.dim).to(dtype)[..., ::2]
    with torch.no_grad():
        _, state = mixer(x[:, :4])
        assert not native
        before = [leaf.clone() for leaf in leaves(state)]
        y, after = mixer(x[:, 4:], state)
    assert len(native) == 1
    assert all(map(torch.equal, before, leaves(state)))
    expected, expected_after = mixer(x[:, 4:], state)
    assert len(native) == 1
    assert expected.requires_grad
    for found, right in zip((y, *leaves(after)), (expected, *leaves(expected_after)), strict=True):
        check_close(found, right, dtype)


@torch.no_grad()
def test_another_backend_is_asked(native: list[str]) -> None:
    for name, options in LAYERS.items():
        mixer = mixers.build(name, 24, **options, backend="naive")
        mixer(torch.randn(1, 1, 24))
    assert not native


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_no_state_of_another_shape_or_dtype_is_read(name: str, native: list[str]) -> None:
    mixer, x = mixers.build(name, 24, **LAYERS[name]), torch.randn(2, 1, 24)
    state = mixer(x)[1]
    wide = [key for key in state if state[key].ndim > 1]
    native.clear()
    for key in wide:
        with pytest.raises(ValueError, match=f"state '{key}'"):
            mixer(x, {**state, key: state[key][..., 1:]})
    # gsa's ops take keys of any dtype
    with nullcontext() if name == "gsa" else pytest.raises(TypeError, match="float64"):
        mixer(x, {**state, wide[0]: state[wide[0]].double()})
    assert "gla_shift_step" in native or not native
