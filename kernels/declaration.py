"""What an op says of itself: its tensors, options and backends, and the problem that a call of it poses."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

import autotune
from kernels import sources
from kernels.backend import Backend, Config
from kernels.problem import Arg, Problem, check, size_of, state_dtype


@dataclass(frozen=True)
class Cost:
    """Bytes and flops of the perfect implementation: every input read once, every output written once."""

    bytes: int
    flops: int


@dataclass(frozen=True, eq=False)
class Declaration:
    """A sequence operator: its tensors, its backends (simplest first), and what tests and the tuner need to know.

    inputs, outputs: the tensors in order. options: further keyword arguments with their defaults.
    residuals: the inputs and outputs that the backward pass receives. gradients: for each input, the residual
    that has its shape and dtype. sample(sizes, ...): inputs for tests, benchmarks and the tuner.
    cost(problem): the perfect implementation's bytes and flops.
    differentiable_backward: the backward pass in differentiable terms, for double backward.
    """

    name: str
    inputs: tuple[Arg, ...]
    outputs: tuple[Arg, ...]
    residuals: tuple[str, ...]
    gradients: Mapping[str, str]
    backends: tuple[Backend, ...]
    sample: Callable[..., dict[str, Tensor | None]]
    cost: Callable[[Problem], Cost]
    options: Mapping[str, Any] = field(default_factory=dict)
    differentiable_backward: Callable[..., tuple[Tensor | None, ...]] | None = None

    def source(self, device: str) -> str:
        """A hash of the op's sources for a device, and of what they share with others: with other sources, its rows are
        stale. device: a type, or a name in the tables, where those of CPUs begin with "cpu"."""
        kind = "cpu" if device.startswith("cpu") else "gpu"
        if kind not in self._sources:
            self._sources[kind] = sources.digest(sources.own(self._folder, kind))
        return self._sources[kind]

    @cached_property
    def compiled_source(self) -> str:
        """A hash of what is compiled for GPUs, and of what launches it, which predictions depend on."""
        return sources.digest(self._folder.glob("triton*.py"))

    @cached_property
    def _sources(self) -> dict[str, str]:
        return {}

    @property
    def _folder(self) -> Path:
        return Path(importlib.util.find_spec(self.backends[0].module).origin).parent  # type: ignore[union-attr, arg-type]

    def backend(self, name: str) -> Backend:
        for backend in self.backends:
            if backend.name == name:
                return backend
        names = ", ".join(["auto", *(b.name for b in self.backends)])
        raise ValueError(f"{self.name}: no backend {name!r}; there are {names}")

    def names(self, direction: str) -> tuple[str, ...]:
        """The names of the operator's tensors before cu_seqlens."""
        return self._names[direction]

    @cached_property
    def _names(self) -> dict[str, tuple[str, ...]]:
        gradients = tuple(f"d{arg.name}" for arg in self.outputs)
        return {"forward": tuple(arg.name for arg in self.inputs), "backward": (*gradients, *self.residuals)}

    def described(self, direction: str, args: Sequence[Any]) -> list[tuple[Arg, Tensor | None]]:
        """The tensors whose axes and dtypes pose the problem: the inputs, or in backward the residuals."""
        by_name = {arg.name: arg for arg in (*self.inputs, *self.outputs)}
        return [(by_name[n], t) for n, t in zip(self.names(direction), args) if n in by_name]

    def check(self, direction: str, args: Sequence[Any]) -> dict[str, int]:
        """The sizes of every axis; raises TypeError or ValueError naming the op, the axis and both values."""
        described = self.described(direction, args)
        cu_seqlens = args[len(self.names(direction))]
        return check(self.name, [arg for arg, _ in described], [tensor for _, tensor in described], cu_seqlens)

    def check_types(self, args: Sequence[Any]) -> None:
        """Raises TypeError for what stands in a tensor's place and is none."""
        for name, given in zip((*self.names("forward"), "cu_seqlens"), args):
            if given is not None and not isinstance(given, Tensor):
                raise TypeError(f"{self.name}: {name} is {type(given).__name__}, expected a tensor")

    def problem_of(self, direction: str, args: Sequence[Any]) -> Problem:
        """The problem posed by the operator's arguments (tensors, cu_seqlens, options); checks them."""
        sizes, count = self.check(direction, args), len(self.names(direction))
        facts: dict[str, Any] = dict(zip(self.options, args[count + 1 :]))
        for name, default in self.options.items():
            kinds = (int, float) if type(default) is float else type(default)
            if not isinstance(facts[name], kinds):
                raise TypeError(f"{self.name}: {name} is {facts[name]!r}, expected {type(default).__name__}")
        dtypes = {}
        described = self.described(direction, args)
        for arg, tensor in described:
            if arg.optional:
                facts[arg.name] = tensor is not None
            if tensor is None:
                continue
            if arg.role in ("sequence", "decay"):
                dtypes[arg.name] = tensor.dtype
            if arg.pairs:
                facts["pairs"] = tensor.ndim > len(arg.letters)
        facts["packed"] = args[count] is not None
        device = next(tensor.device for _, tensor in described if tensor is not None)
        return Problem(self.name, direction, device, dtypes, sizes, facts)

    def empty_outputs(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        """Uninitialised outputs of the right shapes and dtypes, for fake tensors."""
        sizes = self.check("forward", args)
        described = self.described("forward", args)
        sequence = next(tensor for arg, tensor in described if arg.role == "sequence" and tensor is not None)
        pairs = any(arg.pairs and tensor is not None and tensor.ndim > len(arg.letters) for arg, tensor in described)
        dtypes = {"sequence": sequence.dtype, "state": state_dtype(sequence.dtype)}
        two = [2] if pairs else []
        return tuple(
            sequence.new_empty(
                [*(size_of(axis, sizes) for axis in out.letters), *(two if out.pairs else [])], dtype=dtypes[out.role]
            )
            for out in self.outputs
        )

    def key(self, problem: Problem) -> autotune.Key:
        """What the problem is filed under in the tables."""
        sizes = {k: v for k, v in problem.sizes.items() if k != "T" and (k != "N" or problem.options["packed"])}
        if sizes.get("S") == problem.sizes["T"]:
            # self-attention: the length says it all
            del sizes["S"]
        elif "S" in sizes:
            # the length of the keys, which grows with every decoded token
            sizes["S"] = autotune.bucket(sizes["S"])
        return autotune.Key(
            op=self.name,
            direction=problem.direction,
            device=autotune.fingerprint(problem.device),
            dtype=problem.dtype_name,
            sizes=tuple(sorted(sizes.items())),
            options=tuple(sorted((k, v) for k, v in problem.options.items() if v)),
            length=autotune.bucket(problem.sizes["T"]),
        )

    def candidates(self, problem: Problem) -> list[tuple[Backend, Config]]:
        """Every backend that can run the problem with every config it offers, simplest first."""
        able = [backend for backend in self.backends if not backend.cannot(problem)]
        return [(backend, config) for backend in able for config in backend.configs(problem)]
