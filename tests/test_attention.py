"""Attention: its definition spelled out, torch's own, windows, caches, packing, the kernels' arguments, wrong calls."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.agreement import Expected, Inputs
from kernels.attention import OP, attention, forgetting, fused, naive, sdpa
from kernels.attention.cache import align, append, recent

pytestmark = pytest.mark.usefixtures("nan_filled")

BACKENDS = ("naive", "sdpa")
FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@dataclass
class Case:
    """Tensors and options of one call, and its sequences: (batch row and rows of q, batch row and rows of k)."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]
    sequences: list[tuple[int, range, int, range]] = field(default_factory=list)

    def to(self, dtype: torch.dtype) -> Case:
        return Case(self.q.to(dtype), self.k.to(dtype), self.v.to(dtype), self.options, self.sequences)


@st.composite
def cases(draw: st.DrawFn, *, sighted: bool = False, longest: int = 40) -> Case:
    """Batches and packed sequences, with and without keys of their own; sighted: every query sees a key."""
    G = draw(st.integers(1, 3), label="G")
    H = G * draw(st.integers(1, 3), label="heads per group")
    K, V = draw(st.sampled_from((1, 3, 8, 16))), draw(st.sampled_from((1, 4, 8, 13)))
    T = draw(st.one_of(st.integers(1, 9), st.integers(1, longest)), label="T")
    packed, own = draw(st.booleans(), label="packed"), draw(st.booleans(), label="starts, ends")
    N = draw(st.integers(1, 4), label="N")
    options: dict[str, Any] = {
        "causal": draw(st.booleans(), label="causal"),
        "window": draw(st.sampled_from((None, None, 1, 2, 7, 16, 100)), label="window"),
    }
    if packed:
        borders = [0, *sorted(draw(st.lists(st.integers(0, T), min_size=N - 1, max_size=N - 1), label="borders")), T]
        options["cu_seqlens"] = torch.tensor(borders, dtype=draw(st.sampled_from((torch.int32, torch.int64))))
        queries = [(0, range(*border)) for border in itertools.pairwise(borders)]
    else:
        queries = [(n, range(T)) for n in range(N)]
    S = T + draw(st.integers(0, 20) if sighted else st.integers(1 - T, 20), label="S - T")
    keys = [(n, range(S)) for n in range(N)]
    if packed and not own:
        S, keys = T, queries
    elif own:
        # all in one row, where packed sequences may share keys, or a row each
        rows = [0] * N if packed and draw(st.booleans(), label="in one row") else list(range(N))
        spans = []
        for _, of in queries:
            start = draw(st.integers(0, S - len(of) if sighted else S))
            spans.append(range(start, draw(st.integers(start + (len(of) if sighted else 0), S))))
        options["starts"], options["ends"] = (torch.tensor([getattr(s, x) for s in spans]) for x in ("start", "stop"))
        keys = list(zip(rows, spans))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000), label="seed"))
    batches = 1 + max(n for n, _ in queries), 1 + max(n for n, _ in keys)
    q, k, v = (
        torch.randn(shape, generator=generator, dtype=FLOAT64)
        for shape in ((batches[0], T, H, K), (batches[1], S, G, K), (batches[1], S, G, V))
    )
    return Case(q, k, v, options, [(*of, *to) for of, to in zip(queries, keys)])


def literal(case: Case, scale: float | None = None) -> Tensor:
    """Query by query, over the list of the keys that it sees."""
    y = case.q.new_zeros(*case.q.shape[:3], case.v.shape[3])
    group = case.q.shape[2] // case.k.shape[2]
    window = case.options["window"] or math.inf
    for b, queries, n, keys in case.sequences:
        for i, t in enumerate(queries):
            position = keys.stop - len(queries) + i
            seen = [s for s in keys if abs(s - position) < window and (s <= position or not case.options["causal"])]
            for h in range(case.q.shape[2]) if seen else ():
                scores = case.k[n, seen, h // group] @ case.q[b, t, h] * (scale or case.q.shape[3] ** -0.5)
                y[b, t, h] = scores.softmax(0) @ case.v[n, seen, h // group]
    return y


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


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


class Largest(TorchDispatchMode):
    """The numbers in the largest tensor that anything returned."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


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
    assert largest.numbers >= 2 * 1000 * 1000


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
        ({"backend": "fast"}, ValueError, "no backend 'fast'; there are auto, naive, sdpa"),
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


def test_append_leaves_older_caches_alone() -> None:
    rows = [torch.randn(2, n, 3, 4) for n in (5, 1, 2, 1, 1)]
    with torch.no_grad():
        caches = list(itertools.accumulate(rows, append))
        expected = list(itertools.accumulate(rows, lambda a, b: torch.cat([a, b], 1)))
        other = append(caches[2], -rows[3])
        shorter = append(caches[3][:, :6], -rows[1])
        fewer = append(caches[4][:1], rows[1][:1])
    assert all(torch.equal(found, right) for found, right in zip(caches, expected))
    assert torch.equal(other, torch.cat([expected[2], -rows[3]], 1))
    assert torch.equal(shorter, torch.cat([expected[3][:, :6], -rows[1]], 1))
    assert torch.equal(fewer, torch.cat([expected[4][:1], rows[1][:1]], 1))
    # the longest grew in place, the two that went other ways did not
    assert caches[1].data_ptr() == caches[2].data_ptr() == caches[4].data_ptr()
    assert len({x.data_ptr() for x in (caches[4], other, shorter, fewer)}) == 4


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_append_copies_seldom(mode: Any) -> None:
    with mode():
        cache, places = torch.zeros(3, 0, 2, 4), set()
        for t in range(300):
            cache = recent(append(cache, torch.full((3, 1, 2, 4), float(t))), 20)
            places.add(cache.untyped_storage().data_ptr())
        assert cache[:, :, 0, 0].tolist() == [[float(t) for t in range(280, 300)]] * 3
    assert len(places) < 20


def test_append_keeps_gradients() -> None:
    cache, rows = torch.randn(2, 3, 1, 2, requires_grad=True), torch.randn(2, 1, 1, 2, requires_grad=True)
    weights = torch.randn(2, 4, 1, 2)
    found = torch.autograd.grad((append(cache, rows) * weights).sum(), (cache, rows))
    assert torch.equal(torch.cat(found, 1), weights)


@pytest.mark.parametrize("lengths", [(3, 0, 5, 1), (0, 0), (0, 4)])
def test_align_moves_every_sequence_to_the_end(lengths: tuple[int, ...]) -> None:
    N = len(lengths)
    cache, rows = torch.randn(N, 7, 2, 3, requires_grad=True), torch.randn(1, max(sum(lengths), 1), 2, 3)
    start, end = torch.tensor([2, 0, 4, 1][:N]), torch.tensor([6, 0, 7, 2][:N])
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    (found,), first = align((cache,), start, end, (rows,), cu_seqlens)
    for n, (begin, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        right = torch.cat([cache[n, start[n] : end[n]], rows[0, begin:stop]])
        assert torch.equal(found[n, first[n] :], right)
        assert not found[n, : first[n]].any()
    (gradient,) = torch.autograd.grad(found.sum(), cache)
    assert gradient[0, 2:6].eq(1).all()
    assert gradient.sum() == (end - start).sum() * 6


def test_cached_rows_that_are_not_the_sequences_do_not_count() -> None:
    k, v = torch.randn(2, 12, 2, 4), torch.randn(2, 12, 2, 4)
    q, starts, ends = torch.randn(2, 1, 4, 4), torch.tensor([0, 5]), torch.tensor([7, 12])
    before = attention(q, k, v, starts, ends)
    k[0, 7:], v[0, 7:], k[1, :5], v[1, :5] = 1e4, 1e4, -1e4, -1e4
    assert torch.equal(attention(q, k, v, starts, ends), before)


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


def literal_with_decays(case: Case, log_decay: Tensor) -> Tensor:
    """Query by query and key by key, adding up what lies between."""
    y = case.q.new_zeros(*case.q.shape[:3], case.v.shape[3])
    group, window = case.q.shape[2] // case.k.shape[2], case.options["window"] or math.inf
    for b, queries, n, keys in case.sequences:
        for i, t in enumerate(queries):
            position = keys.stop - len(queries) + i
            seen = [s for s in keys if position - window < s <= position]
            for h in range(case.q.shape[2]) if seen else ():
                scores = case.k[n, seen, h // group] @ case.q[b, t, h] * case.q.shape[3] ** -0.5
                scores = scores + torch.stack([log_decay[n, s + 1 : position + 1, h].sum() for s in seen])
                y[b, t, h] = scores.softmax(0) @ case.v[n, seen, h // group]
    return y


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(longest=20), data=st.data())
def test_scores_fall_with_what_was_forgotten_since(backend: str, case: Case, data: st.DataObject) -> None:
    case.options["causal"] = True
    log_decay = with_decays(data.draw, case)
    y = attention(case.q, case.k, case.v, log_decay=log_decay, backend=backend, **case.options)
    assert close(y, literal_with_decays(case, log_decay))
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
        torch.library.opcheck(OP.forward_overload, (q, k, v, None, None, log_decay, None, True, 4, 0.5, backend))


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
