"""The registry, states, stacks, and the mixers against their papers' equations and other people's code."""

from __future__ import annotations

import inspect
import json
import pickle
from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

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


WRONG: dict[str, tuple[type[Exception], str, Any]] = {
    "mixer": (ValueError, "no mixer 'hgm'; did you mean 'hgrn'", lambda: mixers.build("hgm", dim=8)),
    "option": (
        TypeError,
        "hgrn: no option 'expnd'; did you mean 'expand'",
        lambda: mixers.build("hgrn", dim=8, expnd=2),
    ),
    "value": (
        ValueError,
        "norm is 'batch', expected one of 'layer', 'rms'",
        lambda: mixers.build("hgrn", dim=8, norm="batch"),
    ),
    "dim": (ValueError, "hgrn: dim is 0", lambda: mixers.build("hgrn", dim=0)),
    "heads": (
        ValueError,
        "rglru: dim is 8, which heads = 3 does not divide",
        lambda: mixers.build("rglru", 8, heads=3),
    ),
    "bound": (ValueError, "lower_bound is 1.5", lambda: mixers.build("hgrn", 8, lower_bound=1.5)),
    "bound shape": (
        ValueError,
        r"lower_bound has shape \[3\], expected \[8\]",
        lambda: mixers.build("hgrn", 8, lower_bound=torch.zeros(3)),
    ),
    "width": (
        ValueError,
        "axis dim is 9 in x but 8 in the layer",
        lambda: mixers.build("hgrn", 8)(torch.zeros(1, 2, 9)),
    ),
    "axes": (
        ValueError,
        r"x has 2 axes \[2, 8\], expected \[B, T, 8\]",
        lambda: mixers.build("hgrn", 8)(torch.zeros(2, 8)),
    ),
    "integers": (TypeError, "x is torch.int64", lambda: mixers.build("hgrn", 8)(torch.zeros(1, 2, 8).long())),
    "batch": (
        ValueError,
        "axis batch is 3 in state but 2 in x",
        lambda: (m := mixers.build("hgrn", 8))(torch.zeros(2, 2, 8), m.init_state(3)),
    ),
    "bidirectional state": (
        ValueError,
        "a bidirectional mixer has no state",
        lambda: mixers.build("hgrn", 8, bidirectional=True)(torch.zeros(2, 2, 8), {"h": torch.zeros(2, 8, 2)}),
    ),
    "packed": (
        ValueError,
        "axis B is 2, but packed sequences",
        lambda: mixers.build("hgrn", 8)(torch.zeros(2, 2, 8), cu_seqlens=torch.tensor([0, 2])),
    ),
    "numpy": (TypeError, "x is a ndarray", lambda: mixers.build("hgrn", 8)(torch.zeros(1, 2, 8).numpy())),
    "a list": (
        TypeError,
        "cu_seqlens is a list, expected a tensor",
        lambda: mixers.build("hgrn", 8)(torch.zeros(1, 2, 8), cu_seqlens=[0, 2]),  # type: ignore[arg-type]
    ),
    "another mixer's state": (
        ValueError,
        r"GLA: state has \['h'\], but here 'S' belongs to it",
        lambda: mixers.build("gla", 8)(torch.zeros(2, 2, 8), mixers.build("hgrn", 8).init_state(2)),
    ),
    "a state with more": (
        ValueError,
        "Attention: state has 'log_decays', but here",
        lambda: mixers.build("attention", 8)(
            torch.zeros(2, 2, 8), mixers.build("forgetting_attention", 8).init_state(2)
        ),
    ),
    "a state of other sizes": (
        ValueError,
        r"GLA: state 'S' is \[2, 1, 2, 4\], expected \[batch, 1, 4, 8\]",
        lambda: mixers.build("gla", 8)(torch.zeros(2, 2, 8), mixers.build("gla", 4).init_state(2)),
    ),
    "a cache of other heads": (
        ValueError,
        r"Attention: state 'keys' is \[2, 3, 2, 4\], expected \[batch, any, 1, 8\]",
        lambda: mixers.build("attention", 8)(
            torch.zeros(2, 2, 8), mixers.build("attention", 8, heads=2)(torch.zeros(2, 3, 8))[1]
        ),
    ),
    "a state without its tensor": (
        TypeError,
        "GLA: state 'S' is a NoneType, expected a tensor",
        lambda: mixers.build("gla", 8)(torch.zeros(2, 2, 8), {"S": None}),
    ),
    "a state of one number": (
        ValueError,
        "HGRN: a tensor of the state is a single number, expected axis batch of 2",
        lambda: mixers.build("hgrn", 8)(torch.zeros(2, 2, 8), {"h": torch.tensor(0.0)}),
    ),
    "a count that was cast": (
        TypeError,
        "Attention: state 'length' is torch.bfloat16, expected an integer dtype",
        lambda: (m := mixers.build("attention", 8))(
            torch.zeros(2, 2, 8), state.apply(torch.Tensor.bfloat16, m.init_state(2))
        ),
    ),
    "a state of integers": (
        TypeError,
        "GatedConv: state 'conv' is torch.int64, expected a floating-point dtype",
        lambda: (m := mixers.build("gated_conv", 8))(
            torch.zeros(2, 2, 8), state.apply(torch.Tensor.long, m.init_state(2))
        ),
    ),
    "a state elsewhere": (
        ValueError,
        "RetNet: state 'S' is on meta, but x is on cpu",
        lambda: (m := mixers.build("retnet", 8))(torch.zeros(2, 2, 8), state.to(m.init_state(2), "meta")),
    ),
    "borders elsewhere": (
        ValueError,
        "MLSTM: cu_seqlens is on meta, but x is on cpu",
        lambda: mixers.build("mlstm", 8)(
            torch.zeros(1, 2, 8), cu_seqlens=torch.zeros(2, dtype=torch.int64, device="meta")
        ),
    ),
    "a stack's state": (
        ValueError,
        r"Stack: state has \[0\], but here 1 belongs to it",
        lambda: mixers.Stack(8, ["hgrn", "gla"])(torch.zeros(2, 2, 8), mixers.Stack(8, ["hgrn"]).init_state(2)),
    ),
    "backend": (
        ValueError,
        "hgru: no backend 'nativ'; there are auto, naive",
        lambda: mixers.build("hgrn", 8, backend="nativ"),
    ),
    "option of another type": (TypeError, "gla: heads is 2.0, expected int or None", lambda: mixers.GLA(8, heads=2.0)),
    "a word for a flag": (
        TypeError,
        "hgrn: complex is 'no', expected bool",
        lambda: mixers.build("hgrn", 8, complex="no"),
    ),
    "a flag for a number": (
        TypeError,
        "hgrn: expand is True, expected int",
        lambda: mixers.build("hgrn", 8, expand=True),
    ),
    "stack": (ValueError, "expected a list of mixers' names", lambda: mixers.Stack(8, "hgrn")),
    "a stack of layers": (
        TypeError,
        "Stack: layers has a HGRN, expected mixers' names",
        lambda: mixers.Stack(8, [mixers.build("hgrn", 8)]),  # type: ignore[list-item]
    ),
    "no channels between": (ValueError, "Stack: glu_width is 0", lambda: mixers.Stack(8, ["hgrn"], glu_width=0)),
    "stack options": (
        ValueError,
        "options for 'mingru', which is not among",
        lambda: mixers.Stack(8, ["hgrn"], options={"mingru": {}}),
    ),
    "names clash": (
        ValueError,
        "'hgrn' is already registered by mixers.hgrn.HGRN",
        lambda: registry.register(name="hgrn")(mixers.MinGRU),
    ),
    "no mixer": (TypeError, "is not a subclass of SequenceMixer", lambda: registry.register(name="linear")(nn.Linear)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name: str) -> None:
    error, message, call = WRONG[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("name", mixers.names())
def test_options_out_of_range_are_refused(name: str) -> None:
    """Numbers below what an option may be are named, in place of an error from somewhere within."""
    for option, parameter in list(inspect.signature(registry.get(name).__init__).parameters.items())[2:]:
        kinds = str(parameter.annotation)
        if kinds.startswith(("int", "float")) and option != "forget_bias":
            with pytest.raises(ValueError, match=option):
                mixers.build(name, 12, **{option: -1})


@pytest.mark.parametrize("name", mixers.names())
def test_borders_of_packed_sequences_are_checked(name: str) -> None:
    layer, x = mixers.build(name, 12), torch.randn(1, 7, 12)
    for borders in ([0, 6], [1, 7], [0, 9], [0, 5, 3, 7]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            layer(x, cu_seqlens=torch.tensor(borders))


@pytest.mark.parametrize("name", mixers.names())
def test_shapes_without_numbers(name: str) -> None:
    layer, x = mixers.build(name, 12).to("meta"), torch.empty(2, 3, 12, device="meta")
    y, after = layer(x)
    assert y.shape == x.shape
    assert layer(x, after)[0].is_meta


@pytest.mark.parametrize("name", mixers.names())
def test_memory_that_nobody_wrote_gets_initial_values(name: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(mixers.Stack(12, [name]), nn.Linear(12, 3))
    model.apply(reset)
    assert all(tensor.is_meta for tensor in model.parameters())
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(torch.nan if tensor.is_floating_point() else 1)
    model.apply(reset)
    torch.manual_seed(0)
    expected = mixers.Stack(12, [name]).state_dict()
    torch.manual_seed(0)
    model[0].reset_parameters()
    torch.testing.assert_close(model[0].state_dict(), expected, rtol=0, atol=0)
    assert model[0](torch.randn(2, 3, 12))[0].isfinite().all()


def reset(module: nn.Module) -> None:
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()


def test_tensors_of_others_are_not_reset() -> None:
    layer = mixers.build("hgrn", 12)
    layer.i_proj = nn.Sequential(layer.i_proj)
    with pytest.raises(ValueError, match=r"HGRN: cannot reset i_proj\.0\.bias, .*: not what building a HGRN"):
        layer.reset_parameters()


class Adapted(nn.Module):
    """A linear map with a low-rank change beside it, and no weight of its own."""

    def __init__(self, whole: nn.Linear) -> None:
        super().__init__()
        self.whole, self.down = whole, nn.Linear(whole.in_features, 1, bias=False)
        self.up = nn.Linear(1, whole.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x) + self.up(self.down(x))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        self.whole.weight += self.up.weight @ self.down.weight
        return self.whole


def _exchanged(module: nn.Module, kind: type[nn.Module], other: Callable[[Any], nn.Module]) -> None:
    for name, child in module.named_children():
        if type(child) is kind:
            setattr(module, name, other(child))
        else:
            _exchanged(child, kind, other)


@pytest.mark.parametrize("name", mixers.names())
def test_what_stands_in_a_projections_place_is_called(name: str) -> None:
    torch.manual_seed(0)
    layer, x = mixers.build(name, 12).double(), torch.randn(2, 5, 12).double()
    _exchanged(layer, nn.Linear, lambda linear: Adapted(linear).double())
    found, states = layer(x), layer.init_state(2)
    tokens, after = [], states
    with torch.no_grad():
        for token in x.split(1, 1):
            y, after = layer(token, after)
            tokens.append(y)
    assert state.leaves(states)[0].dtype == torch.float64
    _exchanged(layer, Adapted, Adapted.merged)
    y, last = layer(x)
    torch.testing.assert_close((found[0], torch.cat(tokens, 1)), (y, y))
    torch.testing.assert_close(layer.comparable(after), layer.comparable(last))


@pytest.mark.parametrize("name", mixers.names())
def test_layers_are_pickled(name: str) -> None:
    layer, x = mixers.build(name, 12), torch.randn(1, 3, 12)
    again = pickle.loads(pickle.dumps(layer))
    torch.testing.assert_close(again(x)[0], layer(x)[0], rtol=0, atol=0)


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


@pytest.mark.parametrize("name", mixers.names())
def test_numbers_of_a_state_may_lie_apart(name: str) -> None:
    torch.manual_seed(0)
    layer, x = mixers.build(name, 12), torch.randn(6, 6, 12)
    _, after = layer(x[:, :4])
    every_other = state.apply(lambda tensor: tensor[::2], after)
    once = state.apply(lambda tensor: tensor[:1].expand(3, *tensor.shape[1:]), after)
    with torch.no_grad():
        for length in (1, 2):
            expected = layer(x[:, 4 : 4 + length], after)[0]
            torch.testing.assert_close(layer(x[::2, 4 : 4 + length], every_other)[0], expected[::2])
            torch.testing.assert_close(layer(x[:1, 4 : 4 + length].expand(3, -1, -1), once)[0][2:], expected[:1])


@pytest.mark.parametrize("name", mixers.names())
def test_what_is_not_finite_stays_in_its_sequence(name: str) -> None:
    torch.manual_seed(0)
    layer, x, cu_seqlens = mixers.build(name, 12), torch.randn(1, 9, 12), torch.tensor([0, 3, 6, 9])
    y, after = layer(x, cu_seqlens=cu_seqlens)
    for n in range(3):
        others = torch.tensor([m for m in range(3) if m != n])
        for number in (torch.nan, torch.inf):
            spoilt = x.clone()
            spoilt[0, 3 * n + 1] = number
            found, last = layer(spoilt, cu_seqlens=cu_seqlens)
            assert found.view(3, 3, 12)[n, 1:].isnan().any()
            torch.testing.assert_close(found.view(3, 3, 12)[others], y.view(3, 3, 12)[others])
            for one, two in zip(*(layer.comparable(state.select(each, others)) for each in (last, after))):
                torch.testing.assert_close(one, two)


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
