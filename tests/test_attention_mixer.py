"""The attention mixer: its formula, positions through states, packed prompts that go on as a batch, snapshots."""

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
from mixers import Attention, state

pytestmark = pytest.mark.usefixtures("nan_filled")


def make(dim: int = 12, dtype: torch.dtype = torch.float64, **options: Any) -> Attention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = mixers.build("attention", dim, **{"heads": 6, "kv_heads": 2, **options}).to(dtype)
    assert isinstance(mixer, Attention)
    return mixer


def pack(sequences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences [T, dim] as one [1, total, dim], and their borders."""
    return torch.cat(sequences)[None], torch.tensor([0, *itertools.accumulate(map(len, sequences))])


def rotated(x: Tensor, base: float) -> Tensor:
    """x [T, H, K]: its halves are the parts of complex numbers, which turn by t base^(-2j/K)."""
    half = x.shape[-1] // 2
    numbers = torch.complex(x[..., :half], x[..., half:])
    angle = torch.arange(len(x), dtype=x.dtype)[:, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)
    numbers = numbers * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([numbers.real, numbers.imag], -1)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_formula(bidirectional: bool) -> None:
    mixer = make(24, bidirectional=bidirectional, bias=True, rotary_base=100.0)
    x = torch.randn(2, 11, 24, dtype=torch.float64)
    for row, y in zip(x, mixer(x)[0]):
        q, k, v = (p(row).unflatten(-1, (-1, 4)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        q, k = rotated(q, 100.0), rotated(k, 100.0)
        heads = (z.transpose(0, 1) for z in (q, k, v))
        z = F.scaled_dot_product_attention(*heads, is_causal=not bidirectional, enable_gqa=True)
        assert torch.allclose(y, mixer.o_proj(z.transpose(0, 1).flatten(1)), atol=1e-12)


def test_rotary_depends_on_distances_only_and_goes_on_through_the_state() -> None:
    mixer, x = make(), torch.randn(1, 9, 12, dtype=torch.float64)
    start = mixer.init_state(1)
    late = {**start, "length": torch.tensor([1000])}
    y, after = mixer(x, late)
    assert torch.allclose(y, mixer(x, start)[0], atol=1e-9)
    assert after["length"].item() == 1009
    assert not torch.allclose(after["keys"], mixer(x, start)[1]["keys"], atol=1e-3)
    still = make(rotary=False)
    assert torch.allclose(still(x, late)[1]["keys"], still(x, start)[1]["keys"])


@given(
    seed=st.integers(0, 10_000),
    window=st.sampled_from((None, 1, 2, 5, 30)),
    packed=st.lists(st.booleans(), max_size=4),
)
def test_packed_prompts_go_on_as_a_batch_or_packed_again(seed: int, window: int | None, packed: list[bool]) -> None:
    """Prompts of unequal length, some empty, packed; then steps of a batch and packed steps in any order."""
    rng, mixer = random.Random(seed), make(window=window)
    N = rng.randint(1, 4)
    carried, texts, ys = None, [[] for _ in range(N)], [[] for _ in range(N)]
    for again in (True, *packed):
        lengths = [rng.choice((0, 1, 3, 8)) for _ in range(N)] if again else [rng.randint(1, 3)] * N
        lengths[-1] = lengths[-1] or 1
        new = [torch.randn(n, 12, dtype=torch.float64) for n in lengths]
        if again:
            x, cu_seqlens = pack(new)
            y, carried = mixer(x, carried, cu_seqlens=cu_seqlens)
            parts = list(y[0].split(lengths))
        else:
            y, carried = mixer(torch.stack(new), carried)
            parts = list(y)
        for n in range(N):
            texts[n].append(new[n])
            ys[n].append(parts[n])
    for n in range(N):
        whole = torch.cat(texts[n])[None]
        row = state.select(carried, torch.tensor([n]))
        assert row["length"].item() == whole.shape[1]
        if whole.shape[1]:
            y, after = mixer(whole)
            assert torch.allclose(torch.cat(ys[n])[None], y, atol=1e-12)
            for found, right in zip(mixer.comparable(row), mixer.comparable(after)):
                assert torch.allclose(found, right, atol=1e-12)


@pytest.mark.parametrize("window", [None, 4])
def test_gradients_flow_through_packed_prompts_into_the_batch(window: int | None) -> None:
    mixer = make(window=window)
    prompts = [torch.randn(n, 12, dtype=torch.float64, requires_grad=True) for n in (3, 0, 7)]
    steps = torch.randn(3, 2, 12, dtype=torch.float64, requires_grad=True)
    x, cu_seqlens = pack(prompts)
    y, after = mixer(x, cu_seqlens=cu_seqlens)
    z, after = mixer(steps, after)
    z2, _ = mixer(steps, after)
    apart = [mixer(torch.cat([prompt, step, step])[None])[0][0] for prompt, step in zip(prompts, steps)]
    together = [torch.cat([a, b, c]) for a, b, c in zip(y[0].split([3, 0, 7]), z, z2)]
    inputs = [*prompts, steps, *mixer.parameters()]
    found, right = (torch.autograd.grad(sum(p.square().sum() for p in ys), inputs) for ys in (together, apart))
    for one, two in zip(found, right):
        assert torch.allclose(one, two, atol=1e-10)


def test_a_state_is_a_snapshot() -> None:
    """Two ways on from one state do not see each other, with and without gradients; nothing changes the snapshot."""
    mixer = make(window=None)
    x, one, two = (torch.randn(2, n, 12, dtype=torch.float64) for n in (5, 3, 3))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            carried = None
            for t in range(5):
                _, carried = mixer(x[:, t : t + 1], carried)
            before = state.clone(carried)
            first = mixer(one, carried)
            second = mixer(two, carried)
            again = mixer(one, carried)
            rolled_back = {**first[1], "keys": first[1]["keys"][:, :6], "values": first[1]["values"][:, :6]}
            rolled_back["length"] = torch.full_like(rolled_back["length"], 6)
            third = mixer(two[:, :2], rolled_back)
        for name, kept in before.items():
            assert torch.equal(carried[name], kept)
        mixed = torch.cat([one[:, :1], two[:, :2]], 1)
        for y, after, rest in ((*first, one), (*second, two), (*again, one), (*third, mixed)):
            whole, right = mixer(torch.cat([x, rest], 1))
            assert torch.allclose(y, whole[:, -y.shape[1] :], atol=1e-12)
            assert all(torch.allclose(a, b) for a, b in zip(mixer.comparable(after), mixer.comparable(right)))


def test_decoding_does_not_copy_the_cache_at_every_token() -> None:
    mixer = make(window=None)
    _, carried = mixer(torch.randn(2, 3, 12, dtype=torch.float64))
    places = set()
    with torch.no_grad():
        for _ in range(100):
            _, carried = mixer(torch.randn(2, 1, 12, dtype=torch.float64), carried)
            places.add(carried["keys"].data_ptr())
    assert carried["keys"].shape[1] == 103
    assert len(places) < 8


def test_a_packed_state_costs_no_memory_and_a_window_forgets() -> None:
    mixer = make(window=5)
    x, cu_seqlens = pack([torch.randn(n, 12, dtype=torch.float64) for n in (4, 9, 1)])
    _, after = mixer(x, cu_seqlens=cu_seqlens)
    assert after["keys"].shape == (3, 14, 2, 2)
    assert after["keys"].untyped_storage().nbytes() == 14 * 2 * 2 * 8
    _, after = mixer(torch.randn(3, 2, 12, dtype=torch.float64), after)
    assert after["keys"].shape == (3, 4, 2, 2)
    assert after["length"].tolist() == [6, 11, 3]
    assert after["start"].tolist() == [0, 0, 1]
    assert sum(t.numel() for t in state.leaves(after) if t.is_floating_point()) == 3 * mixer.state_size(100)


@torch.no_grad()
def test_graphs_prefill_packed_prompts_decode_and_prefill_again() -> None:
    mixer = make(window=5)
    graph = torch.compile(mixer, fullgraph=True, dynamic=True, backend="aot_eager")
    x, cu_seqlens = pack([torch.randn(n, 12, dtype=torch.float64) for n in (3, 0, 7)])
    step = torch.randn(3, 2, 12, dtype=torch.float64)
    found = [f(x, cu_seqlens=cu_seqlens) for f in (graph, mixer)]
    for rows, packing in ((step, None), (step, None), (x, cu_seqlens)):
        found = [f(rows, after, cu_seqlens=packing) for f, (_, after) in zip((graph, mixer), found)]
        assert torch.allclose(found[0][0], found[1][0], atol=1e-12)
        for one, two in zip(*(mixer.comparable(after) for _, after in found)):
            assert torch.allclose(one, two, atol=1e-12)


def test_a_decoding_step_exports_for_caches_of_any_length() -> None:
    mixer, x = make(), torch.randn(2, 1, 12, dtype=torch.float64)
    _, carried = mixer(torch.randn(2, 7, 12, dtype=torch.float64))
    rows = torch.export.Dim("rows", min=2, max=4096)
    shapes = {"x": None, "state": {"keys": {1: rows}, "values": {1: rows}, "length": None}}
    step = torch.export.export(mixer, (x, carried), dynamic_shapes=shapes).module()
    other = carried
    for _ in range(4):
        (y, carried), (z, other) = mixer(x, carried), step(x, other)
        assert torch.allclose(y, z, atol=1e-12)


def test_autocast_caches_what_it_computes() -> None:
    mixer, x = make(dtype=torch.float32), torch.randn(2, 9, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y, after = mixer(x[:, :5])
        y2, after = mixer(x[:, 5:8], after)
    assert after["keys"].dtype == torch.bfloat16
    # from one precision into the other
    y3, after = mixer(x[:, 8:], after)
    assert after["keys"].dtype == torch.float32
    whole = mixer(x)[0]
    assert (torch.cat([y, y2, y3], 1).float() - whole).norm() < 0.03 * whole.norm()


def test_heads_by_default_and_what_is_refused() -> None:
    assert [mixers.build("attention", dim).heads for dim in (6, 64, 100, 192, 200, 512)] == [1, 1, 1, 3, 2, 8]  # type: ignore[attr-defined]
    assert make(10, heads=4, kv_heads=1, head_dim=6).o_proj.weight.shape == (10, 24)
    with pytest.raises(ValueError, match="dim 12 is no multiple of heads 5"):
        mixers.build("attention", 12, heads=5)
    with pytest.raises(ValueError, match="heads 6 is no multiple of kv_heads 4"):
        mixers.build("attention", 12, heads=6, kv_heads=4)
    with pytest.raises(ValueError, match="window is 0, expected at least 1"):
        mixers.build("attention", 12, window=0)
    with pytest.raises(TypeError, match="no option 'kv_head'; did you mean 'kv_heads'"):
        mixers.build("attention", 12, kv_head=1)
    x = torch.randn(2, 3, 12)
    mixer = make(dtype=torch.float32)
    with pytest.raises(ValueError, match="axis batch is 3 in state but 2 in x"):
        mixer(x, mixer.init_state(3))
    with pytest.raises(ValueError, match="a bidirectional mixer has no state"):
        make(dtype=torch.float32, bidirectional=True)(x, mixer.init_state(2))
    with pytest.raises(ValueError, match="there are auto, naive, flex, sdpa"):
        make(dtype=torch.float32, backend="flash")(x)
