"""Mixers with element-wise states and convolutions, against other people's code or their papers' equations written out.

Each is compared in one call, and in two, where the second continues from the state of the first.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixers
from mixers import checks
from mixers.mixer import SequenceMixer


def in_two_calls(layer: SequenceMixer, x: Tensor, cut: int) -> Tensor:
    first, state = layer(x[:, :cut])
    return torch.cat([first, layer(x[:, cut:], state)[0]], 1)


def require_same(layer: SequenceMixer, x: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(layer(x)[0], expected, **tolerance)
    for cut in (1, x.shape[1] // 2):
        torch.testing.assert_close(in_two_calls(layer, x, cut), expected, **tolerance)


def randomise(module: nn.Module) -> None:
    """So that no parameter is at a value where it does not matter."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize("candidate", ["positive", "identity"])
def test_minlstm_is_the_papers_equation(candidate: str) -> None:
    torch.manual_seed(0)
    layer = mixers.build("minlstm", 5, expand=2, candidate=candidate).double()
    x = torch.randn(1, 7, 5, dtype=torch.float64)
    h, rows = torch.zeros(10, dtype=torch.float64), []
    for t in range(7):
        f, i = torch.sigmoid(layer.f_proj(x[0, t])), torch.sigmoid(layer.i_proj(x[0, t]))
        c = layer.h_proj(x[0, t])
        if candidate == "positive":
            c = torch.where(c >= 0, c + 0.5, torch.sigmoid(c))
        h = f / (f + i) * h + i / (f + i) * c
        rows.append(layer.o_proj(h))
    require_same(layer, x, torch.stack(rows)[None])


def test_minlstm_shares_do_not_underflow() -> None:
    """Both gates at σ(−200), which is 0 in float32: they share equally, where their quotient is 0/0."""
    layer = mixers.build("minlstm", 3, candidate="identity")
    with torch.no_grad():
        for gate in (layer.f_proj, layer.i_proj):
            gate.weight.zero_()
            gate.bias.fill_(-200.0)
    x = torch.randn(1, 1, 3)
    torch.testing.assert_close(layer(x)[0], layer.o_proj(0.5 * layer.h_proj(x)))


def test_minlstm_forget_bias_lengthens_the_memory_at_the_start() -> None:
    torch.manual_seed(0)
    plain = mixers.build("minlstm", 4)
    torch.manual_seed(0)
    longer = mixers.build("minlstm", 4, forget_bias=3.0)
    torch.testing.assert_close(longer.f_proj.bias, plain.f_proj.bias + 3)


def test_lru_is_the_papers_equation() -> None:
    """With Python's complex numbers, from the parameters as the paper names them."""
    torch.manual_seed(0)
    layer = mixers.build("lru", 4, states=6).double()
    randomise(layer)
    B = torch.complex(*layer.in_proj.weight.chunk(2))
    real, negative_imaginary = layer.out_proj.weight.chunk(2, 1)
    C = torch.complex(real, -negative_imaginary)
    eigenvalues = torch.exp(torch.complex(-layer.nu.exp(), layer.theta.exp()))
    x = torch.randn(1, 9, 4, dtype=torch.float64)
    h, rows = torch.zeros(6, dtype=torch.complex128), []
    for t in range(9):
        h = eigenvalues * h + layer.gamma.exp() * (B @ x[0, t].to(torch.complex128))
        rows.append((C @ h).real + layer.D * x[0, t])
    require_same(layer, x, torch.stack(rows)[None])


def test_lru_starts_on_its_ring_and_keeps_the_size_of_its_input() -> None:
    torch.manual_seed(0)
    layer = mixers.build("lru", 2, states=1000, r_min=0.6, r_max=0.9, max_phase=1.5)
    size = layer.eigenvalues(torch.float64).norm(dim=-1)
    phase = layer.theta.double().exp()
    assert 0.6 - 1e-6 <= size.min() < 0.61
    assert 0.89 < size.max() <= 0.9 + 1e-6
    assert 0 < phase.min() < 0.01
    assert 1.49 < phase.max() <= 1.5 + 1e-6
    # uniform by area: the square of the radius is uniform
    assert abs(size.square().mean() - (0.36 + 0.81) / 2) < 0.015
    torch.testing.assert_close(layer.gamma.double().exp(), (1 - size**2).sqrt(), rtol=1e-5, atol=0)
    h = layer(torch.randn(200, 40, 2))[1]["h"]
    # B x has variance 1 for each complex number, and so has h
    assert 0.7 < h.square().sum(-1).mean() < 1.4


@pytest.mark.parametrize("bias", [False, True])
def test_gated_conv_agrees_with_transformers(bias: bool) -> None:
    lfm2 = pytest.importorskip("transformers.models.lfm2.modeling_lfm2")
    transformers = pytest.importorskip("transformers")
    config = transformers.Lfm2Config(hidden_size=6, num_hidden_layers=1, layer_types=["conv"], conv_bias=bias)
    torch.manual_seed(0)
    theirs = lfm2.Lfm2ShortConv(config, 0)
    randomise(theirs)
    ours = mixers.build("gated_conv", 6, short_conv=config.conv_L_cache, bias=bias)
    with torch.no_grad():
        ours.in_proj.load_state_dict(theirs.in_proj.state_dict())
        ours.out_proj.load_state_dict(theirs.out_proj.state_dict())
        ours.conv_weight.copy_(theirs.conv.weight.squeeze(1))
        if bias:
            ours.conv_bias.copy_(theirs.conv.bias)
    x = torch.randn(2, 9, 6)
    require_same(ours, x, theirs(x), rtol=1e-4, atol=1e-5)
    cache = transformers.DynamicCache(config=config)
    theirs(x[:, :5], past_key_values=cache)
    expected = theirs(x[:, 5:6], past_key_values=cache)
    torch.testing.assert_close(ours(x[:, 5:6], ours(x[:, :5])[1])[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["f", "fo", "ifo"])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_qrnn_is_the_papers_equation(window: int, pooling: str) -> None:
    """The projections as torch's convolution over a padded sequence, then the pooling's loop."""
    torch.manual_seed(0)
    layer = mixers.build("qrnn", 4, window=window, pooling=pooling).double()
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    # [out, window, in], the newest input last, as nn.Conv1d's taps are
    filters = layer.proj.weight.unflatten(1, (window, 4)).transpose(1, 2)
    padded = nn.functional.pad(x.transpose(1, 2), (window - 1, 0))
    z, *gates = nn.functional.conv1d(padded, filters, layer.proj.bias).transpose(1, 2).chunk(1 + len(pooling), -1)
    gate = dict(zip(sorted(pooling, key="foi".index), gates))
    f = torch.sigmoid(gate["f"])
    i = torch.sigmoid(gate["i"]) if pooling == "ifo" else 1 - f
    c, rows = torch.zeros(2, 4, dtype=torch.float64), []
    for t in range(9):
        c = f[:, t] * c + i[:, t] * torch.tanh(z[:, t])
        rows.append(c if pooling == "f" else torch.sigmoid(gate["o"][:, t]) * c)
    require_same(layer, x, torch.stack(rows, 1))


# step by step, and in chunks with some rows left
@pytest.mark.parametrize("length", [12, 75])
@pytest.mark.parametrize("init", ["lin", "inv"])
def test_s4d_is_the_convolution_with_its_kernel(init: str, length: int) -> None:
    """The kernel K[t] = 2 Re(Σ C B̄ Ā^t) in complex numbers, and torch's convolution."""
    torch.manual_seed(0)
    layer = mixers.build("s4d", 3, states=8, init=init, dt_min=0.01, dt_max=0.5).double()
    x = torch.randn(2, length, 3, dtype=torch.float64)
    A, C = torch.complex(-layer.A_log.exp(), layer.A_imag), torch.view_as_complex(layer.C.detach())
    steps = torch.exp(layer.log_dt[:, None] + torch.zeros_like(A.real)) * A
    times = torch.arange(length, dtype=torch.float64)
    kernel = 2 * torch.einsum("dn,dnt->dt", C * (steps.exp() - 1) / A, (steps[..., None] * times).exp()).real
    padded = nn.functional.pad(x.transpose(1, 2), (length - 1, 0))
    filtered = nn.functional.conv1d(padded, kernel.flip(-1)[:, None], groups=3).transpose(1, 2)
    value, gate = layer.out_proj(nn.functional.gelu(filtered + layer.D * x)).chunk(2, -1)
    require_same(layer, x, value * torch.sigmoid(gate))


def test_s4d_input_weights_do_not_cancel_in_float32() -> None:
    """B̄ at a small step: (Ā − 1) / A in float32 loses what expm1 keeps."""
    torch.manual_seed(0)
    layer = mixers.build("s4d", 4, dt_min=1e-5, dt_max=1e-5)
    exact = layer.discretised(torch.float64)[1]
    error = (layer.discretised(torch.float32)[1] - exact).abs().max() / exact.abs().max()
    A = torch.complex(-layer.A_log.exp(), layer.A_imag)
    cancelled = torch.view_as_real((torch.exp(1e-5 * A) - 1) / A)
    assert error < 1e-6
    assert (cancelled - exact).abs().max() / exact.abs().max() > 1e-4


def test_s4d_starts_as_published() -> None:
    lin, inv = mixers.build("s4d", 2, states=4), mixers.build("s4d", 2, states=4, init="inv")
    torch.testing.assert_close(lin.A_imag[1], torch.tensor([0.0, math.pi]))
    torch.testing.assert_close(inv.A_imag[1], torch.tensor([4 / math.pi * 3, 4 / math.pi / 3]))
    torch.testing.assert_close(lin.A_log.exp(), torch.full((2, 2), 0.5))
    assert (lin.log_dt.exp() >= 0.001 - 1e-9).all()
    assert (lin.log_dt.exp() <= 0.1 + 1e-9).all()


@pytest.mark.parametrize("bias", [False, True])
def test_mamba_agrees_with_transformers(bias: bool) -> None:
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        hidden_size=6, state_size=5, num_hidden_layers=1, time_step_rank=2, use_bias=bias, use_conv_bias=not bias
    )
    torch.manual_seed(0)
    theirs = modeling.MambaMixer(config, 0).eval()
    randomise(theirs)
    ours = mixers.build("mamba", 6, states=5, dt_rank=2, bias=bias, conv_bias=not bias)
    with torch.no_grad():
        for name in ("in_proj", "x_proj", "out_proj"):
            getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
        ours.dt_proj.weight.copy_(theirs.dt_proj.weight)
        ours.dt_bias.copy_(theirs.dt_proj.bias)
        ours.conv_weight.copy_(theirs.conv1d.weight.squeeze(1))
        ours.A_log.copy_(theirs.A_log)
        ours.D.copy_(theirs.D)
        if not bias:
            ours.conv_bias.copy_(theirs.conv1d.bias)
    x = torch.randn(2, 9, 6)
    require_same(ours, x, theirs(x), rtol=1e-4, atol=1e-5)
    cache = transformers.DynamicCache(config=config)
    theirs(x[:, :5], cache_params=cache)
    expected = theirs(x[:, 5:6], cache_params=cache)
    torch.testing.assert_close(ours(x[:, 5:6], ours(x[:, :5])[1])[0], expected, rtol=1e-4, atol=1e-5)


def test_mamba_starts_as_published() -> None:
    torch.manual_seed(0)
    layer = mixers.build("mamba", 64, states=3)
    torch.testing.assert_close(layer.A_log.exp()[7], torch.tensor([1.0, 2.0, 3.0]))
    steps = nn.functional.softplus(layer.dt_bias)
    assert 0.001 - 1e-6 <= steps.min() < 0.002
    assert 0.05 < steps.max() <= 0.1 + 1e-6
    assert layer.dt_rank == 4
    assert 0.49 < layer.dt_proj.weight.abs().max() <= 0.5
    assert (layer.D == 1).all()


# Options that change the equation
VARIANTS: dict[str, checks.Make] = {
    "minlstm": lambda dim: mixers.build("minlstm", dim, expand=2, candidate="identity", bias=False),
    "lru": lambda dim: mixers.build("lru", dim, states=5, r_min=0.9, r_max=0.999, max_phase=0.3),
    "qrnn": lambda dim: mixers.build("qrnn", dim, window=3, pooling="ifo", bias=False),
    "qrnn of one token": lambda dim: mixers.build("qrnn", dim, window=1, pooling="f"),
    "s4d": lambda dim: mixers.build("s4d", dim, states=4, init="inv", glu=False, activation="identity"),
    "gated_conv": lambda dim: mixers.build("gated_conv", dim, short_conv=5, bias=True),
    "mamba": lambda dim: mixers.build("mamba", dim, expand=1, states=3, short_conv=2, bias=True, conv_bias=False),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_obey_the_laws(name: str) -> None:
    laws = [law for law in checks.LAWS if law not in checks.SLOW]
    checks.run(VARIANTS[name], laws=laws, examples=2)


WRONG: dict[str, tuple[str, Any]] = {
    "candidate": ("candidate is 'tanh', expected one of", lambda: mixers.build("minlstm", 4, candidate="tanh")),
    "forget bias": ("bias=False leaves no bias", lambda: mixers.build("minlstm", 4, bias=False, forget_bias=1.0)),
    "ring": ("r_min is 0.9 and r_max is 0.5", lambda: mixers.build("lru", 4, r_min=0.9, r_max=0.5)),
    "phase": ("max_phase is -1", lambda: mixers.build("lru", 4, max_phase=-1)),
    "window": ("window is 0", lambda: mixers.build("qrnn", 4, window=0)),
    "pooling": ("pooling is 'io', expected one of 'f', 'fo', 'ifo'", lambda: mixers.build("qrnn", 4, pooling="io")),
    "states": ("states is 5, expected an even number", lambda: mixers.build("s4d", 4, states=5)),
    "init": ("init is 'legs', expected one of 'lin', 'inv'", lambda: mixers.build("s4d", 4, init="legs")),
    "steps": ("dt_min is 1.0 and dt_max is 0.1", lambda: mixers.build("s4d", 4, dt_min=1.0)),
    "mamba steps": ("mamba: dt_min is 1.0 and dt_max is 0.1", lambda: mixers.build("mamba", 4, dt_min=1.0)),
    "mamba width": ("mamba: short_conv is 0", lambda: mixers.build("mamba", 4, short_conv=0)),
    "width": ("gated_conv: short_conv is 0", lambda: mixers.build("gated_conv", 4, short_conv=0)),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name: str) -> None:
    message, call = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()
