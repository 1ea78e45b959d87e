"""Gated linear attention: hard decays, borders of chunks, published references, packed sequences and wrong calls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.agreement import Expected, Inputs, draw, pose
from kernels.gla import OP, gla
from kernels.gla.transposed import gla_transposed
from kernels.op import Backend
from kernels.problem import Problem

pytestmark = pytest.mark.usefixtures("nan_filled")

CPU = torch.device("cpu")
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
HARD = torch.tensor([-math.inf, math.log(1e-30), math.log(1e-3), math.log(0.5), 0.0], dtype=torch.float64)
BACKENDS = OP.backend("compiled"), OP.backend("native")
# Small chunks of the first, and a few of them at a time
SMALL = {"chunk": 4, "rows": 16}


def posed(
    direction: str, length: int, keys: int = 5, *, dtype: torch.dtype = FLOAT32, batch: int = 2, hard: float = 0.0,
    bounds: list[int] | None = None, **facts: Any,
) -> Inputs:  # fmt: skip
    """A problem with its tensors. keys: decays a head. hard: how many of them are from HARD. bounds: of sequences."""
    sizes = {"B": batch, "T": length, "H": 2, "K": 5, "V": 3, "J": keys}
    if bounds is not None:
        sizes |= {"B": 1, "N": len(bounds) - 1}
        facts["packed"] = True
    inputs = draw(OP, pose(OP, direction, sizes, dtype=dtype, device=CPU, **facts), seed=length)
    tensors = dict(zip(OP.names(direction), inputs.tensors))
    if hard:
        mild, generator = tensors["log_decay"], torch.Generator().manual_seed(length)
        assert mild is not None
        chosen = HARD[torch.randint(len(HARD), mild.shape, generator=generator)].to(mild.dtype)
        tensors["log_decay"] = torch.where(torch.rand(mild.shape, generator=generator) < hard, chosen, mild)
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    return replace(inputs, tensors=tuple(tensors.values()), cu_seqlens=cu_seqlens)


def able(problem: Problem, *configs: Mapping[str, int]) -> list[tuple[Backend, Mapping[str, int]]]:
    """Backends with their configs, of the first only those that are given."""
    known = [(BACKENDS[0], config) for config in configs or BACKENDS[0].configs(problem)]
    others = [backend for backend in BACKENDS[1:] if not backend.cannot(problem)]
    return known + [(backend, config) for backend in others for config in backend.configs(problem)]


def agrees(inputs: Inputs, *configs: Mapping[str, int]) -> None:
    expected = Expected.of(inputs)
    for backend, config in able(inputs.problem, *configs):
        wrong = expected.difference(inputs.call(backend, config)())
        assert wrong is None, f"{backend.name} {dict(config)}: {wrong} ({inputs.problem})"


@pytest.mark.parametrize("hard", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("keys", [1, 5])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_hard_decays(direction: str, dtype: torch.dtype, keys: int, hard: float) -> None:
    """Of 1 in `hard`, mixed with those that a layer makes; the bonus leaves a row's own decay out."""
    agrees(posed(direction, 83, keys, dtype=dtype, batch=1, hard=hard, bonus=hard == 0.5))


def by_cumulative_product(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float) -> Tensor:
    """y with (q ∘ P) (k / P)ᵀ, P the product of the decays up to a row."""
    P = log_decay.exp().cumprod(1)
    A = torch.einsum("bihk,bjhk->bhij", q * P, k / P).tril()
    return scale * torch.einsum("bhij,bjhv->bihv", A, v)


def by_cumulative_sum(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float) -> Tensor:
    """y with exp(g[i] - g[j]), g the sum of the logarithms up to a row."""
    g = log_decay.cumsum(1)
    later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()[..., None, None]
    D = (g[:, :, None] - g[:, None]).masked_fill(~later, -math.inf).exp()
    return scale * torch.einsum("bihk,bjhk,bijhk,bjhv->bihv", q, k, D.expand(*D.shape[:4], q.shape[3]), v)


@pytest.mark.parametrize("form", [by_cumulative_product, by_cumulative_sum])
@pytest.mark.parametrize("keys", [1, 5])
def test_forms_with_a_division_or_a_difference_fail_where_decays_are_hard(form: Any, keys: int) -> None:
    for hard in (0.0, 0.5):
        inputs = posed("forward", 20, keys, initial_state=False, hard=hard)
        q, k, v, log_decay, *_ = inputs.tensors
        final = inputs.loop()[1]
        wrong = Expected.of(inputs).difference((form(q, k, v, log_decay, inputs.problem.options["scale"]), final))
        assert (wrong is not None) == (hard > 0), wrong


@pytest.mark.parametrize("keys", [1, 5])
def test_gradients_of_decays_that_let_nothing_through_are_exactly_zero(keys: int) -> None:
    """Exactly: there is no difference of which rounding could be left."""
    inputs = posed("backward", 40, keys, hard=0.3)
    tensors = dict(zip(OP.names("backward"), inputs.tensors))
    for backend, config in able(inputs.problem):
        dlog_decay, log_decay = inputs.call(backend, config)()[3], tensors["log_decay"]
        assert dlog_decay is not None
        assert log_decay is not None
        assert bool((dlog_decay[log_decay == -math.inf] == 0).all())
        assert bool(dlog_decay.isfinite().all())


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("length", [2, 3, 4, 5, 8, 13, 16, 17])
def test_borders_of_chunks(length: int, direction: str) -> None:
    for keys in (1, 5):
        agrees(posed(direction, length, keys, bonus=keys == 1), SMALL, {"chunk": 4, "rows": 0})
    agrees(posed(direction, length, log_decay=False), SMALL)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("bounds", [[0, 0, 9, 9, 10, 14, 14], [0, *range(15)], [0, 14], [0, 3, 14, 14, 14]])
def test_packed_sequences(bounds: list[int], direction: str) -> None:
    """Empty ones at either end and in the middle, sequences of one row, chunks that end with a sequence."""
    for keys in (1, 5):
        agrees(posed(direction, 14, keys, bounds=bounds), SMALL, {"chunk": 4, "rows": 0})


@pytest.mark.parametrize("missing", ["dy", "dfinal_state"])
@pytest.mark.parametrize("bounds", [None, [0, 5, 5, 11]])
def test_a_loss_on_one_output(bounds: list[int] | None, missing: str) -> None:
    inputs = posed("backward", 11, bounds=bounds)
    tensors = dict(zip(OP.names("backward"), inputs.tensors))
    agrees(replace(inputs, tensors=tuple((tensors | {missing: None}).values())), SMALL)


def test_inputs_are_left_alone_and_outputs_are_contiguous() -> None:
    for direction in ("forward", "backward"):
        inputs = posed(direction, 11, bonus=True)
        before = [None if t is None else t.clone() for t in inputs.tensors]
        for backend, config in able(inputs.problem, SMALL):
            for result in inputs.call(backend, config)():
                assert result is not None
                assert result.is_contiguous()
        for tensor, copy in zip(inputs.tensors, before):
            assert (tensor is None) == (copy is None)
            if tensor is not None and copy is not None:
                assert torch.equal(tensor, copy)


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("backend", ["naive", "compiled", "native"])
def test_flash_linear_attentions_loops(backend: str) -> None:
    """A decay per key, per head and none, each from a state."""
    gla_loop = pytest.importorskip("fla.ops.gla.naive").naive_recurrent_gla
    simple_loop = pytest.importorskip("fla.ops.simple_gla.naive").naive_recurrent_simple_gla
    linear_loop = pytest.importorskip("fla.ops.linear_attn.naive").naive_recurrent_linear_attn
    q, k, v, state = rows(2, 70, 3, 8), rows(2, 70, 3, 8), rows(2, 70, 3, 6), rows(2, 3, 8, 6)
    per_key = torch.nn.functional.logsigmoid(rows(2, 70, 3, 8))
    theirs = {
        "per key": gla_loop(q, k, v, per_key, state, True),
        "per head": simple_loop(q, k, v, per_key[..., 0], initial_state=state, output_final_state=True),
        "none": linear_loop(q, k, v, initial_state=state, output_final_state=True),
    }
    for name, decay in (("per key", per_key), ("per head", per_key[..., 0]), ("none", None)):
        ours = gla(q, k, v, decay, state, backend=backend)
        for mine, their in zip(ours, theirs[name]):
            torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("backend", ["naive", "compiled", "native"])
def test_flash_linear_attentions_loop_of_rwkv6(backend: str) -> None:
    loop = pytest.importorskip("fla.ops.rwkv6.recurrent_naive").naive_recurrent_rwkv6
    q, k, v, state, u = rows(2, 37, 3, 8), rows(2, 37, 3, 8), rows(2, 37, 3, 6), rows(2, 3, 8, 6), rows(3, 8)
    log_decay = torch.nn.functional.logsigmoid(rows(2, 37, 3, 8))
    heads_first = [x.transpose(1, 2) for x in (q, k, v, log_decay)]
    o, final = loop(*heads_first, u, initial_state=state, output_final_state=True)
    y, final_state = gla(q, k, v, log_decay, state, bonus=u, backend=backend)
    torch.testing.assert_close(y, o.transpose(1, 2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final_state, final, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bounds", [None, [0, 0, 30, 67, 70, 70]], ids=["batch", "packed"])
@pytest.mark.parametrize("backend", ["naive", "compiled", "native"])
def test_read_along_the_values(backend: str, bounds: list[int] | None) -> None:
    """By definition every key is the value of a head of its own, with this key's decay."""
    inputs = posed("forward", 70, hard=0.3, bounds=bounds, dtype=torch.float64)
    _, k, v, log_decay, state = tensors = [t.requires_grad_() for t in inputs.tensors[:5] if t is not None]
    cu_seqlens, q = inputs.cu_seqlens, torch.randn_like(v, requires_grad=True)
    many, values = ([t.repeat_interleave(k.shape[3], 2) for t in (q, v)], [t.flatten(2) for t in (k, log_decay)])
    y, final_state = gla(
        *many, values[0][..., None], values[1], state.flatten(1, 2)[..., None],
        scale=1.0, cu_seqlens=cu_seqlens, backend="naive",
    )  # fmt: skip
    expected = y.view_as(k), final_state.view_as(state)
    found = gla_transposed(q, k, v, log_decay, state, cu_seqlens=cu_seqlens, backend=backend)
    tensors[0] = q
    weights = [torch.randn_like(t) for t in expected]
    for some in (slice(0, 2), slice(0, 1), slice(1, 2)):
        gradients = [
            torch.autograd.grad(out[some], tensors, weights[some], retain_graph=True, materialize_grads=True)
            for out in (found, expected)
        ]
        for one, other in zip((*found, *gradients[0]), (*expected, *gradients[1])):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_reading_along_the_values_has_second_gradients_flops_and_an_operator() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    drawn = posed("forward", 4, dtype=torch.float64, bounds=[0, 3, 4])
    q, k, v, log_decay, state = (t.requires_grad_() for t in drawn.tensors[:5] if t is not None)
    given = v.detach().clone().requires_grad_(), k, v, log_decay, state

    def call(*args: Tensor) -> tuple[Tensor, Tensor]:
        return gla_transposed(*args, cu_seqlens=drawn.cu_seqlens)

    assert torch.autograd.gradgradcheck(call, given)
    torch.library.opcheck(torch.ops.sequence_mixers.gla_transposed.default, (*given, drawn.cu_seqlens, "naive"))
    with FlopCounterMode(display=False) as counter:
        call(*given)
    assert counter.get_total_flops() > 0
    with pytest.raises(ValueError, match=r"gla_transposed: q is \[1, 4, 2, 5\] .* but v is \[1, 4, 2, 3\]"):
        call(q, *given[1:])


def test_wrong_calls_name_op_axis_and_both_values() -> None:
    q, v = rows(2, 5, 3, 8), rows(2, 5, 3, 6)
    with pytest.raises(ValueError, match="gla: axis K is 8 in q but 7 in log_decay"):
        gla(q, q, v, -rows(2, 5, 3, 7).abs())
    with pytest.raises(ValueError, match="gla: axis T is 5 in q but 4 in log_decay"):
        gla(q, q, v, -rows(2, 4, 3, 8).abs())
    with pytest.raises(ValueError, match="gla: axis K is 8 in q but 6 in k"):
        gla(q, rows(2, 5, 3, 6), v)
    with pytest.raises(ValueError, match="gla: axis N is 3 in initial_state but the batch B is 2"):
        gla(q, q, v, None, rows(3, 3, 8, 6))
    with pytest.raises(TypeError, match="gla: log_decay is bfloat16 but q is bfloat16, so log_decay must be float32"):
        gla(q.bfloat16(), q.bfloat16(), v.bfloat16(), -rows(2, 5, 3).abs().bfloat16())
    with pytest.raises(ValueError, match="gla: axis B is 2, but packed sequences"):
        gla(q, q, v, cu_seqlens=torch.tensor([0, 2, 5]))
