"""Forgetting attention: its formula, FLA's, ALiBi and plain attention as special cases, and the cache of its gates."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mixers
from kernels.attention import attention
from mixers import ForgettingAttention, checks, state

pytestmark = pytest.mark.usefixtures("nan_filled")

PRO = {"qk_norm": True, "output_norm": True, "output_gate": True}


def make(dim: int = 12, dtype: torch.dtype = torch.float64, **options: Any) -> ForgettingAttention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = mixers.build("forgetting_attention", dim, **{"heads": 6, "kv_heads": 2, **options}).to(dtype)
    assert isinstance(mixer, ForgettingAttention)
    return mixer


def rms(x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("options", [{}, {"window": 4, "bias": True}, {"output_gate": True}, PRO])
@torch.no_grad()
def test_formula(options: dict[str, Any]) -> None:
    """Token by token and head by head, with products of gates in place of sums of logarithms."""
    mixer = make(12, **options)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    found = mixer(x)[0]
    for row, y in zip(x, found):
        q, k, v = (p(row).unflatten(-1, (-1, 2)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        if mixer.q_norm is not None:
            q, k = rms(q, 1e-6), rms(k, 1e-6)
        gates = torch.sigmoid(row @ mixer.f_proj.weight.T + mixer.f_proj.bias)
        for t, h in itertools.product(range(9), range(6)):
            first = max(t - (mixer.window or 9) + 1, 0)
            kept = torch.stack([gates[s + 1 : t + 1, h].prod() for s in range(first, t + 1)])
            weights = kept * torch.exp(k[first : t + 1, h // 3] @ q[t, h] / 2**0.5)
            o = (weights / weights.sum()) @ v[first : t + 1, h // 3]
            o = rms(o, 1e-5) if mixer.o_norm is not None else o
            if mixer.g_proj is not None:
                o = o * torch.sigmoid(mixer.g_proj(row[t]).unflatten(-1, (6, 2))[h])
            y[t] -= mixer.o_proj.weight[:, 2 * h : 2 * h + 2] @ o
        if mixer.o_proj.bias is not None:
            y -= mixer.o_proj.bias
    assert found.abs().max() < 1e-12


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
@pytest.mark.parametrize("window", [None, 20])
def test_agrees_with_fla(backend: str, window: int | None) -> None:
    """Their reference, which computes in float32: outputs and the gradients that autograd makes of it."""
    theirs = pytest.importorskip("fla.ops.forgetting_attn.naive").naive_forgetting_attn
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 75, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    log_decay = F.logsigmoid(torch.randn(2, 75, 4) + 2).requires_grad_()
    y = attention(q, k, v, log_decay=log_decay, window=window, backend=backend)
    right = theirs(q, k, v, log_decay, window_size=window)
    assert torch.allclose(y, right, atol=1e-5)
    weights = torch.randn_like(y)
    tensors = (q, k, v, log_decay)
    for one, two in zip(torch.autograd.grad(y, tensors, weights), torch.autograd.grad(right, tensors, weights)):
        assert (one - two).abs().max() < 1e-5 * two.abs().max()


def test_open_gates_are_attention_and_one_gate_for_all_tokens_is_alibi() -> None:
    mixer, x = make(rotary=True), torch.randn(2, 17, 12, dtype=torch.float64)
    plain = mixers.build("attention", 12, heads=6, kv_heads=2).to(torch.float64)
    plain.load_state_dict({name: tensor for name, tensor in mixer.state_dict().items() if "f_proj" not in name})
    with torch.no_grad():
        mixer.f_proj.weight.zero_()
        mixer.f_proj.bias.fill_(60.0)
    assert torch.allclose(mixer(x)[0], plain(x)[0], atol=1e-12)
    still = make()
    slopes = 2.0 ** -torch.arange(1, 7, dtype=torch.float64)
    with torch.no_grad():
        still.f_proj.weight.zero_()
        # σ(b) = exp(−slope)
        still.f_proj.bias.copy_(-torch.log(torch.expm1(slopes)))
    q, k, v = (p(x).unflatten(-1, (-1, 2)).transpose(1, 2) for p in (still.q_proj, still.k_proj, still.v_proj))
    distance = torch.arange(17)[:, None] - torch.arange(17)
    alibi = (-slopes[:, None, None] * distance).masked_fill(distance < 0, -torch.inf)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=alibi, enable_gqa=True)
    assert torch.allclose(still(x)[0], still.o_proj(y.transpose(1, 2).flatten(2)), atol=1e-12)


@pytest.mark.parametrize("options", [PRO | {"heads": 3, "kv_heads": 1}, {"window": 5, "rotary": True, "bias": True}])
def test_laws_with_options(options: dict[str, Any]) -> None:
    laws = [law for law in checks.LAWS if law not in checks.SLOW]
    checks.run(lambda dim: mixers.build("forgetting_attention", dim, **options), laws=laws, examples=2)


@given(
    seed=st.integers(0, 10_000),
    window=st.sampled_from((None, 1, 5)),
    packed=st.lists(st.booleans(), max_size=3),
)
def test_packed_prompts_go_on_as_a_batch_or_packed_again(seed: int, window: int | None, packed: list[bool]) -> None:
    """Prompts of unequal length, some empty, packed; then steps of a batch and packed steps in any order."""
    rng, mixer = random.Random(seed), make(window=window)
    N = rng.randint(1, 3)
    carried: Any = None
    texts: list[list[Tensor]] = [[] for _ in range(N)]
    ys: list[list[Tensor]] = [[] for _ in range(N)]
    for again in (True, *packed):
        lengths = [rng.choice((0, 1, 3, 8)) for _ in range(N)] if again else [rng.randint(1, 3)] * N
        lengths[-1] = lengths[-1] or 1
        new = [torch.randn(n, 12, dtype=torch.float64) for n in lengths]
        if again:
            borders = torch.tensor([0, *itertools.accumulate(lengths)])
            y, carried = mixer(torch.cat(new)[None], carried, cu_seqlens=borders)
            parts = list(y[0].split(lengths))
        else:
            y, carried = mixer(torch.stack(new), carried)
            parts = list(y)
        for n in range(N):
            texts[n].append(new[n])
            ys[n].append(parts[n])
    for n in range(N):
        whole = torch.cat(texts[n])[None]
        if whole.shape[1]:
            y, after = mixer(whole)
            assert torch.allclose(torch.cat(ys[n])[None], y, atol=1e-12)
            row = state.select(carried, torch.tensor([n]))
            for found, right in zip(mixer.comparable(row), mixer.comparable(after)):
                assert torch.allclose(found, right, atol=1e-12)


def test_the_state_keeps_the_gates_wide_and_its_size_is_known() -> None:
    mixer = make(dtype=torch.bfloat16, window=5)
    _, after = mixer(torch.randn(3, 9, 12, dtype=torch.bfloat16))
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        "keys": torch.bfloat16, "values": torch.bfloat16, "log_decays": torch.float32, "length": torch.int64,
    }  # fmt: skip
    assert after["log_decays"].shape == (3, 4, 6)
    assert sum(t.numel() for t in state.leaves(after) if t.is_floating_point()) == 3 * mixer.state_size(9)


@torch.no_grad()
def test_decoding_does_not_copy_the_cache_at_every_token() -> None:
    mixer = make()
    _, carried = mixer(torch.randn(2, 3, 12, dtype=torch.float64))
    places = set()
    for _ in range(60):
        _, carried = mixer(torch.randn(2, 1, 12, dtype=torch.float64), carried)
        places.add((carried["keys"].data_ptr(), carried["log_decays"].data_ptr()))
    assert carried["log_decays"].shape == (2, 63, 6)
    assert len(places) < 8


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="dim 12 is no multiple of heads 5"):
        mixers.build("forgetting_attention", 12, heads=5)
    with pytest.raises(TypeError, match="no option 'output_gates'; did you mean 'output_gate'"):
        mixers.build("forgetting_attention", 12, output_gates=True)
    mixer = make(dtype=torch.float32)
    with pytest.raises(ValueError, match="axis batch is 3 in state but 2 in x"):
        mixer(torch.randn(2, 3, 12), mixer.init_state(3))
