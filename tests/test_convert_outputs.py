"""Converted layers give the outputs of theirs: written out here over their state dicts, around loops of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.short_conv import short_conv
from mixers import convert
from tests.convert_layers import DIM, LAYERS, ours, theirs
from tests.test_gla_mixers import close, flash_linear_attention, rms, rotary, swish

Weights = dict[str, Tensor]


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every op by its loop, short convolutions included: other tests compare backends, and compiling one is slow."""
    # a backend that nobody asked for is built, too, when it is asked what it cannot do
    monkeypatch.setattr("kernels.jit_cpp.reason", lambda source: "not built in this test")
    naive = functools.partial(short_conv, backend="naive")
    for module in ("kernels.short_conv", "mixers.delta", "mixers.mamba2"):
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
