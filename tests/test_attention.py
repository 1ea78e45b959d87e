"""Attention: its definition spelled out, torch's own, windows, packing, the kernels' arguments, wrong calls."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import BACKENDS, BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Case, Largest, cases, close, literal
from hypothesis import given
from torch import Tensor

from kernels.agreement import Expected, Inputs
from kernels.attention import OP, attention, fused, naive, sdpa

pytestmark = pytest.mark.usefixtures("nan_filled")


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(longest=20))
def test_every_query_sees_the_keys_that_the_definition_says(backend: str, case: Case) -> None:
    y = attention(case.q, case.k, case.v, backend=backend, **case.options)
    assert close(y, literal(case))
    assert y.is_contiguous()


@given(case=cases())
def test_gradients_of_queries_that_see_nothing_are_zero_and_backends_agree(case: Case) -> None:
    found = []
    for backend in BACKENDS:
        tensors = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
        y = attention(*tensors, backend=backend, **case.options)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        found.append([y, *torch.autograd.grad(y, tensors, weights)])
    for one, two in zip(*found):
        assert one.isfinite().all()
        assert close(one, two, 1e-10)


@pytest.mark.parametrize("dtype", [FLOAT64, FLOAT32, FLOAT16, BFLOAT16])
@given(case=cases(sighted=True, longest=70))
def test_sdpa_is_as_near_to_float64_as_the_formula(dtype: torch.dtype, case: Case) -> None:
    case = case.to(dtype)
    with torch.no_grad():
        recorded = operands(case)
    for direction in ("forward", "backward"):
        args = recorded
        if direction == "backward":
            y, lse = OP(*recorded[:-1], "naive")
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            args = (dy, None, *recorded[:6], y, lse, *recorded[6:-1], 39, "auto")
        problem, count = OP.problem_of(direction, args), len(OP.names(direction))
        inputs = Inputs(OP, problem, tuple(args[:count]), args[count])
        expected = Expected.of(inputs)
        for config in sdpa.configs(problem):
            wrong = expected.difference(inputs.call(OP.backend("sdpa"), config)())
            assert wrong is None, f"{wrong} ({problem})"


def test_gradients_of_shared_keys_are_added_up_in_float32() -> None:
    """600 sequences of a query each see one key: in bfloat16, 256 + 1 is 256."""
    q, k, v = (torch.ones(1, rows, 1, 8, dtype=BFLOAT16, requires_grad=True) for rows in (600, 1, 1))
    spans = torch.zeros(600, dtype=torch.int64), torch.ones(600, dtype=torch.int64)
    y = attention(q, k, v, *spans, cu_seqlens=torch.arange(601), backend="sdpa")
    (dv,) = torch.autograd.grad(y.sum(), v)
    assert dv.eq(600).all()


def operands(case: Case) -> tuple[Any, ...]:
    """What the public function hands to the op."""
    caught: list[tuple[Any, ...]] = []

    class Catch:
        def __call__(self, *args: Any) -> tuple[Tensor]:
            caught.append(args)
            return (args[0],)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.attention.OP", Catch())
        attention(case.q, case.k, case.v, **case.options)
    return caught[0]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_torch(backend: str, causal: bool) -> None:
    q, k, v = (torch.randn(2, 67, heads, 16, requires_grad=True) for heads in (6, 3, 3))
    y = attention(q, k, v, causal=causal, scale=0.3, backend=backend)
    theirs = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    assert close(y, theirs, 1e-5)
    weights = torch.randn_like(y)
    for ours, other in zip(torch.autograd.grad(y, (q, k, v), weights), torch.autograd.grad(theirs, (q, k, v), weights)):
        assert close(ours, other, 1e-4)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("backend", BACKENDS)
def test_agrees_with_flash_linear_attention(backend: str, window: int | None) -> None:
    theirs = pytest.importorskip("fla.ops.attn.naive").naive_parallel_attn
    q, k, v = (torch.randn(2, 67, heads, 16) for heads in (6, 3, 3))
    expected = theirs(q, k, v, scale=0.3, window_size=window)[0]
    assert close(attention(q, k, v, scale=0.3, window=window, backend=backend), expected, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False, "scale": 0.7},
        {"window": 2},
        {"causal": False, "window": 2},
        {"starts": torch.tensor([1, 0]), "ends": torch.tensor([5, 4])},
        {"cu_seqlens": torch.tensor([0, 1, 1, 3])},
        {"cu_seqlens": torch.tensor([0, 1, 3]), "starts": torch.tensor([0, 2]), "ends": torch.tensor([3, 5])},
    ],
)
def test_first_and_second_gradients(backend: str, options: dict[str, Any]) -> None:
    packed = "cu_seqlens" in options
    batch, rows = 1 if packed else 2, 3 if packed and "starts" not in options else 5
    shapes = ((batch, 3, 4, 2), (batch, rows, 2, 2), (batch, rows, 2, 1))
    tensors = [torch.randn(shape, dtype=FLOAT64, requires_grad=True) for shape in shapes]

    def call(*tensors: Tensor) -> Tensor:
        return attention(*tensors, backend=backend, **options)

    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


def test_the_formula_in_blocks_of_queries_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, 19, 2, 4, dtype=FLOAT64, requires_grad=True) for _ in range(3))
    found = []
    for scores in (naive.MAX_SCORES, 2 * 2 * 19 * 3):
        monkeypatch.setattr(naive, "MAX_SCORES", scores)
        y = attention(q, k, v, window=5, backend="naive")
        found.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v))])
    assert all(close(one, two) for one, two in zip(*found))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str) -> None:
    q = torch.randn(8, 9, 2, 4).permute(2, 1, 3, 0)
    k, v = torch.randn(2, 9, 2, 16)[..., ::2], torch.randn(2, 1, 1, 8).expand(2, 9, 2, 8)
    tensors = [x.detach().requires_grad_() for x in (q, k, v)]
    plain = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in tensors]
    results = []
    for inputs in (tensors, plain):
        y = attention(*inputs, backend=backend)
        # the gradient of a sum is one number, expanded
        results.append([y, *torch.autograd.grad(y.sum(), inputs)])
    assert all(close(one, two, 1e-5) for one, two in zip(*results))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False},
        {"window": 100},
        {"keys": 1300},
        {"cu_seqlens": torch.tensor([0, 300, 1000])},
        {"starts": torch.tensor([3])},
    ],
)
def test_sdpa_never_holds_the_scores(options: dict[str, Any]) -> None:
    q, k, v = (torch.randn(1, rows, 2, 16) for rows in (1000, options.get("keys", 1000), options.get("keys", 1000)))
    known = {"starts": None, "ends": None, "log_decay": None, "cu_seqlens": None, "causal": True, "window": 0} | options
    known.pop("keys", None)
    known |= {"scale": 0.25, "config": {"block": 64}}
    with Largest() as largest:
        y, lse = sdpa.forward(q, k, v, **known)
        sdpa.backward(torch.randn_like(y), None, q, k, v, y=y, lse=lse, needs=(True,) * 6, **known)
    # a seventh of the 1000 x 1000 scores of one head
    assert largest.numbers <= 4 * k.numel() < 170_000
    with Largest() as largest:
        naive.forward(q, k, v, **known)
    longest = 700 if "cu_seqlens" in options else 1000
    assert largest.numbers >= 2 * longest * longest


def test_pieces_do_no_more_than_they_must() -> None:
    one = slice(0, 1)
    assert [tuple(p) for p in sdpa.pieces(1, 50, True, 0, 64)] == [(one, slice(0, 50), "full", False)]
    assert [tuple(p) for p in sdpa.pieces(1, 50, True, 8, 64)] == [(one, slice(42, 50), "full", False)]
    whole = slice(0, 50)
    assert [tuple(p) for p in sdpa.pieces(50, 50, True, 50, 64)] == [(whole, whole, "causal", False)]
    assert [p.kind for p in sdpa.pieces(50, 70, True, 0, 64)] == ["full", "causal"]
    band = sdpa.pieces(4096, 4096, True, 64, 32)
    pairs = sum((p.queries.stop - p.queries.start) * (p.keys.stop - p.keys.start) for p in band)
    assert pairs < 4096 * (64 + 32)


def test_flops_are_those_of_the_visible_pairs() -> None:
    for T, S, causal, window in itertools.product((1, 4, 9), (9, 13), (True, False), (0, 1, 3, 20)):
        args = (torch.empty(2, T, 4, 5), torch.empty(2, S, 2, 5), torch.empty(2, S, 2, 7), None, None, None, None)
        problem = OP.problem_of("forward", (*args, causal, window, 1.0, "auto"))
        seen = [
            (t, s)
            for t, s in itertools.product(range(T), range(S))
            if (s <= S - T + t or not causal) and abs(S - T + t - s) < (window or math.inf)
        ]
        flops = OP.cost(problem).flops
        if causal:
            assert flops == 2 * 2 * 4 * len(seen) * (5 + 7)
        else:
            # an upper bound: windows at the ends of the sequence are not cut off
            assert flops >= 2 * 2 * 4 * len(seen) * (5 + 7)


class Emulated:
    """The CUDA kernels as torch has them: heads second to last, lse padded to 32 rows, one key head a query."""

    def __init__(self) -> None:
        self._efficient_attention_forward = SimpleNamespace(default=self.forward)
        self._efficient_attention_backward = SimpleNamespace(default=self.backward)

    def scores(self, q: Tensor, k: Tensor, bias: Tensor | None, kind: int, scale: float) -> Tensor:
        assert q.shape[2:] == k.shape[2:]
        assert not any(stride % 8 for x in (q, k) for stride in (*x.stride()[:3], x.storage_offset()))
        scores = scale * torch.einsum("bthw,bshw->bhts", q, k)
        if bias is not None:
            assert bias.shape == scores.shape
            assert bias.dtype == q.dtype
            assert bias.stride(3) == 1
            assert not any(stride % 16 for stride in bias.stride()[:3])
            scores = scores + bias
        return scores + torch.full_like(scores[0, 0], -torch.inf).triu(1) if kind else scores

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, cu_q: None, cu_k: None, max_q: None, max_k: None,
        dropout: float, kind: int, with_lse: bool, *, scale: float,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert dropout == 0
        assert with_lse
        scores = self.scores(q, k, bias, kind, scale)
        y = torch.einsum("bhts,bshw->bthw", scores.softmax(-1), v)
        return y, F.pad(scores.logsumexp(-1), (0, -q.shape[1] % 32), value=math.inf), None, None, 0, 0

    def backward(
        self, dy: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, y: Tensor, cu_q: None, cu_k: None,
        max_q: int, max_k: int, lse: Tensor, dropout: float, seed: Tensor, offset: Tensor, kind: int, with_bias: bool,
        *, scale: float, num_splits_key: int,
    ) -> tuple[Any, ...]:  # fmt: skip
        assert (max_q, max_k, dropout, with_bias, num_splits_key) == (q.shape[1], k.shape[1], 0, False, 1)
        assert lse.shape[2] % 32 == 0
        assert lse[..., q.shape[1] :].isposinf().all()
        p = (self.scores(q, k, bias, kind, scale) - lse[..., : q.shape[1], None]).exp()
        dp = torch.einsum("bthw,bshw->bhts", dy, v)
        ds = p * (dp - (y * dy).sum(-1).transpose(1, 2)[..., None])
        dq, dk = torch.einsum("bhts,bshw->bthw", ds, k), torch.einsum("bhts,bthw->bshw", ds, q)
        return scale * dq, scale * dk, torch.einsum("bhts,bthw->bshw", p, dy), None


def test_cuda_kernels_are_handed_what_they_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_on_cpu", lambda x: False)
    monkeypatch.setattr(fused, "_aten", Emulated())
    monkeypatch.setattr(fused, "width", lambda numbers, device: -(-numbers // 8) * 8)
    calls: list[dict[str, Any]] = [
        {},
        {"causal": False},
        {"window": 5},
        {"rows": 50},
        {"cu_seqlens": torch.tensor([0, 13, 13, 37]), "batch": 1},
        {"rows": 40, "queries": 3, "starts": torch.tensor([3, 9])},
        {"rows": 40, "starts": torch.tensor([0, 3])},
    ]
    calls += [{**options, "decay": True} for options in calls if options.get("causal", True)]
    for options in calls:
        T, B = options.pop("queries", 37), options.pop("batch", 2)
        S, decays = options.pop("rows", T), options.pop("decay", False)
        found = []
        for backend in BACKENDS:
            generator = torch.Generator().manual_seed(0)
            q, k, v = (
                torch.randn(shape, generator=generator, dtype=FLOAT64)[..., 1:].requires_grad_()
                for shape in ((B, T, 4, 12), (B, S, 2, 12), (B, S, 2, 7))
            )
            log_decay = torch.randn(B, S, 4, generator=generator, dtype=FLOAT64).sub(2).exp().neg().requires_grad_()
            given = (q, k, v, *([log_decay] if decays else []))
            y = attention(q, k, v, log_decay=log_decay if decays else None, backend=backend, **options)
            found.append([y, *torch.autograd.grad(y.square().sum(), given)])
        assert all(close(one, two, 1e-10) for one, two in zip(*found)), options


def test_the_forward_call_fits_the_schema_of_the_cuda_kernels() -> None:
    q, k = torch.empty(2, 7, 4, 16, device="meta"), torch.empty(2, 9, 2, 16, device="meta")
    y, lse = fused.forward(q, k, k, torch.empty(2, 1, 7, 9, device="meta"), False, 0.5)
    assert (y.shape, lse.shape) == ((2, 7, 4, 16), (2, 7, 4))


def test_compiled_as_one_graph_for_all_lengths() -> None:
    graphs = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (33, 50, 71):
        sizes = (rows, 4), (rows + 9, 2), (rows + 9, 2)
        q, k, v = (torch.randn(2, n, heads, 8, requires_grad=True) for n, heads in sizes)
        starts = torch.tensor([2, 9])
        found = [f(q, k, v, starts, window=20) for f in (graphs, attention)]
        assert torch.equal(*found)
        gradients = [torch.autograd.grad(y.square().sum(), (q, k, v)) for y in found]
        assert all(torch.equal(one, two) for one, two in zip(*gradients))


def test_opcheck_with_keys_of_their_own() -> None:
    q, k, v = (torch.randn(2, n, heads, 4, requires_grad=True) for n, heads in ((3, 4), (9, 2), (9, 2)))
    args = (q, k, v, torch.tensor([1, 0]), torch.tensor([9, 8]), None, None, True, 4, 0.5)
    for backend in BACKENDS:
        torch.library.opcheck(OP.forward_overload, (*args, backend))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": torch.ones(2, 5, 3, 4)}, ValueError, "axis H is 4 in q, no multiple of the 3 heads"),
        ({"k": torch.ones(2, 5, 2, 3)}, ValueError, "axis K is 4 in q but 3 in k"),
        ({"v": torch.ones(2, 6, 2, 4)}, ValueError, "axis S is 5 in k but 6 in v"),
        ({"k": torch.ones(2, 5, 2, 4, dtype=FLOAT64)}, TypeError, "k is float64 but q is float32"),
        ({"k": torch.ones(5, 2, 4)}, ValueError, "k has 3 axes"),
        ({"window": 0}, ValueError, "window is 0, expected at least 1"),
        ({"starts": torch.tensor([0.0, 1.0])}, TypeError, "starts is float32 .* so starts must be int64"),
        ({"starts": torch.tensor([0, 1, 2])}, ValueError, "axis N is 3 in starts but the batch B is 2"),
        ({"starts": torch.tensor([0, 6])}, ValueError, "sequence 1 has its keys in rows 6 to 5"),
        ({"ends": torch.tensor([5, 7])}, ValueError, "sequence 1 has its keys in rows 0 to 7, but axis S"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "axis B is 2 in k, expected 1 or the number of packed"),
        ({"log_decay": torch.ones(2, 5, 2)}, ValueError, "axis H is 4 in q but 2 in log_decay"),
        ({"log_decay": torch.ones(2, 4, 4)}, ValueError, "axis S is 5 in k but 4 in log_decay"),
        ({"log_decay": torch.ones(2, 5, 4, dtype=FLOAT64)}, TypeError, "log_decay is float64 .* must be float32"),
        ({"log_decay": torch.ones(2, 5, 4), "causal": False}, ValueError, "log_decay needs causal=True"),
        ({"backend": "fast"}, ValueError, "no backend 'fast'; there are auto, naive, flex, sdpa"),
    ],
)
def test_wrong_calls(options: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"q": torch.ones(2, 5, 4, 4), "k": torch.ones(2, 5, 2, 4), "v": torch.ones(2, 5, 2, 4)}
    for backend in BACKENDS:
        with pytest.raises(error, match=message):
            attention(**{"backend": backend, **good, **options})


def test_packed_queries_need_to_know_their_keys() -> None:
    q, k = torch.ones(1, 5, 2, 4), torch.ones(1, 9, 2, 4)
    with pytest.raises(ValueError, match="axis S is 9 in k but axis T is 5 in q; give starts and ends"):
        attention(q, k, k, cu_seqlens=torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match="cu_seqlens goes from 0 to 4"):
        attention(q, k[:, :5], k[:, :5], cu_seqlens=torch.tensor([0, 2, 4]))
