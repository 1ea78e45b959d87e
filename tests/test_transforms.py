"""Ops under torch.func's transforms and with dual tensors are what autograd makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import mixers
from kernels.catalogue import OPS
from kernels.gla.transposed import gla_transposed
from kernels.op import Op, recording
from kernels.scan import scan

pytestmark = pytest.mark.usefixtures("nan_filled")

SIZES = {"B": 2, "N": 2, "T": 4, "S": 4, "H": 2, "G": 1, "K": 2, "V": 3, "D": 3, "W": 3, "J": 2}
EXAMPLES = 3


class Case:
    """A function of those of an op's tensors that have a gradient, and values for them."""

    def __init__(self, op: Op, *, packed: bool = False, backend: str = "auto", seed: int = 0) -> None:
        self.op, self.backend = op, backend
        sizes = SIZES | ({"B": 1, "N": 3} if packed else {})
        self.cu_seqlens = torch.tensor([0, 3, 3, 4]) if packed else None
        self.given = op.sample(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        self.args = [arg for arg in op.inputs if self.given[arg.name] is not None and arg.role != "index"]
        self.values = tuple(self.given[arg.name] for arg in self.args)

    def outputs(self, *values: Tensor) -> tuple[Tensor, ...]:
        tensors = self.given | dict(zip((arg.name for arg in self.args), values))
        args = [tensors[arg.name] for arg in self.op.inputs]
        found = self.op(*args, self.cu_seqlens, *self.op.options.values(), self.backend)
        return tuple(out for out, arg in zip(found, self.op.outputs) if arg.differentiable)

    def loss(self, *values: Tensor) -> Tensor:
        return torch.stack([out.sin().sum() for out in self.outputs(*values)]).sum()

    def gradients(self, *values: Tensor, directions: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
        """autograd's; with directions, of the gradients times these."""
        leaves = [t.detach().clone().requires_grad_() for t in values]
        found = torch.autograd.grad(self.loss(*leaves), leaves, create_graph=directions is not None)
        if directions is None:
            return found
        return torch.autograd.grad([(g * d).sum() for g, d in zip(found, directions)], leaves, materialize_grads=True)


def directions(case: Case) -> tuple[Tensor, ...]:
    return tuple(t.cos() for t in case.values)


def product(gradients: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    return torch.stack([(g * t).sum() for g, t in zip(gradients, tangents)]).sum()


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_first_and_second_derivatives(name: str, packed: bool) -> None:
    case = Case(OPS[name], packed=packed)
    every, along = tuple(range(len(case.args))), directions(case)
    gradients = case.gradients(*case.values)
    close(grad(case.loss, every)(*case.values), gradients)
    # where the transform has ended, too
    _, pull = vjp(case.loss, *case.values)
    close(pull(torch.ones((), dtype=torch.float64)), gradients)
    close(jvp(case.loss, case.values, along)[1], product(gradients, along))

    seconds = case.gradients(*case.values, directions=along)
    gradient = grad(case.loss, every)
    # forward over reverse, reverse over reverse, and autograd over torch.func
    close(jvp(gradient, case.values, along)[1], seconds)
    close(grad(lambda *values: product(gradient(*values), along), every)(*case.values), seconds)
    leaves = [t.clone().requires_grad_() for t in case.values]
    close(torch.autograd.grad(product(gradient(*leaves), along), leaves, materialize_grads=True), seconds)


@pytest.mark.parametrize("name", OPS)
def test_mapped_over_any_of_the_tensors(name: str) -> None:
    """Over all, over those of the batch alone, and over each of the others."""
    op = OPS[name]
    cases = [Case(op, seed=seed) for seed in range(EXAMPLES)]
    many = [torch.stack(values, 1) for values in zip(*(case.values for case in cases))]
    shared = [arg.letters[0] not in ("B", "N") for arg in cases[0].args]
    every = tuple(range(len(shared)))
    choices = [(True,) * len(shared), tuple(not s for s in shared)]
    choices += [tuple(i == n for i in every) for n, s in enumerate(shared) if s]
    for mapped in choices:
        given = [stack if m else stack[:, 0] for stack, m in zip(many, mapped)]
        where = tuple(1 if m else None for m in mapped)
        each = [[t[:, n] if m else t for t, m in zip(given, mapped)] for n in range(EXAMPLES)]
        outputs = zip(*(cases[0].outputs(*values) for values in each))
        close(vmap(cases[0].outputs, where)(*given), tuple(map(torch.stack, outputs)))
        gradients = zip(*(cases[0].gradients(*values) for values in each))
        close(vmap(grad(cases[0].loss, every), where)(*given), tuple(map(torch.stack, gradients)))


def test_packed_sequences_are_mapped_one_by_one() -> None:
    case = Case(OPS["scan"], packed=True)
    factors = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    found = vmap(lambda factor: case.outputs(case.values[0], factor * case.values[1], case.values[2]))(factors)
    expected = [case.outputs(case.values[0], factor * case.values[1], case.values[2]) for factor in factors]
    close(found, tuple(map(torch.stack, zip(*expected))))


def test_examples_join_the_batch() -> None:
    """One problem forward and one backward for all of them, on a backend that is not the loop."""
    case = Case(OPS["scan"], backend="compiled")
    many = [torch.stack([t, t / 2]) for t in case.values]
    with recording() as met:
        vmap(grad(case.loss, (0, 1, 2)))(*many)
    assert sorted((problem.direction, problem.sizes["B"]) for problem in met) == [("backward", 4), ("forward", 4)]
    assert {plan.backend.name for plan in met.values()} == {"compiled"}


def test_jacobians() -> None:
    a, x, state = Case(OPS["scan"]).values
    expected = torch.autograd.functional.jacobian(lambda x: scan(a, x, state)[0], x)
    close(jacrev(lambda x: scan(a, x, state)[0])(x), expected)
    close(jacfwd(lambda x: scan(a, x, state)[0])(x), expected)


def test_a_named_backend_is_not_replaced() -> None:
    a, x, state = Case(OPS["scan"]).values
    with pytest.raises(RuntimeError, match="scan: backend 'compiled' has no forward-mode derivative"):
        jvp(lambda x: scan(a, x, state, backend="compiled")[0], (x,), (x,))
    with pytest.raises(ValueError, match="axis T is 4 in a but 3 in x"):
        jvp(lambda x: scan(a, x, state)[0], (x[:, 1:],), (x[:, 1:],))


def test_what_torch_compile_traces_cannot_be_transformed() -> None:
    a, x, _ = Case(OPS["scan"]).values
    torch._dynamo.reset()
    compiled = torch.compile(grad(lambda x: scan(a, x)[0].sum()), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"scan: torch\.func cannot transform it inside a function that torch\.compile"):
        compiled(x)


@pytest.mark.parametrize("enabled", [True, False])
def test_dual_tensors(enabled: bool) -> None:
    case = Case(OPS["scan"])
    along, gradients = directions(case), case.gradients(*case.values)
    with forward_ad.dual_level(), torch.set_grad_enabled(enabled):
        duals = [forward_ad.make_dual(t, d) for t, d in zip(case.values, along)]
        loss = forward_ad.unpack_dual(case.loss(*duals))
        close(loss.tangent, product(gradients, along))
        close(loss.primal, case.loss(*case.values))


@pytest.mark.parametrize("packed", [False, True])
def test_the_transposed_state(packed: bool) -> None:
    """gla read along its values has an operator of its own."""
    cu_seqlens = torch.tensor([0, 3, 3, 4]) if packed else None
    given = OPS["gla"].sample(SIZES | ({"B": 1, "N": 3} if packed else {}), dtype=torch.float64)
    values = given["v"].cos(), given["k"], given["v"], given["log_decay"], given["initial_state"]

    def loss(*values: Tensor) -> Tensor:
        y, final = gla_transposed(*values, cu_seqlens=cu_seqlens)
        return y.sin().sum() + final.sin().sum()

    def at_rest(*values: Tensor) -> Tensor:
        y, final = gla_transposed(*values[:4], cu_seqlens=cu_seqlens)
        return y.sin().sum() + final.sin().sum()

    function: Callable[..., Tensor]
    for function in (loss, at_rest):
        leaves = [t.clone().requires_grad_() for t in values]
        expected = torch.autograd.grad(function(*leaves), leaves, materialize_grads=True)
        close(grad(function, (0, 1, 2, 3, 4))(*values), expected)
        close(jvp(function, values, values)[1], product(expected, values))
    with pytest.raises(RuntimeError, match="gla_transposed: backend 'native' has no forward-mode derivative"):
        jvp(lambda q: gla_transposed(q, *values[1:4], cu_seqlens=cu_seqlens, backend="native"), values[:1], values[:1])


@pytest.mark.parametrize("name", ["hgrn", "gla", "attention"])
def test_the_tangent_of_a_single_token_is_never_lost(name: str) -> None:
    """Not by the one native call that a token alone may be, either."""
    layer, x = mixers.build(name, 8).double(), torch.randn(1, 1, 8, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(leaf)[0].sum(), leaf)
    with torch.no_grad():
        close(jvp(lambda x: layer(x)[0].sum(), (x,), (x.cos(),))[1], (gradient * x.cos()).sum())


def test_ensembles_and_states() -> None:
    """Layers stacked as torch.func does it, and states that are carried inside a mapped function."""
    layers = [mixers.build("hgrn", 8).double() for _ in range(EXAMPLES)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    found = vmap(lambda p, b: torch.func.functional_call(layers[0], (p, b), (x,))[0])(parameters, buffers)
    close(found, torch.stack([layer(x)[0] for layer in layers]))
    for name in ("hgrn", "attention"):
        layer = mixers.build(name, 8).double()

        def halves(x: Tensor, layer: Any = layer) -> Tensor:
            y, state = layer(x[None, :4])
            return torch.cat([y, layer(x[None, 4:], state)[0]], 1)[0]

        with torch.no_grad():
            close(vmap(halves)(x), layer(x)[0])
