"""The delta rule and its generalisation: hard decays, published references, packed sequences and wrong calls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.agreement import Expected, Inputs, draw, pose
from kernels.catalogue import OPS
from kernels.delta_rule import decays, delta_rule
from kernels.dplr import dplr

pytestmark = pytest.mark.usefixtures("nan_filled")

CPU = torch.device("cpu")
HARD = torch.tensor([-math.inf, math.log(1e-30), math.log(1e-3), math.log(0.5), 0.0], dtype=torch.float64)
NAMES = ("delta_rule", "dplr")


@st.composite
def hard_problems(draw_: st.DrawFn, name: str, direction: str) -> Inputs:
    """Hard decays and whole betas at random rows, among rows that nothing decays."""
    op = OPS[name]
    length = draw_(st.sampled_from((5, 15, 16, 17, 31, 33, 65, 97)), label="T")
    sizes = {"B": draw_(st.integers(1, 2)), "T": length, "H": 2, "K": draw_(st.sampled_from((3, 8, 16))), "V": 5}
    sizes["J"] = draw_(st.sampled_from((1, sizes["K"])), label="J")
    facts: dict[str, Any] = {"initial_state": draw_(st.booleans(), label="initial_state")}
    if draw_(st.booleans(), label="packed"):
        sizes |= {"B": 1, "N": draw_(st.integers(1, 4), label="N")}
        facts["packed"] = True
    dtype = draw_(st.sampled_from((torch.float32, torch.bfloat16)), label="dtype")
    inputs = draw(op, pose(op, direction, sizes, dtype=dtype, device=CPU, **facts), seed=draw_(st.integers(0, 999)))
    generator = torch.Generator().manual_seed(draw_(st.integers(0, 999), label="where"))
    tensors = dict(zip(op.names(direction), inputs.tensors))

    def at_random_rows(values: Tensor, tensor: Tensor | None, otherwise: Tensor | None) -> Tensor:
        assert tensor is not None
        assert otherwise is not None
        chosen = values[torch.randint(len(values), tensor.shape, generator=generator)].to(tensor.dtype)
        return torch.where(torch.rand(tensor.shape, generator=generator) < 0.3, chosen, otherwise)

    log_decay, beta = tensors["log_decay"], tensors.get("beta")
    assert log_decay is not None
    tensors["log_decay"] = at_random_rows(HARD, log_decay, torch.zeros_like(log_decay))
    if beta is not None:
        tensors["beta"] = at_random_rows(torch.tensor([0.0, 1.0, 2.0]), beta, beta)
    return replace(inputs, tensors=tuple(tensors.values()))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", NAMES)
def test_hard_decays(name: str, direction: str) -> None:
    backend = OPS[name].backend("compiled")

    @settings(max_examples=15)
    @given(inputs=hard_problems(name, direction))
    def agrees(inputs: Inputs) -> None:
        expected = Expected.of(inputs)
        for config in backend.configs(inputs.problem):
            if not config.get("inductor"):
                wrong = expected.difference(inputs.call(backend, config)())
                assert wrong is None, f"{dict(config)}: {wrong} ({inputs.problem})"

    agrees()


@pytest.mark.parametrize("decay", [0.0, -math.inf, -1e30, math.log(1e-30)])
@pytest.mark.parametrize("keys", ["head", "key"])
@pytest.mark.parametrize("name", NAMES)
def test_one_decay_in_every_row(name: str, keys: str, decay: float) -> None:
    """Nothing is nan, and what was forgotten is gone: y is then that of the row alone."""
    sampled: dict[str, Any] = OPS[name].sample(
        {"B": 1, "T": 70, "H": 2, "K": 8, "V": 3, "J": 8 if keys == "key" else 1}
    )
    sampled["log_decay"] = torch.full_like(sampled["log_decay"], decay)
    leaves = [x.requires_grad_() for x in sampled.values()]
    outputs = OPS[name](*leaves, None, 1.0, "compiled")
    gradients = torch.autograd.grad([out.square().sum() for out in outputs], leaves)
    assert all(x.isfinite().all() for x in (*outputs, *gradients))
    if decay == -math.inf and name == "delta_rule":
        q, k, v, beta = (sampled[x].detach() for x in ("q", "k", "v", "beta"))
        alone = (q * k).sum(-1, keepdim=True) * beta[..., None] * v
        torch.testing.assert_close(outputs[0].detach(), alone)


def peers() -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Ours and theirs, both from (q, k, v, beta or (a, b), log_decay, initial_state) in our layout."""
    delta = pytest.importorskip("fla.ops.delta_rule.naive")
    gated = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    kda = pytest.importorskip("fla.ops.kda.naive")
    general = pytest.importorskip("fla.ops.generalized_delta_rule.dplr.naive")
    without_decays = pytest.importorskip("fla.ops.generalized_delta_rule.iplr.naive")

    def heads_first(function: Callable[..., Any], *rows: Tensor, initial: Tensor) -> tuple[Tensor, Tensor]:
        y, final = function(*(x.transpose(1, 2) for x in rows), initial_state=initial)
        return y.transpose(1, 2), final

    def ours(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, initial: Tensor) -> Any:
        return delta_rule(q, k, v, beta, g, initial, backend="compiled")

    def ours_general(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, initial: Tensor) -> Any:
        return dplr(q, k, v, a, b, g, initial, backend="compiled")

    def plain(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: None, initial: Tensor) -> Any:
        return heads_first(delta.delta_rule_recurrence, q, k, v, beta, initial=initial)

    def per_head(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, initial: Tensor) -> Any:
        given = {"initial_state": initial, "output_final_state": True}
        return gated.naive_recurrent_gated_delta_rule(q, k, v, beta, g, **given)

    def per_key(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor, initial: Tensor) -> Any:
        return kda.naive_recurrent_kda(q, k, v, g, beta, initial_state=initial, output_final_state=True)

    def diagonal(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, initial: Tensor) -> Any:
        # their function mixes dtypes unless all are float32, as here
        return heads_first(general.dplr_recurrence, q, k, v, a, b, g, initial=initial)

    def identity(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: None, initial: Tensor) -> Any:
        return heads_first(without_decays.iplr_recurrence, q, k, v, a, b, initial=initial)

    return {
        "delta_rule": (ours, plain),
        "gated_delta_rule": (ours, per_head),
        "kda": (ours, per_key),
        "dplr": (ours_general, diagonal),
        "iplr": (ours_general, identity),
    }


@pytest.mark.parametrize("initial", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("which", ["delta_rule", "gated_delta_rule", "kda", "dplr", "iplr"])
def test_agrees_with_flash_linear_attention(which: str, initial: bool) -> None:
    ours, theirs = peers()[which]
    sizes = {"B": 2, "T": 70, "H": 2, "K": 12, "V": 7, "J": 1 if which == "gated_delta_rule" else 12}
    generator = torch.Generator().manual_seed(5)
    op = OPS["dplr" if which in ("dplr", "iplr") else "delta_rule"]
    sampled: dict[str, Any] = op.sample(sizes, generator=generator)
    if not initial:
        sampled["initial_state"] = torch.zeros_like(sampled["initial_state"])
    if which in ("delta_rule", "iplr"):
        sampled["log_decay"] = None
    elif which == "gated_delta_rule":
        sampled["log_decay"] = sampled["log_decay"][..., 0]
    leaves = [None if x is None else x.requires_grad_() for x in sampled.values()]
    present = [x for x in leaves if x is not None]
    weights: list[Tensor] = []
    found = []
    for function in (ours, theirs):
        y, final = function(*leaves)
        weights = weights or [torch.randn(out.shape, generator=generator) for out in (y, final)]
        loss = (y * weights[0]).sum() + (final * weights[1]).sum()
        found.append([y.detach(), final.detach(), *torch.autograd.grad(loss, present)])
    for got, expected in zip(*found):
        # two float32 computations in different orders, of numbers of one scale
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("backend", ["naive", "compiled"])
def test_a_key_that_is_written_again_replaces_what_it_held(backend: str) -> None:
    k = torch.nn.functional.normalize(torch.randn(1, 1, 1, 4), dim=-1).expand(1, 9, 1, 4).contiguous()
    v, beta = torch.randn(1, 9, 1, 3), torch.ones(1, 9, 1)
    y, final = delta_rule(k, k, v, beta, scale=1.0, backend=backend)
    torch.testing.assert_close(y, v)
    torch.testing.assert_close(final[0, 0], k[0, 0, 0, :, None] * v[0, -1, 0])


@pytest.mark.parametrize(("name", "J"), list(itertools.product(NAMES, (1, 6))))
def test_chunks_of_any_size_give_what_the_loop_gives(name: str, J: int) -> None:
    """Segments made twice by the backward pass give the bits of those that were kept."""
    from kernels.delta_rule import rows

    op = OPS[name]
    problem = pose(op, "backward", {"B": 2, "T": 45, "H": 2, "K": 6, "V": 3, "J": J}, dtype=torch.float64, device=CPU)
    inputs = draw(op, problem)
    expected = inputs.loop()
    for chunk, numbers in itertools.product((2, 4, 8), (1, 400, 1 << 18)):
        config = {"chunk": chunk, "numbers": numbers}
        found = inputs.call(op.backend("compiled"), config)()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rows, "KEPT", 0)
            again = inputs.call(op.backend("compiled"), config)()
        for got, same, right in zip(found, again, expected):
            assert got is not None
            assert same is not None
            assert torch.equal(got, same)
            torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("keys", [None, 1, 3])
def test_products_and_their_gradients(keys: int | None) -> None:
    """The products of a chunk's rows against their sum, and every gradient against autograd's of it."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, y = normal(2, 8, 3).requires_grad_(), normal(2, 8, 3).requires_grad_()
    g = (-normal(2, 8, keys or 1).exp()).requires_grad_()
    for before, diagonal in ((False, 0), (False, -1), (True, -1)):
        rows = []
        for i, j in itertools.product(range(8), range(8)):
            between = g[:, j + 1 : i + (0 if before else 1)].sum(1) if keys else torch.zeros(2, 1, dtype=g.dtype)
            entry = (x[:, i] * y[:, j] * between.exp()).sum(-1)
            rows.append(entry if j <= i + diagonal else 0 * entry)
        expected = torch.stack(rows, -1).view(2, 8, 8)
        with torch.no_grad():
            made = decays.decays(None if keys is None else g, x)
            found = made.products(x, y, before, diagonal)
        torch.testing.assert_close(found, expected)
        weights = normal(2, 8, 8)
        right = torch.autograd.grad((expected * weights).sum(), (x, y, g), allow_unused=True)
        with torch.no_grad():
            dx, dy = torch.ones_like(x), torch.ones_like(y)
            made.products_backward(weights, found, x, y, dx, dy, before, diagonal)
            dg = made.gradient()
        for got, gradient in zip((dx - 1, dy - 1, dg), right):
            assert (got is None) == (keys is None and got is dg)
            if got is not None:
                torch.testing.assert_close(got, gradient)


def test_inverse() -> None:
    below = torch.randn(3, 16, 16, dtype=torch.float64).tril(-1)
    one = torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(decays.inverse(below.clone()) @ (one - below), one.expand(3, 16, 16))


@pytest.mark.parametrize("name", NAMES)
def test_wrong_calls_name_the_op_the_axis_and_both_values(name: str) -> None:
    function: Callable[..., Any] = delta_rule if name == "delta_rule" else dplr
    sampled = OPS[name].sample({"B": 2, "T": 5, "H": 3, "K": 4, "V": 6, "J": 4})

    def call(cu_seqlens: Tensor | None = None, **changed: Any) -> None:
        function(*(sampled | changed).values(), cu_seqlens=cu_seqlens, backend="compiled")

    with pytest.raises(ValueError, match=f"{name}: axis T is 5 in q but 6 in v"):
        call(v=torch.zeros(2, 6, 3, 6))
    with pytest.raises(ValueError, match=f"{name}: axis K is 4 in q but 3 in k"):
        call(k=torch.zeros(2, 5, 3, 3))
    with pytest.raises(ValueError, match=f"{name}: axis K is 4 in q but 2 in log_decay"):
        call(log_decay=torch.zeros(2, 5, 3, 2))
    with pytest.raises(ValueError, match=f"{name}: axis N is 3 in initial_state but the batch B is 2"):
        call(initial_state=torch.zeros(3, 3, 4, 6))
    with pytest.raises(TypeError, match=f"{name}: initial_state is bfloat16 but q is float32"):
        call(initial_state=torch.zeros(2, 3, 4, 6, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=f"{name}: axis B is 2, but packed sequences"):
        call(cu_seqlens=torch.tensor([0, 5]), initial_state=None)


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_on_a_gpu_are_refused_with_the_reason(name: str) -> None:
    sizes = {"B": 1, "T": 9, "H": 1, "K": 4, "V": 4, "J": 1, "N": 2}
    problem = pose(OPS[name], "forward", sizes, dtype=torch.float32, device=torch.device("cuda"), packed=True)
    (reason,) = OPS[name].backend("compiled").cannot(problem)
    assert "cu_seqlens" in reason
