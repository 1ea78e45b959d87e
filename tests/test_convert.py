"""Converted layers: every bit there and back, every difference listed, and the same outputs as theirs.

LAYERS holds what flash-linear-attention 0.6 and hgru-pytorch name their tensors and how they shape them. Where the
distribution flash-linear-attention is installed (fla-core has no layers), its layers themselves are asked as well.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mixers
from kernels.short_conv import short_conv
from mixers import convert
from mixers.mixer import SequenceMixer
from tests.test_gla_mixers import close, flash_linear_attention, rms, rotary, swish

DIM = 12


class Layer(NamedTuple):
    name: str
    source: str
    # how to build ours and theirs
    options: dict[str, Any]
    theirs: str
    arguments: dict[str, Any]
    tensors: str


LAYERS = {
    "hgrn": Layer(
        "hgrn",
        "fla",
        {"expand": 2, "short_conv": 3},
        "HGRNAttention",
        {"expand_ratio": 2, "use_short_conv": True, "conv_size": 3},
        "i_proj.weight 24 12; f_proj.weight 24 12; g_proj.weight 24 12; f_conv1d.weight 24 1 3; i_conv1d.weight 24 1 3;"
        "g_norm.weight 24; o_proj.weight 12 24",
    ),
    "hgrn2": Layer(
        "hgrn2",
        "fla",
        {"heads": 3},
        "HGRN2Attention",
        {"expand_ratio": 4},
        "q_proj.weight 12 12; f_proj.weight 12 12; i_proj.weight 12 12; g_norm.weight 12; o_proj.weight 12 12",
    ),
    "gla": Layer(
        "gla",
        "fla",
        {"heads": 3, "expand_v": 2, "rank": 5},
        "GatedLinearAttention",
        {"num_heads": 3, "expand_v": 2, "gate_low_rank_dim": 5},
        "q_proj.weight 6 12; k_proj.weight 6 12; v_proj.weight 24 12; g_proj.weight 24 12; gk_proj.0.weight 5 12;"
        "gk_proj.1.weight 6 5; gk_proj.1.bias 6; o_proj.weight 12 24; g_norm_swish_gate.weight 8",
    ),
    "gla without a gate": Layer(
        "gla",
        "fla",
        {"heads": 3, "gate": None},
        "GatedLinearAttention",
        {"num_heads": 3, "use_output_gate": False},
        "q_proj.weight 6 12; k_proj.weight 6 12; v_proj.weight 12 12; gk_proj.0.weight 16 12; gk_proj.1.weight 6 16;"
        "gk_proj.1.bias 6; o_proj.weight 12 12; g_norm.weight 4",
    ),
    "retnet": Layer(
        "retnet",
        "fla",
        {"heads": 3},
        "MultiScaleRetention",
        {"num_heads": 3},
        "q_proj.weight 12 12; k_proj.weight 12 12; v_proj.weight 24 12; g_proj.weight 24 12; o_proj.weight 12 24;"
        "g_norm_swish_gate.weight 8",
    ),
    "mamba2": Layer(
        "mamba2",
        "fla",
        {"heads": 6, "state_dim": 5, "groups": 2},
        "Mamba2",
        {"head_dim": 4, "state_size": 5, "n_groups": 2},
        "dt_bias 6; A_log 6; D 6; conv1d.weight 44 1 4; conv1d.bias 44; in_proj.weight 74 12; norm.weight 24;"
        "out_proj.weight 12 24",
    ),
    "deltanet": Layer(
        "deltanet",
        "fla",
        {"heads": 3, "expand_v": 2},
        "DeltaNet",
        {"num_heads": 3, "expand_v": 2},
        "q_proj.weight 12 12; k_proj.weight 12 12; v_proj.weight 24 12; b_proj.weight 3 12; q_conv1d.weight 12 1 4;"
        "k_conv1d.weight 12 1 4; v_conv1d.weight 24 1 4; o_norm.weight 8; o_proj.weight 12 24",
    ),
    "deltanet with a gate": Layer(
        "deltanet",
        "fla",
        {"heads": 3, "expand_k": 0.5, "gate": True, "conv_bias": True},
        "DeltaNet",
        {"num_heads": 3, "expand_k": 0.5, "use_gate": True, "conv_bias": True},
        "q_proj.weight 6 12; k_proj.weight 6 12; v_proj.weight 12 12; b_proj.weight 3 12; q_conv1d.weight 6 1 4;"
        "q_conv1d.bias 6; k_conv1d.weight 6 1 4; k_conv1d.bias 6; v_conv1d.weight 12 1 4; v_conv1d.bias 12;"
        "g_proj.weight 12 12; o_norm.weight 4; o_proj.weight 12 12",
    ),
    "deltanet without a convolution": Layer(
        "deltanet",
        "fla",
        {"heads": 2, "short_conv": 0},
        "DeltaNet",
        {"num_heads": 2, "use_short_conv": False},
        "q_proj.weight 12 12; k_proj.weight 12 12; v_proj.weight 12 12; b_proj.weight 2 12; o_norm.weight 6;"
        "o_proj.weight 12 12",
    ),
    "gated_deltanet": Layer(
        "gated_deltanet",
        "fla",
        {"heads": 2, "head_dim": 5, "value_heads": 4},
        "GatedDeltaNet",
        {"head_dim": 5, "num_heads": 2, "num_v_heads": 4},
        "A_log 4; dt_bias 4; q_proj.weight 10 12; k_proj.weight 10 12; v_proj.weight 40 12; a_proj.weight 4 12;"
        "b_proj.weight 4 12; q_conv1d.weight 10 1 4; k_conv1d.weight 10 1 4; v_conv1d.weight 40 1 4;"
        "g_proj.weight 40 12; o_norm.weight 10; o_proj.weight 12 40",
    ),
    "gated_deltanet without a gate": Layer(
        "gated_deltanet",
        "fla",
        {"heads": 2, "head_dim": 5, "expand_v": 1, "gate": False},
        "GatedDeltaNet",
        {"head_dim": 5, "num_heads": 2, "expand_v": 1, "use_gate": False},
        "A_log 2; dt_bias 2; q_proj.weight 10 12; k_proj.weight 10 12; v_proj.weight 10 12; a_proj.weight 2 12;"
        "b_proj.weight 2 12; q_conv1d.weight 10 1 4; k_conv1d.weight 10 1 4; v_conv1d.weight 10 1 4; o_norm.weight 5;"
        "o_proj.weight 12 10",
    ),
    "official hgrn": Layer(
        "hgrn",
        "official",
        {},
        "Hgru1d",
        {},
        "input_proj.weight 24 12; input_proj.bias 24; lambda_proj.weight 12 12; lambda_proj.bias 12; theta 1 1 12;"
        "gate.weight 24 12; gate.bias 24; out_proj.weight 12 24; out_proj.bias 12; norm.weight 24; norm.bias 24",
    ),
    "official hgrn without biases": Layer(
        "hgrn",
        "official",
        {"bias": False},
        "Hgru1d",
        {"bias": False},
        "input_proj.weight 24 12; lambda_proj.weight 12 12; theta 1 1 12; gate.weight 24 12; out_proj.weight 12 24;"
        "norm.weight 24; norm.bias 24",
    ),
    "official hgrn in both directions": Layer(
        "hgrn",
        "official",
        {"bidirectional": True},
        "BiHgru1d",
        {},
        "input_proj.weight 24 12; input_proj.bias 24; lambda_proj.weight 12 12; lambda_proj.bias 12;"
        "theta_forward 1 1 12; theta_reverse 1 1 12; gate.weight 24 12; gate.bias 24; out_proj.weight 12 24;"
        "out_proj.bias 12; norm.weight 24; norm.bias 24",
    ),
    "official real hgrn": Layer(
        "hgrn",
        "official",
        {"complex": False},
        "HgruRealV6",
        {},
        "input_proj.weight 12 12; input_proj.bias 12; lambda_proj.weight 12 12; lambda_proj.bias 12;"
        "gate.weight 12 12; gate.bias 12; out_proj.weight 12 12; out_proj.bias 12; norm.weight 12; norm.bias 12",
    ),
}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def shapes(layer: Layer) -> dict[str, list[int]]:
    words = [tensor.split() for tensor in layer.tensors.split(";")]
    return {name: [int(size) for size in sizes] for name, *sizes in words}


def theirs(layer: Layer, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A state dict of theirs, no two numbers of which are equal by design."""
    torch.manual_seed(7)
    return {name: (0.4 * torch.randn(shape)).to(dtype) for name, shape in shapes(layer).items()}


def ours(layer: Layer, dtype: torch.dtype = torch.float32, **more: Any) -> SequenceMixer:
    options = {**convert.options(layer.name, layer.source), **layer.options, **more}
    return mixers.build(layer.name, DIM, **options).to(dtype)


def bits(tensors: dict[str, Tensor]) -> dict[str, tuple[torch.dtype, list[int], bytes]]:
    """Equal only if names, dtypes, shapes and bits are: NaN equals itself, and 0 is not -0."""
    return {
        name: (t.dtype, list(t.shape), bytes(t.contiguous().flatten().view(torch.uint8).tolist()))
        for name, t in tensors.items()
    }


def refusal(mixer: SequenceMixer, state_dict: dict[str, Any], source: str = "fla", **more: Any) -> str:
    """What `load` says; the mixer must be what it was."""
    before = bits(mixer.state_dict())
    with pytest.raises(ValueError) as refused:
        convert.load(mixer, state_dict, source, **more)
    assert bits(mixer.state_dict()) == before
    return str(refused.value)


def test_every_table_has_a_layer() -> None:
    tables = {(name, source) for name, sources in convert.SOURCES.items() for source in sources}
    assert tables == {(layer.name, layer.source) for layer in LAYERS.values()}


@pytest.mark.parametrize("layer", [n for n in LAYERS.values() if n.source == "fla"], ids=lambda layer: layer.theirs)
def test_names_and_shapes_are_those_of_flash_linear_attention(layer: Layer) -> None:
    layers = pytest.importorskip("fla.layers", reason="the distribution flash-linear-attention has the layers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        real = getattr(layers, layer.theirs)(hidden_size=DIM, **layer.arguments)
    assert {name: list(tensor.shape) for name, tensor in real.state_dict().items()} == shapes(layer)
    mixer = ours(layer)
    convert.load(mixer, real.state_dict())
    before = bits(real.state_dict())
    torch.nn.init.zeros_(real.o_proj.weight if hasattr(real, "o_proj") else real.out_proj.weight)
    real.load_state_dict(convert.dump(mixer))
    assert bits(real.state_dict()) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@each_layer
def test_there_and_back_keeps_every_bit(layer: Layer, dtype: torch.dtype) -> None:
    state_dict = theirs(layer, dtype)
    for number, value in enumerate((float("nan"), -0.0, float("inf"), torch.finfo(dtype).tiny / 2)):
        list(state_dict.values())[number % len(state_dict)].view(-1)[number] = value
    mixer, twin = ours(layer, dtype), ours(layer, dtype)
    before = bits(mixer.state_dict())
    convert.load(mixer, state_dict, layer.source)
    back = convert.dump(mixer, layer.source)
    assert bits(back) == bits(state_dict)
    # nothing of ours keeps what it started with
    after = bits(mixer.state_dict())
    assert all(after[name] != before[name] for name in before)
    convert.load(twin, back, layer.source)
    assert bits(twin.state_dict()) == after


@each_layer
def test_copies_share_no_memory(layer: Layer) -> None:
    mixer, state_dict = ours(layer), theirs(layer)
    convert.load(mixer, state_dict, layer.source)
    before = bits(mixer.state_dict())
    for tensor in (*state_dict.values(), *convert.dump(mixer, layer.source).values()):
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
        tensor.zero_()
    assert bits(mixer.state_dict()) == before
    assert all(parameter.requires_grad for parameter in mixer.parameters())


@each_layer
def test_every_difference_is_listed_and_nothing_is_loaded(layer: Layer) -> None:
    state_dict: dict[str, Any] = theirs(layer)
    first, second, third, *_, last = shapes(layer).items()
    del state_dict[first[0]]
    state_dict[second[0]] = torch.zeros(*second[1], 1)
    state_dict[third[0]] = "weights"
    state_dict[last[0]] = torch.zeros(1 + last[1][0], *last[1][1:])
    state_dict["rotary.inv_freq"] = torch.zeros(4, 3)
    message = refusal(ours(layer), state_dict, layer.source)
    longer = [1 + last[1][0], *last[1][1:]]
    assert sorted(message.splitlines()[1:]) == sorted(
        [
            f"    missing {first[0]} {first[1]}",
            f"    shape of {second[0]} is {[*second[1], 1]} in the state dict but {second[1]} in the mixer",
            f"    {third[0]} is of type str, expected a tensor",
            f"    shape of {last[0]} is {longer} in the state dict but {last[1]} in the mixer",
            "    unexpected rotary.inv_freq [4, 3]",
        ]
    )
    assert message.startswith(f"convert: {layer.name}: this state dict does not fit as {layer.source!r}:")


def test_a_misspelt_name_is_recognised() -> None:
    state_dict = theirs(LAYERS["gla"])
    state_dict["g_norm_swish_gat.weight"] = state_dict.pop("g_norm_swish_gate.weight")
    message = refusal(ours(LAYERS["gla"]), state_dict)
    assert "unexpected g_norm_swish_gat.weight [8]; did you mean 'g_norm_swish_gate.weight'?" in message


def test_a_dtype_may_widen_but_not_lose_bits() -> None:
    layer = LAYERS["deltanet"]
    message = refusal(ours(layer, torch.bfloat16), theirs(layer, torch.float16))
    for name in shapes(layer):
        assert f"dtype of {name} is torch.float16 in the state dict but torch.bfloat16 in the mixer" in message
    mixer = ours(layer, torch.float32)
    convert.load(mixer, theirs(layer, torch.bfloat16))
    assert bits({k: v.bfloat16() for k, v in convert.dump(mixer).items()}) == bits(theirs(layer, torch.bfloat16))


def test_tensors_without_numbers_are_refused() -> None:
    layer = LAYERS["gla"]
    with torch.device("meta"):
        mixer = ours(layer)
    with pytest.raises(ValueError, match=r"q_proj.weight of the mixer is on the meta device"):
        convert.load(mixer, theirs(layer))
    with pytest.raises(ValueError, match=r"q_proj.weight of the mixer is on the meta device"):
        convert.dump(mixer)
    state_dict = theirs(layer)
    state_dict["k_proj.weight"] = state_dict["k_proj.weight"].to("meta")
    assert "k_proj.weight is on the meta device" in refusal(ours(layer), state_dict)


OTHERWISE: dict[tuple[str, str], dict[str, Any]] = {
    ("hgrn", "fla"): {
        "complex": True,
        "norm": "layer",
        "gate_first": True,
        "bias": True,
        "bidirectional": True,
    },
    ("hgrn", "official"): {"norm": "rms", "gate_first": True, "short_conv": 3},
    ("retnet", "fla"): {"rotary_base": 500.0},
}


def test_every_needed_option_is_tried() -> None:
    needed = {
        (name, source): set(table.options)
        for name, sources in convert.SOURCES.items()
        for source, table in sources.items()
        if table.options
    }
    assert needed == {pair: set(options) for pair, options in OTHERWISE.items()}


@pytest.mark.parametrize(
    "pair, option, value", [(pair, *item) for pair, options in OTHERWISE.items() for item in options.items()]
)
def test_a_mixer_built_otherwise_is_refused(pair: tuple[str, str], option: str, value: Any) -> None:
    name, source = pair
    layer = next(n for n in LAYERS.values() if (n.name, n.source) == pair)
    layer = layer._replace(options={} if option == "bidirectional" else layer.options)
    mixer = ours(layer, **{option: value})
    wanted = convert.options(name, source)[option]
    expected = f"option {option} is {value!r} in the mixer but {wanted!r} in {source}"
    assert expected in refusal(mixer, theirs(layer), source)
    with pytest.raises(ValueError) as refused:
        convert.dump(mixer, source)
    assert expected in str(refused.value)


def test_what_theirs_has_by_default_is_named() -> None:
    message = refusal(ours(LAYERS["retnet"], weight=False), theirs(LAYERS["retnet"]))
    assert "unexpected g_norm_swish_gate.weight [8]" in message
    assert "option weight is False, and by default True in fla" in message
    # with elementwise_affine=False theirs has no weight either
    state_dict = {key: t for key, t in theirs(LAYERS["retnet"]).items() if key != "g_norm_swish_gate.weight"}
    mixer = ours(LAYERS["retnet"], weight=False)
    convert.load(mixer, state_dict)
    assert bits(convert.dump(mixer)) == bits(state_dict)


@pytest.mark.parametrize("name", ["gla", "retnet"])
def test_layers_that_do_not_fuse_their_norm(name: str) -> None:
    fused = theirs(LAYERS[name])
    mixer, twin = ours(LAYERS[name]), ours(LAYERS[name])
    convert.load(mixer, fused)
    apart = {key.replace("g_norm_swish_gate", "g_norm"): tensor for key, tensor in fused.items()}
    convert.load(twin, apart)
    assert bits(twin.state_dict()) == bits(mixer.state_dict())
    assert "unexpected g_norm.weight" in refusal(mixer, {**fused, **apart})


@pytest.mark.parametrize("name", ["hgrn", "hgrn2", "official hgrn"])
def test_lower_bounds_stay_ours(name: str) -> None:
    layer = LAYERS[name]
    width = DIM * layer.options.get("expand", 1)
    bound = torch.linspace(0, 0.9, width)
    mixer: Any = ours(layer, lower_bound=torch.nn.Parameter(bound.clone()))
    convert.load(mixer, theirs(layer), layer.source)
    assert torch.equal(mixer.fixed_bound, bound)
    assert bits(convert.dump(mixer, layer.source)) == bits(theirs(layer))


def test_a_layer_within_a_model() -> None:
    layer = LAYERS["deltanet"]
    model = {f"model.layers.1.attn.{key}": tensor for key, tensor in theirs(layer).items()}
    model |= {"model.layers.1.mlp.weight": torch.ones(2), "model.layers.10.attn.q_proj.weight": torch.ones(3)}
    mixer = ours(layer)
    convert.load(mixer, model, prefix="model.layers.1.attn.")
    assert bits(convert.dump(mixer)) == bits(theirs(layer))
    assert convert.dump(mixer, prefix="a.").keys() == {f"a.{key}" for key in theirs(layer)}
    del model["model.layers.1.attn.k_proj.weight"]
    message = refusal(mixer, model, prefix="model.layers.1.attn.")
    assert message.splitlines()[1:] == ["    missing model.layers.1.attn.k_proj.weight [12, 12]"]


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"no table for 'attention'; there are tables for deltanet, "):
        convert.load(mixers.build("attention", DIM), {})
    with pytest.raises(ValueError, match=r"hgrn has no source 'offical'; did you mean 'official'\?"):
        convert.dump(mixers.build("hgrn", DIM), "offical")
    with pytest.raises(ValueError, match=r"no mixer 'hgm'; did you mean 'hgrn'"):
        convert.options("hgm")


def test_converting_imports_no_other_library() -> None:
    program = (
        "import sys, mixers; m = mixers.build('hgrn', 4, **mixers.convert.options('hgrn'))\n"
        "mixers.convert.load(m, mixers.convert.dump(m)); assert not {'fla', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# Outputs: their layers written out over their own state dicts, around their own loops.

Weights = dict[str, Tensor]


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op by its loop, short convolutions included: other tests compare backends, and compiling one is slow."""
    # a backend that nobody asked for is built, too, when it is asked what it cannot do
    monkeypatch.setattr("kernels.jit_cpp.reason", lambda source: "not built in this test")
    naive = functools.partial(short_conv, backend="naive")
    for module in ("kernels.short_conv", "mixers.deltanet", "mixers.mamba2"):
        monkeypatch.setattr(f"{module}.short_conv", naive)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def convolved(w: Weights, name: str, x: Tensor) -> Tensor:
    """Projection and causal depthwise convolution, as torch's Conv1d has it."""
    weight = w[f"{name}_conv1d.weight"]
    rows = F.pad(linear(w, f"{name}_proj", x).mT, (weight.shape[-1] - 1, 0))
    return F.conv1d(rows, weight, w.get(f"{name}_conv1d.bias"), groups=weight.shape[0]).mT


def heads(x: Tensor, number: int) -> Tensor:
    return x.unflatten(-1, (number, -1))


def gated(w: Weights, o: Tensor, x: Tensor) -> Tensor:
    """Norm of each head, gate, output projection; o [B, T, H, V]."""
    weight = w.get("g_norm_swish_gate.weight", w.get("o_norm.weight"))
    o = rms(o, weight).flatten(2)
    return linear(w, "o_proj", o * swish(linear(w, "g_proj", x)) if "g_proj.weight" in w else o)


def hgrn(w: Weights, x: Tensor, bound: Tensor) -> Tensor:
    naive = flash_linear_attention("ops/hgrn/naive.py").naive_recurrent_hgrn
    f = F.logsigmoid(convolved(w, "f", x))
    f = torch.logaddexp(bound.log(), torch.log1p(-bound) + f)
    o, _ = naive(swish(convolved(w, "i", x)) * (1 - f.exp()), f)
    return linear(w, "o_proj", rms(o, w["g_norm.weight"]) * swish(linear(w, "g_proj", x)))


def hgrn2(w: Weights, x: Tensor, bound: Tensor) -> Tensor:
    naive = flash_linear_attention("ops/gla/naive.py").naive_recurrent_gla
    q, f, v = (linear(w, f"{name}_proj", x) for name in "qfi")
    f = torch.logaddexp(bound.log(), torch.log1p(-bound) + F.logsigmoid(f))
    o, _ = naive(*(heads(t, 3) for t in (swish(q), 1 - f.exp(), v, f)))
    return linear(w, "o_proj", rms(o.flatten(2), w["g_norm.weight"]))


def gla(w: Weights, x: Tensor, _: Tensor) -> Tensor:
    naive = flash_linear_attention("ops/gla/naive.py").naive_recurrent_gla
    q, k, v = (heads(linear(w, f"{name}_proj", x), 3) for name in "qkv")
    decay = linear(w, "gk_proj.1", linear(w, "gk_proj.0", x))
    return gated(w, naive(q, k, v, heads(F.logsigmoid(decay) / 16, 3))[0], x)


def retnet(w: Weights, x: Tensor, _: Tensor) -> Tensor:
    naive = flash_linear_attention("ops/retention/naive.py").naive_retention
    q, k, v = (heads(linear(w, f"{name}_proj", x), 3) for name in "qkv")
    return gated(w, naive(*(t.transpose(1, 2) for t in (rotary(q), rotary(k), v))).transpose(1, 2), x)


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def deltanet(w: Weights, x: Tensor, _: Tensor) -> Tensor:
    naive = flash_linear_attention("ops/delta_rule/naive.py").delta_rule_recurrence
    q, k, v = (heads(swish(convolved(w, name, x)), 3) for name in "qkv")
    rows = unit(q), unit(k), v, linear(w, "b_proj", x).sigmoid()
    return gated(w, naive(*(t.transpose(1, 2) for t in rows))[0].transpose(1, 2), x)


def gated_deltanet(w: Weights, x: Tensor, _: Tensor) -> Tensor:
    naive = flash_linear_attention("ops/gated_delta_rule/naive.py").naive_recurrent_gated_delta_rule
    q, k, v = (swish(convolved(w, name, x)) for name in "qkv")
    # two value heads for each key head
    q, k = (unit(heads(t, 2)).repeat_interleave(2, 2) for t in (q, k))
    log_decay = -w["A_log"].exp() * F.softplus(linear(w, "a_proj", x) + w["dt_bias"])
    return gated(w, naive(q, k, heads(v, 4), linear(w, "b_proj", x).sigmoid(), log_decay)[0], x)


def official(w: Weights, x: Tensor, bound: Tensor) -> Tensor:
    """Hgru1d and BiHgru1d: h_t = λ_t e^{iθ} h_{t−1} + (1 − λ_t) c_t, one token after another."""
    c, gate = swish(linear(w, "input_proj", x)), swish(linear(w, "gate", x))
    decay = bound + (1 - bound) * linear(w, "lambda_proj", x).sigmoid()
    c = (1 - decay) * torch.complex(c[..., 0::2].contiguous(), c[..., 1::2].contiguous())

    def scan(theta: Tensor, times: range) -> Tensor:
        turn, h, rows = torch.exp(1j * theta.flatten()), torch.zeros_like(c[:, 0]), torch.zeros_like(c)
        for t in times:
            h = decay[:, t] * turn * h + c[:, t]
            rows[:, t] = h
        return rows

    forward = range(x.shape[1])
    if "theta" in w:
        h = scan(w["theta"], forward)
    else:
        h = scan(w["theta_forward"], forward) + scan(w["theta_reverse"], forward[::-1])
    h = torch.cat([h.real, h.imag], -1)
    return linear(w, "out_proj", F.layer_norm(h, h.shape[-1:], w["norm.weight"], w["norm.bias"]) * gate)


FORWARD: dict[str, Callable[[Weights, Tensor, Tensor], Tensor]] = {
    "hgrn": hgrn,
    "hgrn2": hgrn2,
    "gla": gla,
    "retnet": retnet,
    "deltanet": deltanet,
    "deltanet with a gate": deltanet,
    "gated_deltanet": gated_deltanet,
    "official hgrn": official,
    "official hgrn without biases": official,
    "official hgrn in both directions": official,
}


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.usefixtures("loops")
@torch.no_grad()
def test_outputs_are_theirs(name: str) -> None:
    layer = LAYERS[name]
    weights = theirs(layer, torch.float64)
    bound = torch.linspace(0, 0.9, DIM * layer.options.get("expand", 1), dtype=torch.float64)
    mixer = ours(layer, torch.float64, backend="naive", **({"lower_bound": bound} if "hgrn" in name else {}))
    convert.load(mixer, weights, layer.source)
    x = torch.randn(2, 11, DIM, dtype=torch.float64)
    close(mixer(x)[0], FORWARD[name](weights, x, bound))


@pytest.mark.usefixtures("loops")
@torch.no_grad()
def test_mamba2_of_transformers_has_the_same_names_and_outputs() -> None:
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        hidden_size=DIM, num_heads=6, head_dim=4, state_size=5, n_groups=2, chunk_size=4, num_hidden_layers=1
    )
    layer = modeling.Mamba2Mixer(config, 0).eval()
    layer.load_state_dict(theirs(LAYERS["mamba2"]))
    mixer = ours(LAYERS["mamba2"], backend="naive")
    convert.load(mixer, layer.state_dict())
    x = torch.randn(2, 11, DIM)
    y = layer(x)
    close(mixer(x)[0], y)
    for parameter in layer.parameters():
        parameter.zero_()
    layer.load_state_dict(convert.dump(mixer))
    assert torch.equal(layer(x), y)
