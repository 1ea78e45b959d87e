"""Mixers on the delta rules, against other people's layers and loops with our weights, in one call and in two.

DeltaNet has no other implementation that runs without a GPU: there it is flash-linear-attention's loop between the
projections that its paper has. RWKV-7 likewise, with their plain functions for the mixes and the output.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixers
from mixers import checks
from mixers.mixer import SequenceMixer

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def require_same(layer: SequenceMixer, x: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(layer(x)[0], expected, **CLOSE)
    for cut in (1, x.shape[1] // 2):
        first, state = layer(x[:, :cut])
        in_two_calls = torch.cat([first, layer(x[:, cut:], state)[0]], 1)
        torch.testing.assert_close(in_two_calls, expected, **CLOSE)


def require_same_decoding(layer: SequenceMixer, x: Tensor, theirs: nn.Module, cache: Any) -> None:
    """Four tokens at once, then one more, from their cache and from our state."""
    theirs(x[:, :4], cache_params=cache)
    expected = theirs(x[:, 4:5], cache_params=cache)
    torch.testing.assert_close(layer(x[:, 4:5], layer(x[:, :4])[1])[0], expected, **CLOSE)


def plain_torch(monkeypatch: pytest.MonkeyPatch, modeling: Any, *functions: str) -> None:
    """transformers without the GPU kernels that it takes from flash-linear-attention wherever that is installed."""
    for name in functions:
        monkeypatch.setattr(modeling, name, inspect.unwrap(getattr(modeling, name)))


def randomise(module: nn.Module) -> None:
    """So that no parameter is at a value where it does not matter."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)


def copy(ours: dict[Tensor, Tensor]) -> None:
    with torch.no_grad():
        for mine, other in ours.items():
            mine.copy_(other.view_as(mine))


def convolved(layer: Any, x: Tensor) -> list[Tensor]:
    """q, k, v of FLA's layers: torch's convolution over a padded sequence, SiLU, and the norm that their loops lack."""
    qkv = layer.qkv
    width = qkv.short_conv
    rows = nn.functional.pad(qkv.proj(x).transpose(1, 2), (width - 1, 0))
    rows = nn.functional.conv1d(rows, qkv.conv_weight[:, None], qkv.conv_bias, groups=rows.shape[1])
    q, k, v = nn.functional.silu(rows.transpose(1, 2)).split(qkv.widths, -1)
    q, k = (r.unflatten(-1, (qkv.heads, -1)) for r in (q, k))
    q, k = (r / (r.square().sum(-1, keepdim=True) + 1e-6).sqrt() for r in (q, k))
    return [q, k, v.unflatten(-1, (qkv.value_heads, -1))]


@pytest.mark.parametrize("options", [{}, {"gate": True, "conv_bias": True, "negative_eigenvalues": True}])
def test_deltanet_agrees_with_flash_linear_attention(options: dict[str, Any]) -> None:
    naive = pytest.importorskip("fla.ops.delta_rule.naive")
    torch.manual_seed(0)
    layer = mixers.build("deltanet", 6, heads=2, expand_v=2, **options)
    randomise(layer)
    x = torch.randn(2, 9, 6)
    q, k, v = convolved(layer, x)
    beta = torch.sigmoid(layer.beta_proj(x)) * (2 if options else 1)
    o, _ = naive.delta_rule_recurrence(*(rows.transpose(1, 2) for rows in (q, k, v, beta)))
    o = o.transpose(1, 2)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * layer.norm.weight
    o = o.flatten(-2)
    if options:
        o = o * nn.functional.silu(layer.g_proj(x))
    require_same(layer, x, layer.o_proj(o))


def test_deltanet_without_a_convolution_is_silu_and_the_rule() -> None:
    torch.manual_seed(0)
    layer = mixers.build("deltanet", 4, heads=1, short_conv=0).double()
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    S, rows = torch.zeros(4, 4, dtype=torch.float64), []
    for t in range(6):
        q, k, v = nn.functional.silu(layer.qkv.proj(x[0, t])).chunk(3)
        q, k = q / (q @ q + 1e-6).sqrt(), k / (k @ k + 1e-6).sqrt()
        beta = torch.sigmoid(layer.beta_proj(x[0, t]))
        S = S - beta * torch.outer(k, k @ S) + beta * torch.outer(k, v)
        o = q @ S / 2
        rows.append(layer.o_proj(o / (o.square().mean() + 1e-5).sqrt()))
    require_same(layer, x, torch.stack(rows)[None])


@pytest.mark.parametrize("value_heads", [2, 4])
def test_gated_deltanet_agrees_with_qwen3_next(value_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their projections are interleaved by key head: q, k, v, z of the first, then of the next."""
    qwen = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    plain_torch(monkeypatch, qwen, "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3NextConfig(
        hidden_size=10,
        linear_num_key_heads=2,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=3,
        linear_value_head_dim=5,
        rms_norm_eps=1e-5,
        num_hidden_layers=1,
        layer_types=["linear_attention"],
    )
    torch.manual_seed(0)
    theirs = qwen.Qwen3NextGatedDeltaNet(config, 0)
    randomise(theirs)
    ours = mixers.build("gated_deltanet", 10, heads=2, head_dim=3, expand_v=5 / 3, value_heads=value_heads)
    parts = [3, 3, 5 * value_heads // 2, 5 * value_heads // 2]
    q, k, v, z = theirs.in_proj_qkvz.weight.unflatten(0, (2, -1)).split(parts, 1)
    beta, decay = theirs.in_proj_ba.weight.unflatten(0, (2, -1)).chunk(2, 1)
    copy(
        {
            ours.qkv.proj.weight: torch.cat([part.flatten(0, 1) for part in (q, k, v)]),
            ours.qkv.conv_weight: theirs.conv1d.weight,
            ours.g_proj.weight: z.flatten(0, 1),
            ours.beta_proj.weight: beta.flatten(0, 1),
            ours.decay_proj.weight: decay.flatten(0, 1),
            ours.A_log: theirs.A_log,
            ours.dt_bias: theirs.dt_bias,
            ours.norm.weight: theirs.norm.weight,
            ours.o_proj.weight: theirs.out_proj.weight,
        }
    )
    x = torch.randn(2, 9, 10)
    require_same(ours, x, theirs(x))
    require_same_decoding(ours, x, theirs, transformers.DynamicCache(config=config))


def test_gated_deltanet_with_negative_eigenvalues_agrees_with_olmo_hybrid(monkeypatch: pytest.MonkeyPatch) -> None:
    olmo = pytest.importorskip("transformers.models.olmo_hybrid.modeling_olmo_hybrid")
    plain_torch(monkeypatch, olmo, "torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    transformers = pytest.importorskip("transformers")
    config = transformers.OlmoHybridConfig(
        hidden_size=10,
        num_attention_heads=2,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=3,
        linear_value_head_dim=6,
        linear_allow_neg_eigval=True,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )
    torch.manual_seed(0)
    theirs = olmo.OlmoHybridGatedDeltaNet(config, 0)
    randomise(theirs)
    ours = mixers.build("gated_deltanet", 10, heads=2, head_dim=3, negative_eigenvalues=True)
    copy(
        {
            ours.qkv.proj.weight: torch.cat([p.weight for p in (theirs.q_proj, theirs.k_proj, theirs.v_proj)]),
            ours.qkv.conv_weight: theirs.conv1d.weight,
            ours.g_proj.weight: theirs.g_proj.weight,
            ours.beta_proj.weight: theirs.b_proj.weight,
            ours.decay_proj.weight: theirs.a_proj.weight,
            ours.A_log: theirs.A_log,
            ours.dt_bias: theirs.dt_bias,
            ours.norm.weight: theirs.o_norm.weight,
            ours.o_proj.weight: theirs.o_proj.weight,
        }
    )
    x = torch.randn(2, 9, 10)
    require_same(ours, x, theirs(x))
    require_same_decoding(ours, x, theirs, transformers.DynamicCache(config=config))


def test_gated_deltanet_has_the_published_sizes_at_dim_2048() -> None:
    with torch.device("meta"):
        layer = mixers.build("gated_deltanet", 2048)
    assert (layer.heads, layer.key_width, layer.value_width) == (6, 256, 512)
    assert abs(sum(p.numel() for p in layer.parameters()) / 2048**2 - 6) < 0.02


def test_kda_agrees_with_kimi_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    kimi = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    plain_torch(monkeypatch, kimi, "chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
    transformers = pytest.importorskip("transformers")
    config = transformers.KimiLinearConfig(
        hidden_size=10,
        num_hidden_layers=1,
        linear_attn_config={"head_dim": 3, "num_heads": 2, "short_conv_kernel_size": 4},
        layer_types=["linear_attention"],
    )
    torch.manual_seed(0)
    theirs = kimi.KimiLinearDeltaAttention(config, 0)
    randomise(theirs)
    ours = mixers.build("kda", 10, heads=2, head_dim=3)
    copy(
        {
            ours.qkv.proj.weight: torch.cat([p.weight for p in (theirs.q_proj, theirs.k_proj, theirs.v_proj)]),
            ours.qkv.conv_weight: theirs.conv1d.weight,
            ours.beta_proj.weight: theirs.b_proj.weight,
            ours.decay_proj[0].weight: theirs.forget_gate.f_a_proj.weight,
            ours.decay_proj[1].weight: theirs.forget_gate.f_b_proj.weight,
            ours.A_log: theirs.forget_gate.A_log,
            ours.dt_bias: theirs.forget_gate.dt_bias,
            ours.g_proj[0].weight: theirs.g_a_proj.weight,
            ours.g_proj[1].weight: theirs.g_b_proj.weight,
            ours.norm.weight: theirs.o_norm.weight,
            ours.o_proj.weight: theirs.o_proj.weight,
        }
    )
    x = torch.randn(2, 9, 10)
    require_same(ours, x, theirs(x))
    require_same_decoding(ours, x, theirs, transformers.DynamicCache(config=config))


def test_kda_agrees_with_flash_linear_attention() -> None:
    """K ≠ V and a bias in the gate, which Kimi Linear's layer does not have."""
    naive = pytest.importorskip("fla.ops.kda.naive")
    gates = pytest.importorskip("fla.ops.kda.gate")
    torch.manual_seed(0)
    layer = mixers.build("kda", 6, heads=2, expand_v=2, gate_bias=True)
    randomise(layer)
    x = torch.randn(2, 9, 6)
    q, k, v = convolved(layer, x)
    decay = gates.naive_kda_gate(layer.decay_proj(x).unflatten(-1, (2, 3)), layer.A_log, layer.dt_bias)
    o, _ = naive.naive_recurrent_kda(q, k, v, decay, torch.sigmoid(layer.beta_proj(x)))
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-5) * layer.norm.weight
    require_same(layer, x, layer.o_proj(o.flatten(-2) * torch.sigmoid(layer.g_proj(x))))


def test_rwkv7_agrees_with_flash_linear_attention() -> None:
    naive = pytest.importorskip("fla.ops.generalized_delta_rule.dplr.naive")
    mix = pytest.importorskip("fla.ops.rwkv7.fused_addcmul").torch_addcmul_rwkv7
    key_update = pytest.importorskip("fla.ops.rwkv7.fused_k_update").k_update_ref
    correction = pytest.importorskip("fla.ops.rwkv7.gate_output_correction").gate_output_correction_ref
    torch.manual_seed(0)
    layer = mixers.build("rwkv7", 6, heads=2, rank=3, gate_rank=4)
    randomise(layer)
    x = torch.randn(2, 9, 6)
    delta = nn.functional.pad(x, (0, 0, 1, -1)) - x
    xr, xw, xk, xv, xa, xg = mix(x, delta, *layer.mixes)
    r, k, v = layer.r_proj(xr), layer.k_proj(xk), layer.v_proj(xv)
    w = -0.6065306597126334 * torch.sigmoid(layer.w_up(torch.tanh(layer.w_down(xw))))
    a = torch.sigmoid(layer.a_up(layer.a_down(xa)))
    g = layer.g_up(torch.sigmoid(layer.g_down(xg)))
    kk = nn.functional.normalize((k * layer.k_scale).unflatten(-1, (2, 3)), dim=-1)
    k = key_update(k, a, layer.k_rate)
    r, k, v, w, a = (rows.unflatten(-1, (2, 3)) for rows in (r, k, v, w, a))
    # their loop scales queries by K^-½, and theirs does not in the layer
    rows = (math.sqrt(3) * r, k, v, -kk, kk * a, w)
    o, _ = naive.dplr_recurrence(*(tensor.transpose(1, 2) for tensor in rows))
    o = nn.functional.group_norm(
        o.transpose(1, 2).reshape(18, 6), 2, layer.norm.weight.flatten(), layer.norm.bias.flatten(), eps=3e-5
    )
    require_same(layer, x, layer.o_proj(correction(o.view(2, 9, 6), r, k, layer.bonus, v, g)))


@pytest.mark.parametrize("layer", [0, 2])
def test_rwkv7_starts_as_published(layer: int) -> None:
    """The formulas of github.com/BlinkDL/RWKV-LM, channel by channel."""
    C, N, layers = 8, 4, 4
    ours = mixers.build("rwkv7", C, heads=2, layer=layer, layers=layers, zero_init=True)
    for n in range(C):
        linear = n / (C - 1) - 0.5
        zigzag = ((n % N) - (N - 1) / 2) / ((N - 1) / 2)
        zigzag *= abs(zigzag)
        www = -6 + 6 * (n / (C - 1)) ** (1 + (layer / (layers - 1)) ** 0.3)
        expected = {
            ours.w_up.bias[n]: www + 0.5 + zigzag * 2.5,
            ours.a_up.bias[n]: -0.19 + zigzag * 0.3 + linear * 0.4,
            ours.k_scale[n]: 0.71 - linear * 0.1,
            ours.mixes[0, n]: 1 - (n / C) ** (0.2 * (1 - layer / layers)),
            ours.mixes[1, n]: 1 - (n / C) ** (0.9 * (1 - layer / layers)),
            ours.norm.weight.flatten()[n]: ((layer + 1) / layers) ** 0.7,
        }
        for found, value in expected.items():
            assert abs(found.item() - value) < 1e-5
    assert not ours.o_proj.weight.any()
    assert not ours.w_down.weight.any()
    # 8 outputs of rank 32: orthogonal rows of length 0.1
    torch.testing.assert_close(ours.w_up.weight @ ours.w_up.weight.T, 0.01 * torch.eye(C), rtol=0, atol=1e-6)


def test_the_state_of_a_rule_with_negative_eigenvalues_counts_parity() -> None:
    """β = 2 for one key flips what is held for it at every token; β = 1 forgets it."""
    layer = mixers.build("deltanet", 2, heads=1, short_conv=0, negative_eigenvalues=True).double()
    with torch.no_grad():
        layer.qkv.proj.weight.zero_()
        layer.qkv.proj.weight[2:4, 0] = 1
        layer.beta_proj.weight.fill_(40)
    state = layer.init_state(1)
    state["S"] += 1
    x = torch.tensor([[[5.0, 0.0]]], dtype=torch.float64)
    along = torch.ones(2, dtype=torch.float64)
    for token in range(1, 4):
        _, state = layer(x, state)
        torch.testing.assert_close(along @ state["S"][0, 0] / 2, (-1.0) ** token * along, rtol=1e-5, atol=0)


# With several heads, and options that change the equation
VARIANTS: dict[str, checks.Make] = {
    "deltanet": lambda dim: mixers.build(
        "deltanet", dim, heads=3, expand_v=2, gate=True, negative_eigenvalues=True, conv_bias=True
    ),
    "gated_deltanet": lambda dim: mixers.build(
        "gated_deltanet", dim, heads=2, value_heads=4, head_dim=3, short_conv=0, gate=False
    ),
    "kda": lambda dim: mixers.build("kda", dim, heads=3, expand_v=2, rank=2, gate_bias=True),
    "rwkv7": lambda dim: mixers.build("rwkv7", dim, heads=3, rank=2, gate_rank=3, layer=1, layers=3),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_obey_the_laws(name: str) -> None:
    laws = [law for law in checks.LAWS if law not in checks.SLOW]
    checks.run(VARIANTS[name], laws=laws, examples=2)


WRONG: dict[str, tuple[str, Any]] = {
    "heads": ("deltanet: heads is 3", lambda: mixers.build("deltanet", 4, heads=3)),
    "width": ("kda: short_conv is -1", lambda: mixers.build("kda", 4, short_conv=-1)),
    "bias": ("deltanet: conv_bias is True", lambda: mixers.build("deltanet", 4, short_conv=0, conv_bias=True)),
    "value heads": (
        "value_heads is 3, expected a multiple of heads = 2",
        lambda: mixers.build("gated_deltanet", 4, heads=2, value_heads=3),
    ),
    "layer": ("rwkv7: layer is 2, expected one of 0 to", lambda: mixers.build("rwkv7", 4, layer=2, layers=2)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name: str) -> None:
    message, call = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()
