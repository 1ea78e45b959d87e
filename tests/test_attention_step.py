"""One token in one native call is what the op makes of it, and only where nobody wants a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from native_calls import TOLERANCES, calls_of

import mixers
from kernels import jit_cpp
from kernels.attention import attention, step
from mixers.state import leaves

pytestmark = [
    pytest.mark.skipif(jit_cpp.reason(step.SOURCE) is not None, reason="no C++ compiler"),
    pytest.mark.usefixtures("nan_filled"),
]

LAYERS: dict[str, dict[str, Any]] = {
    "attention": {"heads": 6, "kv_heads": 2, "head_dim": 7},
    "attention window": {"heads": 3, "window": 4},
    "forgetting_attention": {"heads": 4, "kv_heads": 2, "rotary": True},
    "forgetting_attention window": {"heads": 2, "kv_heads": 1, "window": 130, "output_gate": True, "qk_norm": True},
    "based": {"heads": 3, "window": 3},
}


native = calls_of(step)


def build(name: str, dim: int, **options: Any) -> Any:
    return mixers.build(name.split()[0], dim, **LAYERS[name], **options)


def length_of(state: Any) -> torch.Tensor:
    return state.get("window", state)["length"]


def compare(mixer: Any, x: torch.Tensor, state: Any) -> Any:
    """The state after a token without gradients, which with its output is what it is with them."""
    before = [leaf.clone() for leaf in leaves(state)]
    with torch.no_grad():
        y, after = mixer(x, state)
        again, other = mixer(x, state)
    assert all(map(torch.equal, before, leaves(state)))
    assert torch.equal(y, again)
    assert all(map(torch.equal, leaves(after), leaves(other)))
    expected, expected_after = mixer(x, state)
    assert expected.requires_grad
    assert torch.equal(length_of(after), length_of(expected_after))
    pairs = zip((y, *mixer.comparable(after)), (expected, *mixer.comparable(expected_after)), strict=True)
    for found, right in pairs:
        assert found.dtype == right.dtype
        assert found.shape == right.shape
        if right.numel():
            assert (found - right).abs().max() <= TOLERANCES[x.dtype] * right.abs().max()
    return after


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_token_alone(name: str, dtype: torch.dtype, native: list[str]) -> None:
    torch.manual_seed(0)
    mixer = build(name, 36).to(dtype)
    # every other number, so that nothing lies side by side; 131 rows are two chunks
    x = torch.randn(2, 134, 2 * mixer.dim).to(dtype)[..., ::2]
    for state in (mixer.init_state(2), mixer(x[:, :131])[1]):
        state = mixers.state.detach(state)
        native.clear()
        for t in range(131, 134):
            state = compare(mixer, x[:, t : t + 1], state)
        assert len(native) == 6


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "based"])
def test_sequences_that_begin_anywhere(name: str, native: list[str]) -> None:
    """As after packed prompts, which are held once until the first token."""
    torch.manual_seed(0)
    mixer = build(name, 36).double()
    x = torch.randn(3, 200, 36, dtype=torch.float64)
    with torch.no_grad():
        _, state = mixer(x[:1], cu_seqlens=torch.tensor([0, 1, 1, 200]))
        _, state = mixer(x[:, :1], state)
        assert not native
    for t in range(1, 5):
        state = compare(mixer, x[:, t : t + 1], state)
    assert len(native) == 8


@torch.no_grad()
def test_what_is_forgotten_wholly() -> None:
    q, k, v = (torch.randn(1, 1, 2, 8) for _ in range(3))
    keys, values, log_decays = torch.randn(1, 300, 2, 8), torch.randn(1, 300, 2, 8), torch.zeros(1, 300, 2)
    log_decays[:, 7, 0], log_decays[:, 299, 1] = -torch.inf, -torch.inf
    rows, cached = (k, v, torch.zeros(1, 1, 2)), (keys, values, log_decays)
    y, after = step.step(q, rows, cached, torch.tensor([300]))
    right = attention(q, *after[:2], log_decay=after[2], backend="naive")
    assert (y - right).abs().max() <= 1e-6
    # a sequence that begins behind the token sees nothing
    assert not step.step(q, rows, cached, torch.tensor([0]), torch.tensor([301]))[0].any()


@torch.no_grad()
def test_the_number_of_threads_changes_no_bit() -> None:
    q, k, v = torch.randn(1, 1, 4, 64), torch.randn(1, 1, 2, 64), torch.randn(1, 1, 2, 64)
    keys, values, length = torch.randn(1, 700, 2, 64), torch.randn(1, 700, 2, 64), torch.tensor([700])
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(step.step(q, (k, v), (keys, values), length)[0])
    torch.set_num_threads(before)
    assert torch.equal(*found)


@torch.no_grad()
def test_only_what_fits_is_read(native: list[str]) -> None:
    mixer, x = build("forgetting_attention", 24), torch.randn(2, 1, 24)
    state = mixer(x)[1]
    native.clear()
    for key in ("keys", "values", "log_decays"):
        with pytest.raises(ValueError, match=f"state '{key}'"):
            mixer(x, {**state, key: state[key][..., 1:]})
    with pytest.raises(TypeError, match=r"length is torch\.int32"):
        mixer(x, {**state, "length": state["length"].int()})
    with pytest.raises(ValueError, match="sequence 1 has its keys in rows 3 to 2"):
        mixer(x, {**state, "start": torch.tensor([0, 3])})
    mixer(x, {**state, "keys": state["keys"].double()})
    build("attention", 24, backend="naive")(x)
    mixers.build("attention", 24, heads=2, window=1)(x)
    assert not native
