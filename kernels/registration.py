"""Registers an op with torch.library: real kernels, fake kernels, autograd and flop counts.

Autograd is an implementation of our own under the Autograd key that calls an autograd.Function;
`torch.library.custom_op` with `register_autograd` costs twice as much per call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

if TYPE_CHECKING:
    from kernels.op import Op

NAMESPACE = "sequence_mixers"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_TYPES = {bool: "bool", int: "int", float: "float", str: "str"}


def overload(name: str) -> Callable[..., Any]:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def register(op: Op) -> None:
    """Defines `op.name` and `op.name + "_backward"` in torch.ops.sequence_mixers."""
    by_name = {arg.name: arg for arg in (*op.inputs, *op.outputs)}
    options = [f"{_TYPES[type(default)]} {name}" for name, default in op.options.items()]

    def tensor(name: str, optional: bool) -> str:
        return f"Tensor{'?' if optional else ''} {name}"

    inputs = [tensor(arg.name, arg.optional) for arg in op.inputs]
    residuals = [tensor(f"d{arg.name}", True) for arg in op.outputs]
    residuals += [tensor(name, by_name[name].optional) for name in op.residuals]
    forward = ", ".join([*inputs, "Tensor? cu_seqlens", *options, "str backend"])
    backward = ", ".join([*residuals, "Tensor? cu_seqlens", *options, "int needs", "str backend"])
    _library.define(f"{op.name}({forward}) -> ({', '.join(['Tensor'] * len(op.outputs))})")
    _library.define(f"{op.name}_backward({backward}) -> ({', '.join(['Tensor'] * len(op.inputs))})")
    _library.impl(op.name, op.run_forward, "CompositeExplicitAutograd")
    _library.impl(f"{op.name}_backward", op.run_backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{op.name}", _fake_forward(op), lib=_library)
    torch.library.register_fake(f"{NAMESPACE}::{op.name}_backward", _fake_backward(op), lib=_library)
    _library.impl(op.name, _autograd(op), "Autograd")
    _library.impl(f"{op.name}_backward", _no_second_derivative(op), "Autograd")
    for direction in ("forward", "backward"):
        _register_flops(op, direction)


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


def _autograd(op: Op) -> Callable[..., Any]:
    """The Autograd key: straight to the kernel if nothing needs a gradient, else through an autograd.Function."""
    count = len(op.inputs)
    names = [arg.name for arg in op.inputs]
    forward, outputs = op.name, [arg.name for arg in op.outputs]
    below = torch._C._AutoDispatchBelowAutograd

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
            with below():
                results = op.forward_overload(*args)
            tensors = dict(zip(names, args)) | dict(zip(outputs, results))
            ctx.save_for_backward(*[tensors[name] for name in op.residuals], args[count])
            ctx.rest = args[count + 1 :]
            ctx.set_materialize_grads(False)
            return tuple(results)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            *residuals, cu_seqlens = ctx.saved_tensors
            *options, backend = ctx.rest
            needs = ctx.needs_input_grad[:count]
            nothing = (None,) * (1 + len(ctx.rest))
            if torch.is_grad_enabled():
                if op.differentiable_backward is None:
                    raise RuntimeError(f"{op.name}: no second derivative; call backward without create_graph=True")
                named = dict(zip(op.options, options))
                found = op.differentiable_backward(*grads, *residuals, cu_seqlens, **named, backend=backend)
            else:
                mask = sum(1 << i for i, needed in enumerate(needs) if needed)
                with below():
                    found = op.backward_overload(*grads, *residuals, cu_seqlens, *options, mask, backend)
            return (*(g if needed else None for g, needed in zip(found, needs)), *nothing)

    Function.__name__ = Function.__qualname__ = f"{forward}_function"

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:count]):
            return Function.apply(*args)
        with below():
            return op.forward_overload(*args)

    return autograd


def _no_second_derivative(op: Op) -> Callable[..., Any]:
    """Calling the backward operator itself on tensors that need gradients is an error, never a missing gradient."""

    def autograd(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args):
            raise RuntimeError(f"{op.name}_backward: not differentiable; differentiate {op.name} with create_graph=True")
        with torch._C._AutoDispatchBelowAutograd():
            return op.backward_overload(*args)

    return autograd


def _register_flops(op: Op, direction: str) -> None:
    suffix = "" if direction == "forward" else "_backward"
    packet = getattr(getattr(torch.ops, NAMESPACE), f"{op.name}{suffix}")

    @register_flop_formula(packet, get_raw=True)
    def flops(*args: Any, out_val: Sequence[Tensor] | None = None, **kwargs: Any) -> int:
        return op.cost(op.problem_of(direction, args)).flops
