"""The registry, states, stacks, and the mixers against their papers' equations and other people's code."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mixers
from mixers import parts, registry, state
from mixers.mixer import SequenceMixer


def test_build_from_config_gives_the_same_layer() -> None:
    layer = mixers.build("hgrn", 8, complex=False, norm="rms", short_conv=3)
    config = json.loads(json.dumps(layer.config()))
    again = mixers.build(**config)
    assert again.config() == layer.config()
    again.load_state_dict(layer.state_dict())
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(again(x)[0], layer(x)[0], rtol=0, atol=0)


def test_integers_of_numpy_are_integers() -> None:
    layer = mixers.build("hgrn", np.int64(8), short_conv=np.int32(3))
    assert json.loads(json.dumps(layer.config())) == layer.config()
    assert layer(torch.randn(1, 2, 8))[0].shape == (1, 2, 8)
    for dim in (True, 8.0, np.float64(8), np.int64(0)):
        with pytest.raises(ValueError, match="expected an integer of at least 1"):
            mixers.build("hgrn", dim)


@pytest.mark.parametrize("name", mixers.names())
def test_shapes_without_numbers(name: str) -> None:
    layer, x = mixers.build(name, 12).to("meta"), torch.empty(2, 3, 12, device="meta")
    y, after = layer(x)
    assert y.shape == x.shape
    assert layer(x, after)[0].is_meta


class Plugin(SequenceMixer):
    """y = x."""

    def __init__(self, dim: int, *, gain: float = 1.0) -> None:
        super().__init__()
        self.dim, self.gain = dim, gain

    def init_state(self, batch: int, *, device: Any = None, dtype: Any = None) -> tuple[Tensor, ...]:
        return (torch.zeros(batch, 0, device=device),)

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        return self.gain * x, state


def test_a_plugin_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name="echo", value=f"{__name__}:Plugin", group="mixers")
    monkeypatch.setattr(EntryPoint, "load", lambda self: Plugin)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    assert "echo" in mixers.names()
    layer = mixers.build("echo", 4, gain=3.0)
    assert layer.config() == {"name": "echo", "dim": 4, "gain": 3.0}
    assert mixers.Stack(4, ["echo", "hgrn"])(torch.ones(1, 2, 4))[0].shape == (1, 2, 4)


@pytest.mark.parametrize("name", mixers.names())
def test_states_are_trees_that_can_be_cloned_selected_detached_and_moved(name: str) -> None:
    layer = mixers.build(name, 12)
    x = torch.randn(3, 6, 12)
    _, after = layer(x[:, :4])
    snapshot = state.clone(after)
    expected = layer(x[:, 4:], after)[0]
    torch.testing.assert_close(layer(x[:, 4:], snapshot)[0], expected, rtol=0, atol=0)
    beams = torch.tensor([2, 2, 0, 1])
    selected = layer(x[beams, 4:], state.select(after, beams))[0]
    torch.testing.assert_close(selected, expected[beams])
    assert not any(leaf.requires_grad for leaf in state.leaves(state.detach(after)))
    assert all(leaf.is_meta for leaf in state.leaves(state.to(after, "meta")))


def test_a_state_made_of_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match="a list is no part of a state"):
        state.clone([torch.zeros(1)])  # type: ignore[arg-type]


def test_hgrn_is_the_papers_equation() -> None:
    """Written out for one sequence with Python's complex numbers."""
    torch.manual_seed(0)
    layer = mixers.build("hgrn", 4, lower_bound=0.25).double()
    x = torch.randn(1, 7, 4, dtype=torch.float64)
    h, rows = torch.zeros(4, dtype=torch.complex128), []
    for t in range(7):
        c = nn.functional.silu(layer.i_proj(x[0, t]))
        c = torch.complex(c[0::2], c[1::2])
        decay = 0.25 + 0.75 * torch.sigmoid(layer.f_proj(x[0, t]))
        h = torch.polar(decay, layer.theta[0]) * h + (1 - decay) * c
        g = nn.functional.silu(layer.g_proj(x[0, t]))
        z = nn.functional.layer_norm(torch.cat([h.real, h.imag]), (8,), layer.norm.weight, layer.norm.bias)
        rows.append(layer.o_proj(z * g))
    torch.testing.assert_close(layer(x)[0][0], torch.stack(rows))


def test_theta_starts_like_rotary_frequencies() -> None:
    torch.testing.assert_close(
        mixers.build("hgrn", 4).theta[0], torch.tensor([1.0, 1e-2, 1e-4, 1e-6]), rtol=1e-4, atol=0
    )


def test_bidirectional_counts_a_tokens_own_input_twice() -> None:
    layer = mixers.build("hgrn", 4, complex=False, bidirectional=True, bias=False)
    x = torch.randn(1, 1, 4)
    single = mixers.build("hgrn", 4, complex=False, bias=False)
    single.load_state_dict(layer.state_dict())
    # one token: h = 2 (1 - λ) c, and the norm does not see the factor, up to its epsilon
    torch.testing.assert_close(layer(x)[0], single(x)[0], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("convention", ["inclusive", "exclusive"])
def test_lower_bounds(convention: str) -> None:
    bounds = parts.LowerBounds(4, 3, convention=convention)
    torch.testing.assert_close(bounds()[:, 0], torch.arange(4) / 4)
    with torch.no_grad():
        bounds.weight.normal_()
    shares = bounds.weight.softmax(0)
    expected = {"inclusive": shares[1] + shares[2], "exclusive": shares[0] + shares[1]}[convention]
    torch.testing.assert_close(bounds()[2], expected)
    assert bounds()[0].abs().max() == 0
    assert bounds()[-1].max() < 1


def test_a_stack_shares_one_set_of_bounds_and_trains_it() -> None:
    stack = mixers.Stack(6, ["hgrn", "rglru", "hgrn"])
    assert [name for name, _ in stack.named_parameters() if "bound" in name] == ["bounds.weight"]
    assert stack.bounds is not None
    torch.testing.assert_close(stack.blocks[2].mixer.lower_bound(), torch.full((6,), 0.5))
    stack(torch.randn(1, 5, 6))[0].square().sum().backward()
    assert stack.bounds.weight.grad is not None
    assert stack.bounds.weight.grad.any()


def test_gates_do_not_cancel_in_bfloat16() -> None:
    """The top layer of 24 in bfloat16: 1 − λ from the projection's bfloat16 output, against float64."""
    torch.manual_seed(0)
    layer = mixers.build("hgrn", 64, complex=False, lower_bound=23 / 24, bias=False).bfloat16()
    f, i = (2 * torch.randn(1, 100, 64)).bfloat16(), torch.ones(1, 100, 64, dtype=torch.bfloat16)
    # from a state of zeros, sequences of one token
    c = layer.recur(i.transpose(0, 1), f.transpose(0, 1), None, 0, None)[0].transpose(0, 1)
    exact = (1 - 23 / 24) * torch.sigmoid(-f.double()) * nn.functional.silu(i.double())
    error = ((c.double() - exact).square().mean() / exact.square().mean()).sqrt()
    decay = (23 / 24 + (1 - 23 / 24) * torch.sigmoid(f.double())).bfloat16()
    cancelled = (1 - decay).double() * nn.functional.silu(i.double())
    naive_error = ((cancelled - exact).square().mean() / exact.square().mean()).sqrt()
    assert error < 2**-8
    assert naive_error > 10 * error


def test_real_hgrn_agrees_with_flash_linear_attention() -> None:
    """Their equations of the layer (no biases, RMSNorm) around their loop, with our weights."""
    naive = pytest.importorskip("fla.ops.hgrn.naive")
    torch.manual_seed(0)
    layer = mixers.build("hgrn", 8, complex=False, norm="rms", bias=False, lower_bound=0.3)
    x = torch.randn(2, 21, 8)
    f = 0.3 + 0.7 * torch.sigmoid(layer.f_proj(x))
    i = nn.functional.silu(layer.i_proj(x)) * (1 - f)
    h, _ = naive.naive_recurrent_hgrn(i, f.log())
    z = nn.functional.rms_norm(h, (8,), layer.norm.weight, 1e-5)
    y = layer.o_proj(z * nn.functional.silu(layer.g_proj(x)))
    torch.testing.assert_close(layer(x)[0], y, rtol=1e-4, atol=1e-5)


def test_rglru_agrees_with_transformers() -> None:
    gemma = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
    config = pytest.importorskip("transformers").RecurrentGemmaConfig(
        lru_width=12, num_attention_heads=3, hidden_size=12
    )
    theirs = gemma.RecurrentGemmaRglru(config)
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = mixers.build("rglru", 12, heads=3)
    with torch.no_grad():
        ours.decay.copy_(theirs.recurrent_param)
        ours.i_weight.copy_(theirs.input_gate_weight)
        ours.r_weight.copy_(theirs.recurrent_gate_weight)
        ours.i_bias.copy_(theirs.input_gate_bias.flatten())
        ours.r_bias.copy_(theirs.recurrent_gate_bias.flatten())
    x = torch.randn(2, 9, 12)
    # theirs does not scale a sequence's first input (positions == 0); ours treats all alike, so start them at 1
    expected = theirs(x, torch.arange(1, 10).expand(2, -1))
    torch.testing.assert_close(ours(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_mingru_is_the_papers_equation() -> None:
    torch.manual_seed(0)
    layer = mixers.build("mingru", 5)
    x = torch.randn(1, 6, 5)
    h, rows = torch.zeros(5), []
    for t in range(6):
        z, c = torch.sigmoid(layer.z_proj(x[0, t])), layer.h_proj(x[0, t])
        h = (1 - z) * h + z * torch.where(c >= 0, c + 0.5, torch.sigmoid(c))
        rows.append(layer.o_proj(h))
    torch.testing.assert_close(layer(x)[0][0], torch.stack(rows))
