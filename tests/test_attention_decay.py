"""Attention that forgets: scores that fall with the log decays between a key and a query."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BACKENDS, FLOAT64, Case, Largest, cases, close, literal
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from kernels.agreement import Expected
from kernels.attention import OP, attention, forgetting, naive, sdpa
from kernels.comparison import draw
from kernels.problem import Problem

pytestmark = pytest.mark.usefixtures("nan_filled")


def with_decays(draw_: st.DrawFn, case: Case) -> Tensor:
    """Forget gates from nearly one to zero, at the rows of the keys."""
    generator = torch.Generator().manual_seed(draw_(st.integers(0, 1000), label="seed of decays"))
    shape = (*case.k.shape[:2], case.q.shape[2])
    log_decay = F.logsigmoid(
        draw_(st.sampled_from((-2, 2, 6)), label="gates") + torch.randn(shape, generator=generator, dtype=FLOAT64)
    )
    if draw_(st.booleans(), label="zeros"):
        log_decay = log_decay.masked_fill(torch.rand(shape, generator=generator) < 0.1, -torch.inf)
    return log_decay


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(longest=20), data=st.data())
def test_scores_fall_with_what_was_forgotten_since(backend: str, case: Case, data: st.DataObject) -> None:
    case.options["causal"] = True
    log_decay = with_decays(data.draw, case)
    y = attention(case.q, case.k, case.v, log_decay=log_decay, backend=backend, **case.options)
    assert close(y, literal(case, log_decay=log_decay))
    assert y.is_contiguous()


@pytest.mark.parametrize("few", [0, forgetting.FEW])
@given(case=cases(longest=50), data=st.data())
def test_gradients_with_decays_agree(few: int, case: Case, data: st.DataObject) -> None:
    """With blocks of 8 queries: pieces of every kind."""
    case.options["causal"] = True
    log_decay, found = with_decays(data.draw, case), []
    for backend in BACKENDS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forgetting, "FEW", few)
            patch.setattr(sdpa, "configs", lambda problem: [{"block": 8}])
            OP._plans.clear()
            tensors = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, log_decay)]
            y = attention(*tensors[:3], log_decay=tensors[3], backend=backend, **case.options)
            weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
            found.append([y, *torch.autograd.grad(y, tensors, weights)])
            OP._plans.clear()
    for one, two in zip(*found):
        assert one.isfinite().all()
        assert close(one, two, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 2},
        {"starts": torch.tensor([1, 0]), "ends": torch.tensor([5, 4])},
        {"cu_seqlens": torch.tensor([0, 1, 3]), "starts": torch.tensor([0, 2]), "ends": torch.tensor([3, 5])},
    ],
)
def test_first_and_second_gradients_with_decays(backend: str, options: dict[str, Any]) -> None:
    batch = 1 if "cu_seqlens" in options else 2
    shapes = ((batch, 3, 4, 2), (batch, 5, 2, 2), (batch, 5, 2, 1))
    tensors = [torch.randn(shape, dtype=FLOAT64, requires_grad=True) for shape in shapes]
    tensors.append(torch.rand(batch, 5, 4, dtype=FLOAT64).neg().requires_grad_())

    def call(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
        return attention(q, k, v, log_decay=log_decay, backend=backend, **options)

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("window", [None, 700])
def test_decays_that_add_up_to_thousands_lose_no_digits(window: int | None) -> None:
    """A gate that forgets nearly everything now and then: the sums reach -12000, where float32 has three decimals."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1500, 2, 8, dtype=FLOAT64) for _ in range(3))
    log_decay = torch.full((1, 1500, 2), -0.001, dtype=FLOAT64)
    log_decay[:, ::100] = -800.0
    tensors = [x.requires_grad_() for x in (q, k, v, log_decay)]
    right = attention(q, k, v, log_decay=log_decay, window=window, backend="naive")
    dright = torch.autograd.grad(right.square().sum(), tensors)
    for backend in BACKENDS:
        narrow = [x.detach().float().requires_grad_() for x in tensors]
        y = attention(*narrow[:3], log_decay=narrow[3], window=window, backend=backend)
        assert close(y.double(), right, 2e-6)
        for one, two in zip(torch.autograd.grad(y.square().sum(), narrow), dright):
            assert (one - two).abs().max() < 1e-5 * two.abs().max()


def test_sdpa_with_decays_never_holds_the_scores_and_leaves_out_what_is_forgotten() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 3000, 1, 16) for _ in range(3))
    known = {"starts": None, "ends": None, "cu_seqlens": None, "causal": True, "window": 0, "scale": 0.25}
    known |= {"config": {"block": 64}}
    for decay in (-1e-4, -1.0):
        log_decay = torch.full((1, 3000, 1), decay)
        with Largest() as largest:
            y, lse = sdpa.forward(q, k, v, log_decay=log_decay, **known)
            sdpa.backward(
                torch.randn_like(y), None, q, k, v, log_decay=log_decay, y=y, lse=lse, needs=(True,) * 6, **known
            )
        # 3000 rows of k with its two columns; the scores are 50 times as many
        assert largest.numbers <= 3000 * 64
        work = forgetting.Work(q, k, v, log_decay, None, None, None, 0, 0.25, 64)
        work._open()
        keys = [piece.keys.stop - piece.keys.start for s in work._segments() for _, piece, _ in work._pieces(s)]
        assert (max(keys) > 2900) if decay == -1e-4 else (max(keys) < 200)
        assert close(y, naive.forward(q, k, v, log_decay=log_decay, **known)[0], 1e-5)


def test_opcheck_with_decays() -> None:
    q, k, v = (torch.randn(2, n, heads, 4, requires_grad=True) for n, heads in ((3, 4), (9, 2), (9, 2)))
    log_decay = torch.rand(2, 9, 4).neg().requires_grad_()
    for backend in BACKENDS:
        opcheck(OP.forward_overload, (q, k, v, None, None, log_decay, None, True, 4, 0.5, backend))


def test_keys_in_rows_of_their_own_bring_their_decays() -> None:
    """Packed queries that go on with caches [N, S, ...]; decays of another shape are named."""
    q, k, log_decay = torch.randn(1, 3, 4, 8), torch.randn(2, 9, 2, 8), torch.rand(2, 9, 4).neg()
    cu_seqlens = torch.tensor([0, 1, 3])
    for backend in BACKENDS:
        y = attention(q, k, k, log_decay=log_decay, cu_seqlens=cu_seqlens, backend=backend)
        parts = [
            attention(q[:, rows], k[n : n + 1], k[n : n + 1], log_decay=log_decay[n : n + 1], backend=backend)
            for n, rows in enumerate((slice(0, 1), slice(1, 3)))
        ]
        assert close(y, torch.cat(parts, 1), 1e-5)
    with pytest.raises(ValueError, match=r"axes B, S are \[2, 9\] in k but \[1, 9\] in log_decay"):
        attention(q, k, k, log_decay=log_decay[:1], cu_seqlens=cu_seqlens)


def test_the_tuner_takes_the_gradient_of_decays_for_right() -> None:
    """At a layer's size, where the rounding errors of all rows add up beside small sums."""
    sizes = {"B": 1, "T": 229, "H": 8, "K": 64, "S": 229, "G": 8, "V": 64, "N": 1}
    options = {"starts": False, "ends": False, "log_decay": True, "scale": 0.125, "causal": True, "window": 0}
    dtypes = dict.fromkeys(("q", "k", "v", "y"), torch.float32)
    problem = Problem("attention", "backward", torch.device("cpu"), dtypes, sizes, {**options, "packed": False})
    inputs, backend = draw(OP, problem), OP.backend("sdpa")
    expected = Expected.of(inputs)
    for config in backend.configs(problem):
        assert expected.difference(inputs.call(backend, config)()) is None
