"""Gated linear attention read along its values, out of gla and its gradient.

An operator of its own: of an autograd.Function in traced Python torch.export keeps no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels import matrix_state
from kernels.gla import OP, naive
from kernels.matrix_state import with_axis
from kernels.problem import state_dtype
from kernels.registration import below, define, needs_gradient, overload
from kernels.transforms import check_loop, transformed

NAME = "gla_transposed"
# q, k, v, log_decay and initial_state have gradients
TENSORS = 5
# of gla's gradients only the query's
QUERY = 1


def gla_transposed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """gla's state, of which every query reads the other axis: the values answer, not the keys.

        S[t] = diag(exp(log_decay[t])) S[t-1] + k[t] v[t]ᵀ,   y[t] = S[t] q[t]

    It is the gradient of gla: for o = gla(r, k, v), o[t] = S[t]ᵀ r[t], a gradient q of o makes the gradient S[t] q[t]
    of r, whatever r is. And for a gradient r of y the loss is Σ r[t]ᵀ S[t] q[t] = Σ o[t]ᵀ q[t], so that dq = o and the
    other gradients are gla's for that query. No state is kept, and nothing is repeated for each key.

    Args:
        q: queries [B, T, H, V].
        k, v, log_decay, initial_state, cu_seqlens, backend: as `kernels.gla.gla` has them; forward runs a forward and a
            backward pass of it, and so does backward.

    Returns:
        y [B, T, H, K] in k's dtype, and final_state [N, H, K, V] in the state dtype.

    Every input has a gradient, through y and through final_state, and a second one.

    Raises:
        TypeError, ValueError, RuntimeError: as gla does, to which k goes as its query too; and where q is not like v.

    Source: the first of the two passes of Zhang et al. 2024, "Gated slot attention" (arXiv 2409.07146).
    """
    if q.shape != v.shape or q.dtype != v.dtype:
        error = ValueError if q.shape != v.shape else TypeError
        raise error(f"{NAME}: q is {list(q.shape)} {q.dtype} but v is {list(v.shape)} {v.dtype}")
    args = q, k, v, with_axis(NAME, log_decay, k), initial_state, cu_seqlens, backend
    y, final_state = by_loop(*args) if transformed() else OVERLOAD(*args)
    return y, final_state


def by_loop(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The operator's outputs, operation by operation."""
    k, v, log_decay, initial_state, cu_seqlens, backend = rest
    check_loop(NAME, backend, OP.backends[0].name)
    sizes = OP.problem_of("forward", _given(*rest)).sizes
    if initial_state is None:
        initial_state = k.new_zeros([sizes[axis] for axis in "NHKV"], dtype=state_dtype(k.dtype))
    return matrix_state.forward(_step, (q, k, v, log_decay), initial_state, cu_seqlens, 1.0)


def _step(S: Tensor, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[Tensor, Tensor]:
    after, _ = naive.step(S, k, k, v, log_decay, None)
    return after, torch.einsum("bhkv,bhv->bhk", after, q)


def _given(k: Tensor, *rest: Any) -> tuple[Any, ...]:
    """gla's arguments for v, log_decay, initial_state, cu_seqlens and backend; its query may be any, so k's."""
    *others, cu_seqlens, backend = rest
    return k, k, *others, None, cu_seqlens, 1.0, backend


def _run(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *given, backend = _given(*rest)
    _, final_state = OP.run_forward(*given, backend)
    return OP.run_backward(q, None, *given, QUERY, backend)[0], final_state


def _fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    k = rest[0]
    return k.new_empty(k.shape), OP.empty_outputs(_given(*rest))[1]


def _flops(q: Tensor, *rest: Any, **_: Any) -> int:
    return OP.cost(OP.problem_of("forward", _given(*rest))).flops


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        *tensors, ctx.backend = args
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return _below(*args)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal_state: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
        r = torch.zeros_like(k) if dy is None else dy
        given = (r, k, v, log_decay, initial_state, None, cu_seqlens)
        needs = ctx.needs_input_grad
        dq = OP(*given, 1.0, ctx.backend)[0] if needs[0] else None
        if torch.is_grad_enabled():
            assert OP.differentiable_backward is not None
            found = OP.differentiable_backward(q, dfinal_state, *given, scale=1.0, backend=ctx.backend)
        else:
            mask = sum(2 << i for i, needed in enumerate(needs[1:TENSORS]) if needed)
            found = OP.backward_overload(q, dfinal_state, *given, 1.0, mask, ctx.backend)
        return (dq, *(g if needed else None for g, needed in zip(found[1:TENSORS], needs[1:TENSORS])), None, None)


def _below(*args: Any) -> tuple[Tensor, Tensor]:
    with below():
        y, final_state = OVERLOAD(*args)
    return y, final_state


def _autograd(*args: Any) -> tuple[Tensor, Tensor]:
    if needs_gradient(args[:TENSORS]):
        y, final_state = _Transposed.apply(*args)
        return y, final_state
    return _below(*args)


define(
    NAME,
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor? cu_seqlens, str backend)"
    " -> (Tensor, Tensor)",
    kernel=_run, fake=_fake, autograd=_autograd, count=_flops,
)  # fmt: skip
OVERLOAD = overload(NAME)
