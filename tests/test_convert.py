"""Converted layers: every bit there and back, and every difference listed.

Where the distribution flash-linear-attention is installed (fla-core has no layers), its layers themselves are asked as
well as the table of them.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch

import mixers
from mixers import convert
from mixers.mixer import SequenceMixer
from tests.convert_layers import DIM, LAYERS, Layer, bits, each_layer, ours, shapes, theirs


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
