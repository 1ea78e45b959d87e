"""The laws. Each takes `make` (a width -> a fresh mixer) and a `Case`.

Laws about values run in float64, where "equal" means up to 1e-9 of the output's scale; those about the future and about
splitting apply where `mixer.causal`.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mixers import state
from mixers.checks.case import Case, LawBroken, Make
from mixers.checks.compare import (
    comparable_probe,
    compare_gradients,
    compare_with_gradients,
    equal,
    equal_states,
    layout,
    probe,
    require,
)


def shape_and_dtype(make: Make, case: Case) -> None:
    """y has the shape and dtype of x, in every dtype; states are never narrower than float32."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        mixer = case.mixer(make, dtype)
        x = case.x(dtype)
        y, after = mixer(x)
        require(y.shape == x.shape, f"y is {list(y.shape)}, x is {list(x.shape)}")
        require(y.dtype == dtype, f"y is {y.dtype}, x is {dtype}")
        require(bool(y.isfinite().all()), f"y is not finite in {dtype}")
        if not mixer.causal:
            require(after is None, "a mixer that is not causal returned a state")
            continue
        initial = mixer.init_state(case.batch)
        require(layout(initial) == layout(after), f"the state went in as {layout(initial)}, out as {layout(after)}")


def future_never_leaks(make: Make, case: Case) -> None:
    """y[:, :t] does not depend on x[:, t:]."""
    mixer = case.mixer(make)
    if not mixer.causal:
        return
    x, other = case.x(), case.normal(case.batch, case.length, case.dim, salt=1)
    changed = torch.cat([x[:, : case.cut], other[:, case.cut :]], 1)
    equal("y before the change", mixer(changed)[0][:, : case.cut], mixer(x)[0][:, : case.cut])


def splitting(make: Make, case: Case) -> None:
    """Cutting a sequence anywhere and carrying the state changes nothing: outputs, state and gradients."""
    mixer = case.mixer(make)
    if not mixer.causal:
        return
    x = case.x().requires_grad_()
    whole = mixer(x)
    before, after = None, []
    for part in (x[:, : case.cut], x[:, case.cut :]):
        if part.shape[1]:
            y, before = mixer(part, before)
            after.append(y)
    parts = (torch.cat(after, 1), before)
    compare_with_gradients("split", mixer, case, x, parts, whole)


def token_by_token(make: Make, case: Case) -> None:
    """Decoding one token at a time equals the whole at once: outputs, state and gradients, those of the state too; and
    without gradients, for which a mixer may have a way of its own."""
    mixer = case.mixer(make)
    if not mixer.causal:
        return
    x = case.x()[:, :24].detach().requires_grad_()
    whole = mixer(x)
    with torch.no_grad():
        y, carried = _decoded(mixer, x)
    equal("y token by token, without gradients", y, whole[0])
    equal_states("state token by token, without gradients", mixer, carried, whole[1])
    compare_with_gradients("token by token", mixer, case, x, _decoded(mixer, x), whole)


def _decoded(mixer: Any, x: Tensor) -> tuple[Tensor, Any]:
    carried, ys = None, []
    for t in range(x.shape[1]):
        y, carried = mixer(x[:, t : t + 1], carried)
        ys.append(y)
    return torch.cat(ys, 1), carried


def packed(make: Make, case: Case) -> None:
    """Packed sequences equal separate ones, empty ones included: outputs, states and gradients."""
    mixer = case.mixer(make)
    rng = random.Random(case.seed)
    lengths = [case.cut, 0, case.length - case.cut, rng.randint(0, 5), 1]
    borders = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(borders, dtype=rng.choice((torch.int32, torch.int64)), device=case.device)
    x = case.normal(1, borders[-1], case.dim).requires_grad_()
    together = mixer(x, cu_seqlens=cu_seqlens)
    ys, states = [], []
    for start, end in itertools.pairwise(borders):
        if end > start:
            y, after = mixer(x[:, start:end])
            ys.append(y)
            states.append(after)
        else:
            states.append(mixer.init_state(1) if mixer.causal else None)
    apart = torch.cat(ys, 1)
    equal("y packed", together[0], apart)
    weights = case.normal(*apart.shape, salt=2)
    losses = [(together[0] * weights).sum(), (apart * weights).sum()]
    if mixer.causal:
        for n, single in enumerate(states):
            row = state.select(together[1], torch.tensor([n]))
            equal_states(f"state of sequence {n} of lengths {lengths}", mixer, row, single)
            if lengths[n]:
                losses[0] = losses[0] + comparable_probe(mixer, row)
                losses[1] = losses[1] + comparable_probe(mixer, single)
    compare_gradients("packed", mixer, [x], *losses)


def batch_permutes(make: Make, case: Case) -> None:
    """Reordering the batch reorders outputs and states, and nothing else."""
    mixer, x = case.mixer(make), case.x()
    order = torch.randperm(case.batch, generator=torch.Generator().manual_seed(case.seed))
    y, after = mixer(x)
    other, other_after = mixer(x[order])
    equal("y of the reordered batch", other, y[order])
    if mixer.causal:
        equal_states("state of the reordered batch", mixer, other_after, state.select(after, order))


def gradients_arrive(make: Make, case: Case) -> None:
    """Every parameter, the input and the initial state get a gradient; a loss on the final state alone reaches x."""
    mixer = case.mixer(make)
    # the first token alone may not see every parameter (its position is not rotated, its decay meets a zero state)
    x = case.normal(case.batch, max(case.length, 4), case.dim).requires_grad_()
    initial = None
    if mixer.causal:
        _, warm = mixer(case.normal(case.batch, 3, case.dim, salt=3))
        initial = state.apply(lambda t: t.detach().requires_grad_(t.is_floating_point()), warm)
    y, after = mixer(x, initial)
    floats = [t for t in state.leaves(initial) if t.is_floating_point() and t.numel()]
    loss = (y * case.normal(*y.shape, salt=2)).sum() + (probe(after) if mixer.causal else 0.0)
    named = {"x": x, **{f"state {n}": t for n, t in enumerate(floats)}, **dict(mixer.named_parameters())}
    for name, gradient in zip(
        named, torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    ):
        require(gradient is not None, f"{name} gets no gradient")
        require(bool(gradient.isfinite().all()), f"the gradient of {name} is not finite")
        require(bool(gradient.any()), f"the gradient of {name} is zero everywhere")
    if mixer.causal and any(t.is_floating_point() and t.numel() for t in state.leaves(after)):
        require(probe(after).requires_grad, "the final state is cut off from everything")
        (gradient,) = torch.autograd.grad(probe(after), [x], allow_unused=True)
        require(gradient is not None, "a loss on the final state does not reach x")
        require(bool(gradient[:, -1].any()), "a loss on the final state does not reach the last token")


def gradcheck(make: Make, case: Case) -> None:
    """Gradients agree with finite differences in float64, for x and the state, through y and the final state."""
    mixer = case.mixer(make)
    for parameter in mixer.parameters():
        parameter.requires_grad_(False)
    x = case.normal(1, min(case.length, 5), case.dim).requires_grad_()
    if not mixer.causal:
        torch.autograd.gradcheck(lambda x: mixer(x)[0], (x,), atol=1e-6, rtol=1e-4, fast_mode=True)
        return
    _, warm = mixer(case.normal(1, 2, case.dim, salt=3))
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in state.leaves(warm)]

    def function(x: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        queue = list(leaves)
        y, after = mixer(x, state.apply(lambda _: queue.pop(0), warm))
        return y, *[t for t in state.leaves(after) if t.is_floating_point() and t.numel()]

    torch.autograd.gradcheck(function, (x, *leaves), atol=1e-6, rtol=1e-4, fast_mode=True)


def backends_agree(make: Make, case: Case) -> None:
    """Every backend that can run here gives the naive one's outputs, states and gradients; not other packages'."""
    from kernels.catalogue import OPS

    mixer: Any = case.mixer(make)
    x = case.x().requires_grad_()
    if not hasattr(mixer, "backend"):
        return
    mixer.backend = "naive"
    reference = mixer(x)
    listed = [backend for op in mixer.ops for backend in OPS[op].backends]
    for name in sorted({backend.name for backend in listed if not backend.foreign} - {"naive"}):
        mixer.backend = name
        try:
            found = mixer(x)
        except RuntimeError as error:
            if "cannot run" not in str(error):
                raise
            continue
        compare_with_gradients(f"backend {name}", mixer, case, x, found, reference)


def same_bits_twice(make: Make, case: Case) -> None:
    """The same call gives the same bits: outputs, state and gradients, in float32."""
    mixer, x = case.mixer(make, torch.float32), case.x(torch.float32).requires_grad_()
    runs = []
    for _ in range(2):
        y, after = mixer(x)
        gradients = torch.autograd.grad(y.sum(), [x, *mixer.parameters()], allow_unused=True)
        runs.append([y, *state.leaves(after), *[g for g in gradients if g is not None]])
    for one, two in zip(*runs):
        require(torch.equal(one, two), "two identical calls differ")


def transforms(make: Make, case: Case) -> None:
    """torch.func knows the mixer: gradients of each example, mapped over the batch, and a derivative along a direction
    are autograd's."""
    mixer, x, direction = case.mixer(make), case.x()[:, :16], case.normal(case.batch, case.length, case.dim, salt=1)
    direction = direction[:, :16]
    weights = case.normal(*x.shape[1:], salt=2)
    parameters = {name: p.detach() for name, p in mixer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return (torch.func.functional_call(mixer, parameters, (x[None],))[0] * weights).sum()

    try:
        gradients, dx = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, 0))(parameters, x)
        y, along = torch.func.jvp(lambda x: mixer(x)[0], (x,), (direction,))[:2]
    except RuntimeError as error:
        raise LawBroken(f"torch.func cannot transform it: {error}") from error
    equal("y under torch.func.jvp", y, mixer(x)[0])
    dalong = torch.zeros_like(along[:, 0, 0])
    for n, example in enumerate(x):
        leaves = {name: p.requires_grad_() for name, p in copy.deepcopy(parameters).items()}
        example = example.clone().requires_grad_()
        tensors = (*leaves.values(), example)
        found = torch.autograd.grad(loss(leaves, example), tensors, allow_unused=True, materialize_grads=True)
        for name, one, two in zip((*leaves, "x"), (*[g[n] for g in gradients.values()], dx[n]), found):
            equal(f"gradient of {name} for each example", one, two, 1e-8)
        dalong[n] = (found[-1] * direction[n]).sum()
    equal("the derivative along a direction", (along * weights).sum((1, 2)), dalong, 1e-8)


def compiles(make: Make, case: Case) -> None:
    """torch.compile(fullgraph=True, dynamic=True) gives the same outputs, states and gradients at several lengths."""
    mixer = case.mixer(make)
    torch._dynamo.reset()
    fast = torch.compile(mixer, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (case.length + 1, case.length + 2, 2 * case.length + 3):
        x = case.normal(case.batch + 1, length, case.dim).requires_grad_()
        compare_with_gradients("compiled", mixer, case, x, fast(x), mixer(x))


def exports(make: Make, case: Case) -> None:
    """torch.export with a dynamic length gives a program that runs at other lengths."""
    mixer = case.mixer(make)
    length = torch.export.Dim("length", min=2, max=4096)
    x = case.normal(case.batch, case.length + 1, case.dim)
    program = torch.export.export(mixer, (x,), dynamic_shapes={"x": {1: length}}).module()
    longer = case.normal(case.batch, 2 * case.length + 3, case.dim)
    equal("y exported", program(longer)[0], mixer(longer)[0])


def copies_and_reloads(make: Make, case: Case) -> None:
    """deepcopy, state_dict, meta-device initialisation and config all give the same mixer back, and reset_parameters
    one as it is built."""
    mixer, x = case.mixer(make), case.x()
    y = mixer(x)[0]
    equal("y of the deepcopy", copy.deepcopy(mixer)(x)[0], y)
    fresh = make(case.dim).to(case.device, torch.float64)
    fresh.load_state_dict(mixer.state_dict())
    equal("y after load_state_dict", fresh.eval()(x)[0], y)
    with torch.device("meta"):
        empty = make(case.dim)
    require(all(t.is_meta for t in (*empty.parameters(), *empty.buffers())), "a tensor was made on a real device")
    full = empty.to(torch.float64).to_empty(device=case.device)
    full.load_state_dict(mixer.state_dict())
    equal("y after meta-device initialisation", full.eval()(x)[0], y)
    torch.manual_seed(0)
    with torch.device(case.device):
        built = make(case.dim).to(torch.float64).eval()
    torch.manual_seed(0)
    full.reset_parameters()
    equal("y after reset_parameters", full(x)[0], built(x)[0])
    rebuilt = type(mixer)(**{k: v for k, v in mixer.config().items() if k != "name"})
    require(rebuilt.config() == mixer.config(), "config() does not rebuild the mixer")


def autocast(make: Make, case: Case) -> None:
    """Under bfloat16 autocast the output stays near the float32 one, and states keep the dtype they start with."""
    # one token's output may be a number near 0 over its own size, whose sign is a matter of rounding
    mixer, x = case.mixer(make, torch.float32), case.normal(case.batch, max(case.length, 4), case.dim).float()
    y, _ = mixer(x)
    with torch.autocast(case.device.type, torch.bfloat16):
        narrow, after = mixer(x)
        if mixer.causal:
            before = mixer.init_state(case.batch, dtype=torch.bfloat16)
            what = f"the state went in as {layout(before)} under autocast, out as {layout(after)}"
            require(layout(before) == layout(after), what)
            require(bool(mixer(x, after)[0].isfinite().all()), "y is not finite under autocast")
    require(bool(narrow.isfinite().all()), "y is not finite under autocast")
    error = (narrow.float() - y).norm() / (y.norm() + 1e-6)
    # a few roundings at 2⁻⁸ each; a layer that computes its gates or sums in bfloat16 is far above
    require(error.item() < 0.1, f"y under autocast is off by {error.item():.3g} of its norm")


def extreme_values(make: Make, case: Case) -> None:
    """Saturated gates, huge, tiny and zero inputs: outputs, states and gradients stay finite, in bfloat16 too."""
    for dtype, factor in itertools.product((torch.float32, torch.bfloat16), (0.0, 1e-30, 1e3)):
        mixer = case.mixer(make, dtype)
        x = (case.x() * factor).to(dtype).requires_grad_()
        y, after = mixer(x)
        tensors = [y, *[t for t in state.leaves(after) if t.is_floating_point()]]
        loss = (y * case.normal(*y.shape, dtype=dtype, salt=2)).sum()
        gradients = torch.autograd.grad(loss, [x, *mixer.parameters()], allow_unused=True)
        for tensor in (*tensors, *[g for g in gradients if g is not None]):
            require(bool(tensor.isfinite().all()), f"not finite for inputs of size {factor} in {dtype}")


LAWS: dict[str, Callable[[Make, Case], None]] = {
    law.__name__: law
    for law in (
        shape_and_dtype,
        future_never_leaks,
        splitting,
        token_by_token,
        packed,
        batch_permutes,
        gradients_arrive,
        gradcheck,
        backends_agree,
        same_bits_twice,
        transforms,
        compiles,
        exports,
        copies_and_reloads,
        autocast,
        extreme_values,
    )
}
# A case of these costs seconds, most of them in the compiler
SLOW = ("compiles", "exports")
