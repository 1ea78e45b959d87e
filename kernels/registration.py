"""Registers an op with torch.library: real kernels, fake kernels, autograd and flop counts.

Autograd is an implementation of our own under the Autograd key that calls an autograd.Function;
`torch.library.custom_op` with `register_autograd` costs twice as much per call. And where nobody is watching (no
tracing, no mode, no tensor subclass) an op is called without the dispatcher, whose way through Python costs more than
everything else together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from kernels import flops, unrolled

if TYPE_CHECKING:
    from kernels.op import Op

NAMESPACE = "sequence_mixers"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
below = torch._C._AutoDispatchBelowAutograd
_PLAIN = frozenset({type(None), bool, int, float, str})
_CALL = torch._C._FunctionBase.__dict__["apply"]
_is_compiling, _is_grad_enabled = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack
# A class for each set of options and of tensors that are there: plans have one each where an option never comes again.
MAX_FUNCTIONS = 256
_TYPES = {bool: "bool", int: "int", float: "float", str: "str"}


def overload(name: str) -> Callable[..., Any]:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a call comes to, once its signature is known.

    run: of the inputs and cu_seqlens. with_gradient: of `run` and the first `given` of these; the others are None, and
    handing one to autograd takes time too. A backward pass has none.
    """

    run: Callable[..., Any]
    with_gradient: Any = None
    given: int = 0


def watched() -> bool:
    """Is there any tracing, dispatch mode, function transform or forward-mode gradient, which must see the operator?"""
    if _is_compiling() or _dispatch_modes() > 0 or _function_modes() > 0 or _transform() is not None:
        return True
    return forward_ad._current_level >= 0


def plain(args: Sequence[Any]) -> bool:
    """Are these tensors with numbers in them, of no subclass, and plain options?"""
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            if arg.is_meta:
                return False
        elif kind not in _PLAIN:
            return False
    return True


def define(
    name: str,
    schema: str,
    *,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    autograd: Callable[..., Any],
    count: Callable[..., int],
) -> None:
    """An operator of torch.ops.sequence_mixers. autograd: what runs where gradients may be wanted, which goes on
    `below`; count: its flops."""
    _library.define(f"{name}{schema}")
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    _library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    flops.register(getattr(getattr(torch.ops, NAMESPACE), name), count)


def register(op: Op) -> Callable[[Callable[..., Any], Sequence[Any]], Prepared]:
    """Defines `op.name` and `op.name + "_backward"` in torch.ops.sequence_mixers; returns what prepares calls that
    nobody watches, of the function that runs them and the operator's arguments."""
    by_name = {arg.name: arg for arg in (*op.inputs, *op.outputs)}
    options = [f"{_TYPES[type(default)]} {name}" for name, default in op.options.items()]

    def tensor(name: str, optional: bool) -> str:
        return f"Tensor{'?' if optional else ''} {name}"

    inputs = [tensor(arg.name, arg.optional) for arg in op.inputs]
    residuals = [tensor(f"d{arg.name}", True) for arg in op.outputs]
    residuals += [tensor(name, by_name[name].optional) for name in op.residuals]
    forward = ", ".join([*inputs, "Tensor? cu_seqlens", *options, "str backend"])
    backward = ", ".join([*residuals, "Tensor? cu_seqlens", *options, "int needs", "str backend"])
    # a single output comes in a list, so that callers get a sequence of tensors whatever the op
    outputs = ", ".join(["Tensor"] * len(op.outputs)) if len(op.outputs) > 1 else "Tensor[]"
    gradients = ", ".join(["Tensor"] * len(op.inputs))
    functions = lru_cache(MAX_FUNCTIONS)(partial(_function, op))
    define(
        op.name, f"({forward}) -> ({outputs})", kernel=op.run_forward, fake=_fake_forward(op),
        autograd=_autograd(op, functions), count=_flops(op, "forward"),
    )  # fmt: skip
    define(
        f"{op.name}_backward", f"({backward}) -> ({gradients})", kernel=op.run_backward, fake=_fake_backward(op),
        autograd=_no_second_derivative(op), count=_flops(op, "backward"),
    )  # fmt: skip

    def prepared(run: Callable[..., Any], args: Sequence[Any]) -> Prepared:
        there, rest = _split(op, args)
        # what `apply` comes to where no function is transformed; its way through Python costs as much as the kernel
        return Prepared(run, _CALL.__get__(None, functions(there, rest)), _given(there))

    return prepared


def _split(op: Op, args: Sequence[Any]) -> tuple[tuple[bool, ...], tuple[Any, ...]]:
    """Which of the inputs and cu_seqlens are tensors, and the arguments after them: options and the backend's name."""
    end = len(op.inputs) + 1
    return tuple(t is not None for t in args[:end]), tuple(args[end:])


def _given(there: Sequence[bool]) -> int:
    """How many are left without the None at the end."""
    return max(i for i, tensor in enumerate(there, 1) if tensor)


def _fake_forward(op: Op) -> Callable[..., Any]:
    def fake(*args: Any) -> tuple[Tensor, ...]:
        return op.empty_outputs(args)

    return fake


def _fake_backward(op: Op) -> Callable[..., Any]:
    first = len(op.outputs)

    def fake(*args: Any) -> tuple[Tensor, ...]:
        residuals = dict(zip(op.residuals, args[first:]))
        needs, like = args[-2], next(t for t in residuals.values() if t is not None)
        return tuple(
            residuals[op.gradients[arg.name]].new_empty(residuals[op.gradients[arg.name]].shape)
            if needs >> i & 1 and arg.name in op.gradients
            else like.new_empty(0)
            for i, arg in enumerate(op.inputs)
        )

    return fake


def needs_gradient(inputs: Sequence[Tensor | None]) -> bool:
    """Does one of these have a gradient to get, or inside forward-mode AD maybe a tangent to hand on?"""
    if forward_ad._current_level >= 0:
        return True
    if _is_grad_enabled():
        for tensor in inputs:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def _autograd(op: Op, functions: Callable[..., type[torch.autograd.Function]]) -> Callable[..., Any]:
    """The Autograd key: straight to the kernel if nothing needs a gradient, else through the autograd.Function."""
    count = len(op.inputs)

    def autograd(*args: Any) -> Any:
        if needs_gradient(args[:count]):
            if _transform() is not None:
                what = "torch.func cannot transform it inside a function that torch.compile traces"
                raise RuntimeError(f"{op.name}: {what}; leave torch.compile out")
            there, rest = _split(op, args)
            return functions(there, rest).apply(partial(run, rest), *args[: _given(there)])
        return run((), *args)

    def run(rest: tuple[Any, ...], *args: Any) -> Any:
        with below():
            return op.forward_overload(*args, *rest)

    return autograd


def _function(op: Op, there: tuple[bool, ...], rest: tuple[Any, ...]) -> type[torch.autograd.Function]:
    """The op with its gradient for these options, and these of its inputs and cu_seqlens: a function of what runs it
    (one argument, because every one that is no tensor costs some time) and of the tensors.

    Such a class knows all that would else be kept in every call's context, in a dictionary of its own.
    """
    tensors = dict(zip([*(arg.name for arg in op.inputs), "cu_seqlens"], there))
    outputs, constant = [arg.name for arg in op.outputs], [arg.name for arg in op.outputs if not arg.differentiable]
    # which of the residuals and cu_seqlens are there: saving a None takes time too
    found = {name: tensors.get(name, True) for name in (*op.residuals, "cu_seqlens")}
    kept = [name for name, tensor in found.items() if tensor]
    *options, backend = rest

    class Function(torch.autograd.Function):
        # of the base classes: looked up by name in every call, class by class
        setup_context = torch.autograd.Function.setup_context
        clear_saved_tensors_on_access = False
        boxed_grads_call = False

        forward = staticmethod(unrolled.forward([*tensors.items()], outputs, kept, constant))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = iter(ctx.saved_tensors)
            *residuals, cu_seqlens = [next(saved) if tensor else None for tensor in found.values()]
            needs = ctx.needs_input_grad[1:]
            if torch.is_grad_enabled():
                if op.differentiable_backward is None:
                    raise RuntimeError(f"{op.name}: no second derivative; call backward without create_graph=True")
                named = dict(zip(op.options, options))
                gradients = op.differentiable_backward(*grads, *residuals, cu_seqlens, **named, backend=backend)
            else:
                mask = sum(1 << i for i, needed in enumerate(needs) if needed)
                args = (*grads, *residuals, cu_seqlens, *options, mask, backend)
                if not watched() and plain(args):
                    gradients = op.run("backward", args)
                else:
                    with below():
                        gradients = op.backward_overload(*args)
            # cu_seqlens, where it is given, has none
            return (None, *(g if needed else None for g, needed in zip((*gradients, None), needs)))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            raise RuntimeError(f"{op.name}: no forward-mode derivative (jvp, dual tensors); there is the backward one")

    Function.__name__ = Function.__qualname__ = op.name
    return Function


def _no_second_derivative(op: Op) -> Callable[..., Any]:
    """Calling the backward operator itself on tensors that need gradients is an error, never a missing gradient."""

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args):
            name = op.name
            raise RuntimeError(f"{name}_backward: not differentiable; differentiate {name} with create_graph=True")
        with below():
            return op.backward_overload(*args)

    return autograd


def _flops(op: Op, direction: str) -> Callable[..., int]:
    def count(*args: Any, out_val: Sequence[Tensor] | None = None, **kwargs: Any) -> int:
        return op.cost(op.problem_of(direction, args)).flops

    return count
