"""An op under torch.func's transforms (grad, vjp, vmap, jvp and what is made of them) and with dual tensors.

A derivative in reverse mode, mapped over examples or not, runs the op's own kernels: an autograd.Function that the
transforms know, and its backward pass another. Examples that are mapped over join the batch, one call for all of them,
unless something without a batch axis is mapped too (or its gradient asked for, which would be summed over them): then
they are called one by one. Forward mode, and derivatives of derivatives, run the loop that defines the op, which torch
can differentiate any number of times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kernels.loop import differentiable

if TYPE_CHECKING:
    from kernels.op import Op

_is_compiling = torch.compiler.is_dynamo_compiling
_transform, _transforms = torch._C._functorch.peek_interpreter_stack, torch._C._functorch.get_interpreter_stack
_Kind = torch._C._functorch.TransformType
# A class for each set of options, as in registration
MAX_FUNCTIONS = 256


def transformed() -> bool:
    """Is a function being transformed here, or a forward-mode derivative being made?"""
    return not _is_compiling() and (_transform() is not None or forward_ad._current_level >= 0)


def has_values(tensor: Tensor) -> bool:
    """Can its numbers be looked at here: is it neither fake nor a transformed function's?"""
    return type(tensor) is Tensor and not tensor.is_meta and not transformed()


def call(op: Op, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """The op's outputs, from its tensors, cu_seqlens, options and the backend's name."""
    end = len(op.inputs) + 1
    op.check_types(args)
    kinds = [interpreter.key() for interpreter in _transforms() or ()]
    if forward_ad._current_level >= 0 or _Kind.Jvp in kinds or kinds.count(_Kind.Grad) > 1:
        return by_loop(op, args)
    return _function(op, tuple(args[end:])).apply(*args[:end])


def check_loop(op: str, backend: str, loop: str) -> None:
    """Raises RuntimeError where the loop would take the place of a backend that was named."""
    if backend not in ("auto", loop):
        what = "no forward-mode derivative, and none that torch.func could take apart here"
        raise RuntimeError(f"{op}: backend {backend!r} has {what}; 'auto' and {loop!r} have")


def by_loop(op: Op, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """The op's outputs, operation by operation."""
    *given, backend = args
    loop, end = op.backends[0], len(op.inputs) + 1
    check_loop(op.name, backend, loop.name)
    problem = op.problem_of("forward", args)
    op.require(loop, problem)
    with torch.autocast(problem.device.type, enabled=False):
        return tuple(loop.function("forward")(*given[:end], **dict(zip(op.options, given[end:]))))


@lru_cache(MAX_FUNCTIONS)
def _function(op: Op, rest: tuple[Any, ...]) -> type[torch.autograd.Function]:
    """The op with its gradient for these options and this backend: a function of its inputs and cu_seqlens."""
    *options, backend = rest
    names = [*(arg.name for arg in op.inputs), "cu_seqlens"]
    outputs = [arg.name for arg in op.outputs]

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*tensors: Tensor | None) -> tuple[Tensor, ...]:
            return tuple(op(*tensors, *rest))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            found = dict(zip(names, inputs)) | dict(zip(outputs, output))
            ctx.save_for_backward(*(found[name] for name in (*op.residuals, "cu_seqlens")))
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*(t for t, arg in zip(output, op.outputs) if not arg.differentiable))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            needs = ctx.needs_input_grad
            mask = sum(1 << i for i, needed in enumerate(needs) if needed)
            gradients = _gradient(op, (*options, mask, backend)).apply(*grads, *ctx.saved_tensors)
            return tuple(g if needed else None for g, needed in zip((*gradients, None), needs))

        @staticmethod
        def vmap(info: Any, in_dims: Sequence[int | None], *tensors: Tensor | None) -> Any:
            letters = [arg.letters for arg in op.inputs]
            return _mapped(Function.apply, info.batch_size, in_dims, tensors, letters, [True] * len(outputs))

    Function.__name__ = Function.__qualname__ = op.name
    return Function


@lru_cache(MAX_FUNCTIONS)
def _gradient(op: Op, rest: tuple[Any, ...]) -> type[torch.autograd.Function]:
    """The backward pass: a function of the outputs' gradients, the residuals and cu_seqlens."""
    *options, needs, backend = rest
    by_name = {arg.name: arg for arg in (*op.inputs, *op.outputs)}
    wanted = [bool(needs >> i & 1) for i in range(len(op.inputs))]

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(*tensors: Tensor | None) -> tuple[Tensor, ...]:
            return tuple(op.backward_overload(*tensors, *rest))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            ctx.save_for_backward(*inputs)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            if op.differentiable_backward is None:
                raise RuntimeError(f"{op.name}: no second derivative; nest torch.func.grad, which takes the loop apart")
            named = dict(zip(op.options, options))
            given = (*grads, *ctx.saved_tensors)
            found = differentiable(op.differentiable_backward, len(op.inputs), *given, **named, backend=backend)
            return (*found, None)

        @staticmethod
        def vmap(info: Any, in_dims: Sequence[int | None], *tensors: Tensor | None) -> Any:
            letters = [by_name[name].letters for name in (*(arg.name for arg in op.outputs), *op.residuals)]
            shared = any(needed and not _of_batch(arg.letters) for arg, needed in zip(op.inputs, wanted))
            return _mapped(Gradient.apply, info.batch_size, in_dims, tensors, letters, wanted, one_by_one=shared)

    Gradient.__name__ = Gradient.__qualname__ = f"{op.name}_backward"
    return Gradient


def _of_batch(letters: Sequence[str]) -> bool:
    """Is there a row of this for each sequence of the batch?"""
    return letters[0] in ("B", "N")


def _mapped(
    run: Callable[..., Sequence[Tensor]],
    count: int,
    in_dims: Sequence[int | None],
    tensors: Sequence[Tensor | None],
    letters: Sequence[Sequence[str]],
    made: Sequence[bool],
    *,
    one_by_one: bool = False,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """`run` for `count` examples, which are along in_dims of the tensors, cu_seqlens the last of these; and where they
    are along what it returns. made: which of the outputs are more than a place, and then begin with the batch."""
    mapped = [tensor is not None and dim is not None for tensor, dim in zip(tensors, in_dims)]
    alone = tensors[-1] is not None or any(m and not _of_batch(of) for m, of in zip(mapped, letters))
    if one_by_one or alone:
        rows = [t.unbind(dim) if m else [t] * count for t, dim, m in zip(tensors, in_dims, mapped)]  # type: ignore[union-attr, arg-type]
        each = zip(*(run(*example) for example in zip(*rows)))
        return tuple(torch.stack(out) for out in each), (0,) * len(made)
    joined = [
        tensor
        if tensor is None or not _of_batch(of)
        else (tensor.movedim(dim, 0) if m else tensor.expand(count, *tensor.shape)).flatten(0, 1)  # type: ignore[arg-type]
        for tensor, dim, m, of in zip(tensors, in_dims, mapped, letters)
    ]
    found = run(*joined, None)
    return (
        tuple(t.unflatten(0, (count, -1)) if there else t for t, there in zip(found, made)),
        tuple(0 if there else None for there in made),
    )
