"""SequenceMixer: the contract that every layer of the library keeps."""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mixers.initial import fill_as_built
from mixers.options import check_backend, check_types, is_integer
from mixers.state import Layout, State, layout_of, leaves, parts


class SequenceMixer(nn.Module):
    """A layer that mixes a sequence over time: `y, state = mixer(x, state=None, *, cu_seqlens=None)`.

    x, y are [B, T, dim] for any T >= 1; one token (T = 1) is decoding. The state that comes out goes into the next call
    and continues the sequence as if it had never been cut. `cu_seqlens` [N + 1] packs N sequences into a batch of one:
    nothing crosses a border, a sequence may be empty, and the state has batch N.

    A subclass writes `__init__(self, dim, *, options)`, `init_state` and `mix`. Where `causal` is False (bidirectional
    mixers) there is no state: it is returned as None, and passing one raises.

    An option `backend` is that of the op that mixes over time, and of no other: gated norms and short convolutions
    beside it choose their own.
    """

    family: ClassVar[str] = "other"
    source: ClassVar[str] = ""
    ops: ClassVar[tuple[str, ...]] = ()

    dim: int
    causal: bool = True
    # what a state may have beside the parts of the initial one
    state_may_have: ClassVar[frozenset[str]] = frozenset()
    _config: dict[str, Any]
    _layout: Layout | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _remember_arguments(cls.__init__)  # type: ignore[method-assign]

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        """The layer's equation: y [B, T, dim] and the state after it. `state` is None only if the mixer has none."""
        raise NotImplementedError

    def init_state(self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
        """The state before the first token of `batch` sequences. device and dtype (x's) default to the parameters'."""
        raise NotImplementedError

    def forward(self, x: Tensor, state: Any = None, *, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Any]:
        """Mixes x [B, T, dim] over time, from `state` (None: the initial one) to the state returned.

        Raises:
            ValueError: x, state or cu_seqlens do not fit; the message names the mixer, the axis and both values.
            TypeError: x is no tensor of a floating-point dtype, or of another than the weights outside autocast.
        """
        self._check(x, state, cu_seqlens)
        if state is None and self.causal:
            batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
            state = self.init_state(batch, device=x.device, dtype=activation_dtype(x))
        return self.mix(x, state, cu_seqlens)

    def comparable(self, state: Any) -> list[Tensor]:
        """The numbers of a state that mean something, for comparing two states: without padding, in a fixed order."""
        return [leaf for leaf in leaves(state) if leaf.is_floating_point()]

    def config(self) -> dict[str, Any]:
        """The arguments that build this mixer again: `mixers.build(**mixer.config())`."""
        return {"name": _name(type(self)), **self._config}

    def reset_parameters(self) -> None:
        """Gives all parameters and buffers new initial values in place, those that building the mixer gives.

        For what was built on `device="meta"`, after `to_empty(device=...)`. A mixer's values may be others than its
        projections' own, so parents come last:
        `model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)`.

        Raises:
            ValueError: it has other tensors than a mixer that is built, as where a projection was wrapped.
        """
        fill_as_built(self)

    def state_size(self, length: int = 1) -> int:
        """Numbers in the state of one sequence after `length` tokens."""
        if not self.causal:
            return 0
        with torch.device("meta"):
            return sum(leaf.numel() for leaf in leaves(self.init_state(1, device=torch.device("meta"))))

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self._config.items() if not isinstance(v, nn.Module))

    def _check(self, x: Tensor, state: State, cu_seqlens: Tensor | None) -> None:
        name = type(self).__name__
        if type(x) is not Tensor and not isinstance(x, Tensor):
            raise TypeError(f"{name}: x is a {type(x).__name__}, expected a tensor")
        shape = x.shape
        if len(shape) != 3:
            raise ValueError(f"{name}: x has {len(shape)} axes {list(shape)}, expected [B, T, {self.dim}]")
        batch, length, dim = shape
        if dim != self.dim:
            raise ValueError(f"{name}: axis dim is {dim} in x but {self.dim} in the layer")
        if not x.is_floating_point():
            raise TypeError(f"{name}: x is {x.dtype}, expected a floating-point dtype")
        if batch == 0 or length == 0:
            raise ValueError(f"{name}: x is {list(shape)}; axes B and T must be at least 1")
        if not torch.compiler.is_compiling():
            for child in self._modules.values():
                weight = None if child is None else child._parameters.get("weight")
                if weight is not None and weight.dtype is x.dtype and weight.device == x.device:
                    break
            else:
                self._check_weights(name, x)
        if cu_seqlens is not None:
            if batch != 1:
                raise ValueError(f"{name}: axis B is {batch}, but packed sequences (cu_seqlens) need B = 1")
            if not isinstance(cu_seqlens, Tensor):
                raise TypeError(f"{name}: cu_seqlens is a {type(cu_seqlens).__name__}, expected a tensor")
            if cu_seqlens.ndim != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.shape[0] < 2:
                raise ValueError(
                    f"{name}: cu_seqlens is {cu_seqlens.dtype} {list(cu_seqlens.shape)}, "
                    "expected int32 or int64 [N + 1]"
                )
            _check_device(name, "cu_seqlens is", cu_seqlens.device, x.device)
            batch = cu_seqlens.shape[0] - 1
        if state is None:
            return
        if not self.causal:
            raise ValueError(f"{name}: a bidirectional mixer has no state, but one was passed")
        self._check_state(name, state, batch, x.device)

    def _check_weights(self, name: str, x: Tensor) -> None:
        """x is where the linear maps' weights are, and in their dtype; unless a wrapper, hook or mode sees to it."""
        linear = [child for child, module in self._modules.items() if type(module) is nn.Linear]
        if not linear or autocasts(x.device.type):
            return
        # no kernels are imported with the names of the mixers
        from kernels.registration import watched
        from mixers.projections import plain_maps

        maps = [found for child in linear for found in plain_maps(self, child) or ()]
        weights = [weight for weight, _ in maps if type(weight) is nn.Parameter and weight.ndim == 2]
        if not weights or watched() or any(p.dtype == x.dtype and p.device == x.device for p in self.parameters()):
            return
        _check_device(name, "its weights are", weights[0].device, x.device)
        raise TypeError(f"{name}: x is {x.dtype}, but its weights are {weights[0].dtype}, and there is no autocast")

    def _check_state(self, name: str, state: State, batch: int, device: torch.device) -> None:
        """The state has the parts and sizes of this mixer's: it is neither another mixer's nor of other options."""
        found, layout = parts(state), self._layout
        if layout is None and not torch.compiler.is_compiling():
            with torch.device("meta"):
                layout = self._layout = layout_of(self.init_state(1, device=torch.device("meta")))
        # what is traced sets no attribute, and goes without where no state was seen before
        for part, known in (layout or dict.fromkeys(found)).items():
            leaf = found.get(part)
            if type(leaf) is not Tensor:
                if part not in found:
                    raise ValueError(f"{name}: state has {[*found]}, but here {part!r} belongs to it")
                if known is not None and not isinstance(leaf, Tensor):
                    raise TypeError(f"{name}: state {part!r} is a {type(leaf).__name__}, expected a tensor")
                for inner in leaves(leaf):
                    _check_batch(name, inner.shape, batch)
                continue
            shape = leaf.shape
            if not shape or shape[0] != batch:
                _check_batch(name, shape, batch)
            if leaf.device != device:
                _check_device(name, f"state {part!r} is", leaf.device, device)
            if known is None:
                continue
            if shape[known[0] :] != known[1]:
                expected = ", ".join(["batch", *["any"] * (known[0] - 1), *map(str, known[1])])
                raise ValueError(f"{name}: state {part!r} is {list(shape)}, expected [{expected}]")
            # a count that was cast along with the rest would be rounded
            if leaf.is_floating_point() is not known[2]:
                kind = "a floating-point" if known[2] else "an integer"
                raise TypeError(f"{name}: state {part!r} is {leaf.dtype}, expected {kind} dtype")
        if layout is not None and len(found) != len(layout):
            for part in found.keys() - layout.keys() - self.state_may_have:
                raise ValueError(f"{name}: state has {part!r}, but here {[*layout]} belong to it")


def _check_device(name: str, what: str, found: torch.device, expected: torch.device) -> None:
    if found != expected:
        raise ValueError(f"{name}: {what} on {found}, but x is on {expected}")


def _check_batch(name: str, shape: torch.Size, batch: int) -> None:
    if not shape:
        raise ValueError(f"{name}: a tensor of the state is a single number, expected axis batch of {batch} first")
    if shape[0] != batch:
        raise ValueError(f"{name}: axis batch is {shape[0]} in state but {batch} in x and cu_seqlens")


def autocasts(kind: str) -> bool:
    """Whether autocast is on for a type of device; some, such as "meta", have none to ask about."""
    # the compiler of torch 2.11 cannot trace the question
    there = kind != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(kind)
    return there and torch.is_autocast_enabled(kind)


def placed(
    beside: nn.Module, device: torch.device | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Device and dtype as given, or those of a projection, in whose place somebody may have put any other module."""
    if device is not None and dtype is not None:
        return device, dtype
    first = next((p for p in beside.parameters() if p.is_floating_point()), torch.empty(0))
    return device or first.device, dtype or first.dtype


def activation_dtype(x: Tensor) -> torch.dtype:
    """The dtype that projections of x come out in."""
    if x.dtype != torch.float64 and autocasts(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _name(cls: type) -> str:
    return str(getattr(cls, "registered_name", cls.__name__.lower()))


def _remember_arguments(init: Any) -> Any:
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: SequenceMixer, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        # numpy's integers are none of JSON's
        bound.arguments |= {name: int(x) for name, x in bound.arguments.items() if is_integer(x)}
        remembered = dict(list(bound.arguments.items())[1:])
        check_types(_name(type(self)), init, remembered)
        # models have no ops of their own
        check_backend(getattr(self, "ops", ()), remembered.get("backend", "auto"))
        init(*bound.args, **bound.kwargs)
        # the outermost constructor is the one that was called, and it comes last
        object.__setattr__(self, "_config", remembered)

    return wrapper
