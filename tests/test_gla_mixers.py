"""Mixers on kernels/gla beside code that was written elsewhere, with the same weights: outputs, states, continuation.

Their loops and chunks run in float32, so "the same" means up to RTOL of the output's scale; ours run in float64.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mixers
from mixers import checks
from mixers.mixer import SequenceMixer

# float32 keeps 6e-8; sums over up to 40 tokens and three projections lose two digits of it
RTOL = 1e-5
DIM, LENGTH, CUT = 24, 40, 23


def close(found: Tensor, expected: Tensor) -> None:
    expected = expected.to(found.dtype)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=RTOL * expected.abs().max().item())


def make(name: str, **options: Any) -> tuple[Any, Tensor]:
    """A mixer in float64 with weights large enough for every gate to matter, and its input [2, LENGTH, DIM]."""
    torch.manual_seed(len(name))
    mixer = mixers.build(name, DIM, **options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return mixer, torch.randn(2, LENGTH, DIM, dtype=torch.float64)


@torch.no_grad()
def require_same(mixer: SequenceMixer, x: Tensor, expected: Tensor) -> Any:
    """At once, in two parts, and packed behind another sequence; returns the state after all."""
    y, state = mixer(x)
    close(y, expected)
    before, carried = mixer(x[:, :CUT])
    after, _ = mixer(x[:, CUT:], carried)
    close(torch.cat([before, after], 1), expected)
    packed, _ = mixer(torch.cat([x[:1], x[1:]], 1), cu_seqlens=torch.tensor([0, LENGTH, 2 * LENGTH]))
    close(packed.view_as(expected), expected)
    return state


def flash_linear_attention(path: str) -> Any:
    """A file of plain PyTorch, without the package around it, which takes long to import."""
    package = importlib.util.find_spec("fla")
    if package is None or package.origin is None:
        pytest.skip("needs flash-linear-attention (fla-core)")
    spec = importlib.util.spec_from_file_location(f"fla_{Path(path).parent.name}", Path(package.origin).parent / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def heads(x: Tensor, mixer: Any) -> Tensor:
    return x.view(*x.shape[:2], mixer.heads, -1)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def rms(x: Tensor, weight: Tensor | None = None) -> Tensor:
    y = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
    return y if weight is None else y * weight


def rotary(x: Tensor) -> Tensor:
    """Each pair of channels (j, j + K/2) of [B, T, H, K] as a complex number, turned by t · 10000^(-2j/K)."""
    frequency = 10000 ** (-torch.arange(0, x.shape[-1], 2).double() / x.shape[-1])
    angle = torch.arange(x.shape[1])[:, None, None] * frequency
    turned = torch.complex(*x.chunk(2, -1)) * torch.exp(1j * angle)
    return torch.cat([turned.real, turned.imag], -1)


@torch.no_grad()
def test_gla() -> None:
    naive = flash_linear_attention("ops/gla/naive.py").naive_recurrent_gla
    m, x = make("gla", heads=3)
    q, k, v = (heads(p(x), m) for p in (m.q_proj, m.k_proj, m.v_proj))
    log_decay = heads(F.logsigmoid(m.decay_proj(x)) / 16, m)
    o, S = naive(q, k, v, log_decay, output_final_state=True)
    y = m.o_proj((rms(o, m.norm.weight) * swish(heads(m.g_proj(x), m))).flatten(2))
    close(require_same(m, x, y)["S"], S)


@torch.no_grad()
def test_hgrn2_with_a_lower_bound() -> None:
    naive = flash_linear_attention("ops/gla/naive.py").naive_recurrent_gla
    m, x = make("hgrn2", heads=3, lower_bound=torch.linspace(0, 0.9, DIM, dtype=torch.float64))
    bound = torch.linspace(0, 0.9, DIM, dtype=torch.float64)
    log_f = torch.logaddexp(bound.log(), torch.log1p(-bound) + F.logsigmoid(m.f_proj(x)))
    q, k, v, log_f = (heads(t, m) for t in (swish(m.q_proj(x)), 1 - log_f.exp(), m.i_proj(x), log_f))
    o, S = naive(q, k, v, log_f, output_final_state=True)
    close(require_same(m, x, m.o_proj(rms(o.flatten(2), m.norm.weight)))["S"], S)


def test_hgrn2_gates_keep_their_precision_and_their_gradients() -> None:
    m, _ = make("hgrn2")
    f = torch.tensor([-1e3, -30.0, -1e-3, 0.0, 1e-3, 30.0, 1e3], dtype=torch.float64, requires_grad=True)
    log_decay, k = m.float().gates(f.float())
    torch.testing.assert_close(log_decay[1:], F.logsigmoid(f[1:]).float())
    torch.testing.assert_close(k, torch.sigmoid(-f).float())
    (slope,) = torch.autograd.grad(log_decay.sum(), f)
    torch.testing.assert_close(slope[1:], torch.sigmoid(-f[1:]).detach(), rtol=1e-5, atol=1e-30)
    assert log_decay[0] < -80
    assert slope.isfinite().all()


def test_a_stack_gives_every_hgrn2_layer_its_bound() -> None:
    stack = mixers.Stack(DIM, ["hgrn2", "attention", "hgrn2", "hgrn2"])
    bounds = [stack.blocks[n].mixer.lower_bound() for n in (0, 2, 3)]  # type: ignore[union-attr, operator]
    for layer, bound in enumerate(bounds):
        torch.testing.assert_close(bound, torch.full((DIM,), layer / 3))
    y, _ = stack(torch.randn(2, 5, DIM))
    y.square().sum().backward()
    assert stack.bounds is not None
    assert stack.bounds.weight.grad is not None
    assert stack.bounds.weight.grad.isfinite().all()
    assert stack.bounds.weight.grad[1:].any()


@pytest.mark.parametrize("feature_map", ["elu", "relu", "softplus"])
@torch.no_grad()
def test_linear_attention(feature_map: str) -> None:
    naive = flash_linear_attention("ops/linear_attn/naive.py").naive_recurrent_linear_attn
    m, x = make("linear_attention", heads=3, feature_map=feature_map)
    phi: Callable[[Tensor], Tensor] = {
        "elu": lambda z: torch.where(z > 0, z + 1, z.exp()),
        "relu": lambda z: z.clamp_min(0),
        "softplus": lambda z: torch.log1p(z.exp()),
    }[feature_map]
    q, k, v = (heads(p(x), m) for p in (m.q_proj, m.k_proj, m.v_proj))
    o, S = naive(phi(q), phi(k), v, scale=1.0, output_final_state=True)
    # their own division adds 1e-10, not the paper's 1e-6
    z = phi(k).cumsum(1)
    state = require_same(m, x, m.o_proj((o / ((phi(q) * z).sum(-1, keepdim=True) + 1e-6)).flatten(2)))
    close(state["S"][..., :-1], S)
    close(state["S"][..., -1], z[:, -1])


@torch.no_grad()
def test_linear_attention_without_normaliser() -> None:
    naive = flash_linear_attention("ops/linear_attn/naive.py").naive_recurrent_linear_attn
    m, x = make("linear_attention", heads=3, feature_map="identity", normalize=False)
    q, k, v = (heads(p(x), m) for p in (m.q_proj, m.k_proj, m.v_proj))
    o, S = naive(q, k, v, output_final_state=True)
    close(require_same(m, x, m.o_proj(rms(o, m.norm.weight).flatten(2)))["S"], S)


def test_linear_attention_refuses_to_divide_by_what_may_be_zero() -> None:
    with pytest.raises(ValueError, match="feature_map 'identity' can be negative"):
        mixers.build("linear_attention", DIM, feature_map="identity")


@torch.no_grad()
def test_retnet() -> None:
    naive = flash_linear_attention("ops/retention/naive.py").naive_retention
    m, x = make("retnet", heads=3)
    q, k, v = (heads(p(x), m) for p in (m.q_proj, m.k_proj, m.v_proj))
    o = naive(*(t.transpose(1, 2) for t in (rotary(q), rotary(k), v))).transpose(1, 2)
    state = require_same(m, x, m.o_proj((rms(o) * swish(heads(m.g_proj(x), m))).flatten(2)))
    assert state["length"].tolist() == [LENGTH, LENGTH]


@torch.no_grad()
def test_rwkv6() -> None:
    naive = flash_linear_attention("ops/rwkv6/recurrent_naive.py").naive_recurrent_rwkv6
    m, x = make("rwkv6", heads=3, depth=0.5, rank=5, decay_rank=7)
    delta = F.pad(x, (0, 0, 1, -1)) - x
    low = torch.tanh((x + delta * m.mu) @ m.mu_down).chunk(5, -1)
    w, k, v, r, g = (x + delta * (m.mu_inputs[j] + low[j] @ m.mu_up[j]) for j in range(5))
    log_w = -torch.exp(m.decay + torch.tanh(w @ m.decay_down) @ m.decay_up)
    rows = (heads(t, m).transpose(1, 2) for t in (m.r_proj(r), m.k_proj(k), m.v_proj(v), log_w))
    o, S = naive(*rows, m.bonus, scale=1.0, output_final_state=True)
    o = o.transpose(1, 2).flatten(2)
    o = F.group_norm(o.flatten(0, 1), m.heads, m.norm.weight.flatten(), m.norm.bias.flatten(), 64e-5).view_as(x)
    state = require_same(m, x, m.o_proj(o * swish(m.g_proj(g))))
    close(state["S"], S)
    assert torch.equal(state["last"][:, 0], x[:, -1])


@torch.no_grad()
def test_gsa() -> None:
    naive = flash_linear_attention("ops/gsa/naive.py").naive_recurrent_gsa
    m, x = make("gsa", heads=3, slots=5)
    q, k, v = (heads(swish(p(x)), m) for p in (m.q_proj, m.k_proj, m.v_proj))
    log_decay = heads(F.logsigmoid(m.f_proj(x)) / 8, m)
    o, (keys, values) = naive(q, k, v, 1 - log_decay.exp(), log_decay, scale=1.0, output_final_state=True)
    state = require_same(m, x, m.o_proj(rms(swish(o.flatten(2)), m.norm.weight)))
    close(state["K"].mT, keys)
    close(state["V"], values)


@pytest.mark.parametrize("window", [None, 7])
@torch.no_grad()
def test_based(window: int | None) -> None:
    naive = flash_linear_attention("ops/based/naive.py").naive_parallel_based
    m, x = make("based", heads=3, feature_dim=5, window=window)
    o = naive(*(heads(p(x), m).transpose(1, 2) for p in (m.q_proj, m.k_proj, m.v_proj)))
    y = m.o_proj(o.transpose(1, 2).flatten(2))
    if window is not None:
        near = m.window
        q, k, v = (heads(p(x), m) for p in (near.q_proj, near.k_proj, near.v_proj))
        rows = torch.arange(LENGTH)
        distance = rows[:, None] - rows
        o = F.scaled_dot_product_attention(
            rotary(q).transpose(1, 2), rotary(k).transpose(1, 2), v.transpose(1, 2), (distance >= 0) & (distance < 7)
        )
        y = y + near.o_proj(o.transpose(1, 2).flatten(2))
    require_same(m, x, y)


@pytest.mark.parametrize("groups", [1, 3])
@torch.no_grad()
def test_mamba2(groups: int) -> None:
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    transformers = pytest.importorskip("transformers")
    config = transformers.Mamba2Config(
        hidden_size=DIM, num_heads=6, head_dim=8, state_size=5, n_groups=groups, chunk_size=16, num_hidden_layers=1
    )
    theirs = modeling.Mamba2Mixer(config, 0).eval()
    m, x = make("mamba2", heads=6, state_dim=5, groups=groups)
    pairs = {
        "in_proj.weight": m.in_proj.weight,
        "conv1d.weight": m.conv[:, None],
        "conv1d.bias": m.conv_bias,
        "dt_bias": m.dt_bias,
        "A_log": m.A_log,
        "D": m.D,
        "norm.weight": m.norm.weight.flatten(),
        "out_proj.weight": m.out_proj.weight,
    }
    theirs.load_state_dict(pairs)
    state = require_same(m, x, theirs(x.float()))
    cache = transformers.DynamicCache(config=config)
    # their prefill, then one token after another from their cache and from our state
    close(m(x)[0], theirs(x.float(), cache_params=cache))
    close(state["S"].mT, cache.get_recurrent_state(0))
    for token in torch.randn(3, 2, 1, DIM, dtype=torch.float64):
        y, state = m(token, state)
        close(y, theirs(token.float(), cache_params=cache))


@pytest.mark.parametrize("shift", [-10.0, 0.0, 6.0])
@torch.no_grad()
def test_mlstm(shift: float) -> None:
    modeling = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    transformers = pytest.importorskip("transformers")
    if modeling.external_xlstm:
        pytest.skip("the xlstm package takes the place of transformers' own layer")
    config = transformers.xLSTMConfig(hidden_size=DIM, num_heads=3, chunk_size=16, num_hidden_layers=1)
    theirs = modeling.xLSTMLayer(config).eval()
    m, x = make("mlstm", heads=3)
    # input gates that are far below, around and above the forget gates, so that the maximum is kept or replaced
    m.i_proj.bias.fill_(shift)
    m.i_proj.weight.mul_(3)
    m.f_proj.bias.sub_(3)
    named = {"q": m.q_proj, "k": m.k_proj, "v": m.v_proj, "ogate_preact": m.g_proj, "out_proj": m.o_proj}
    pairs = {f"{name}.weight": projection.weight for name, projection in named.items()}
    for name, gate in (("igate_preact", m.i_proj), ("fgate_preact", m.f_proj)):
        pairs |= {f"{name}.weight": gate.weight, f"{name}.bias": gate.bias}
    theirs.load_state_dict({**pairs, "multihead_norm.weight": m.norm.weight.flatten()})
    y, after = theirs(x.float())
    state = require_same(m, x, y)
    for token in torch.randn(3, 2, 1, DIM, dtype=torch.float64):
        for found, expected in zip((state["S"][..., :-1], state["S"][..., -1], state["m"][..., None]), after):
            close(found, expected)
        y, state = m(token, state)
        expected, after = theirs(token.float(), after)
        close(y, expected)


def _mlstm(dim: int) -> SequenceMixer:
    """Input gates that often replace the maximum, which the initial ones never do; uncapped."""
    mixer: Any = mixers.build("mlstm", dim, heads=3, gate_cap=None, bias=True)
    with torch.no_grad():
        mixer.i_proj.bias.zero_()
        mixer.f_proj.bias.sub_(4)
    return mixer


# several heads, and options that change the equation
VARIANTS: dict[str, checks.Make] = {
    "gla": lambda dim: mixers.build("gla", dim, heads=3, gate=None),
    "hgrn2": lambda dim: mixers.build("hgrn2", dim, heads=3, lower_bound=0.3),
    "linear_attention": lambda dim: mixers.build(
        "linear_attention", dim, heads=3, feature_map="silu", normalize=False, bias=False
    ),
    "retnet": lambda dim: mixers.build("retnet", dim, heads=3, weight=True),
    "mamba2": lambda dim: mixers.build("mamba2", dim, heads=6, groups=3, state_dim=5, conv_bias=False, bias=True),
    "rwkv6": lambda dim: mixers.build("rwkv6", dim, heads=3, depth=0.5),
    "mlstm": _mlstm,
    "gsa": lambda dim: mixers.build("gsa", dim, heads=3, slots=5),
    "based": lambda dim: mixers.build("based", dim, heads=3, feature_dim=3, window=None),
}
LAWS = ("future_never_leaks", "token_by_token", "packed", "gradients_arrive", "gradcheck", "extreme_values")


@pytest.mark.parametrize("name", VARIANTS)
def test_the_laws_hold_for_several_heads(name: str) -> None:
    checks.run(VARIANTS[name], laws=LAWS, examples=2)


@pytest.mark.parametrize("name", ["gla", "hgrn2", "linear_attention", "retnet", "mamba2", "rwkv6", "mlstm", "gsa"])
def test_heads_that_do_not_divide_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: heads is 7, which does not divide the"):
        mixers.build(name, DIM, heads=7)
