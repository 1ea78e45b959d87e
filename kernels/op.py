"""Op and Backend: one public function, several interchangeable implementations, one choice per problem.

An op is an opaque `torch.library` operator, so that it is one node for torch.compile and torch.export whatever
length comes along; which backend runs is decided inside it, at run time, by a look-up that never measures.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from importlib.metadata import EntryPoints, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import autotune
from autotune import program
from autotune.lock import Locked
from kernels import registration, sources
from kernels.engine import Engine
from kernels.problem import Arg, Problem, check, check_cu_seqlens, size_of, state_dtype

Config = Mapping[str, Any]

# Plans are cheap to make again; the bound keeps a stream of ever new shapes from growing without end.
MAX_PLANS = 8192


@dataclass(frozen=True)
class Cost:
    """Bytes and flops of the perfect implementation: every input read once, every output written once."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Backend:
    """One implementation of an op: a module with `forward` and `backward`, imported when first needed.

    The module may also have `cannot(problem) -> list[str]` (why it cannot run, empty if it can),
    `configs(problem) -> list of dicts` (candidates for the tuner, the default first) and
    `compile_for(target, problem, config)`. `devices` are the device types it can run on at all. `foreign`: it comes
    from another package, and is only chosen where it was compared and measured.
    """

    name: str
    module: str
    devices: tuple[str, ...] = ()
    foreign: bool = False

    @cached_property
    def loaded(self) -> ModuleType | str:
        """The module, or why it cannot be imported."""
        try:
            return importlib.import_module(self.module)
        except ImportError as error:
            return f"{error}"
        except Exception as error:
            if not self.foreign:
                raise
            return f"importing {self.module} failed: {type(error).__name__}: {error}"

    def cannot(self, problem: Problem) -> list[str]:
        """Why this backend cannot run the problem; empty if it can."""
        device = problem.device.type
        interpreted = "cuda" in self.devices and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        if self.devices and device not in self.devices and not interpreted:
            return [f"runs on {' and '.join(self.devices)}, the tensors are on {device}"]
        if isinstance(self.loaded, str):
            return [self.loaded]
        reasons = getattr(self.loaded, "cannot", None)
        return reasons(problem) if reasons else []

    def configs(self, problem: Problem) -> list[Config]:
        configs = getattr(self.loaded, "configs", None)
        return list(configs(problem)) if configs else [{}]

    def function(self, direction: str) -> Callable[..., Any]:
        return getattr(self.loaded, direction)


@dataclass(frozen=True)
class Plan:
    """What will run for one signature, and where that decision came from."""

    backend: Backend
    config: Config
    origin: str


@dataclass(frozen=True, eq=False)
class Op:
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
    forward_overload: Callable[..., Any] = field(init=False, repr=False)
    backward_overload: Callable[..., Any] = field(init=False, repr=False)
    _plans: dict[Any, Callable[..., Any]] = field(default_factory=dict, repr=False)
    _with_gradient: Callable[..., tuple[Tensor, ...]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "backends", (*self.backends, *_foreign(self.name)))
        object.__setattr__(self, "_with_gradient", registration.register(self))
        # found here, because torch.compile does not trace through the lock of a cached_property
        object.__setattr__(self, "forward_overload", registration.overload(self.name))
        object.__setattr__(self, "backward_overload", registration.overload(f"{self.name}_backward"))

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        """The opaque operator itself: tensors, cu_seqlens, options and the backend's name, all by position."""
        if registration.watched():
            return self.forward_overload(*args)
        signature = self._signature("called", len(self.inputs), args)
        plan = self._plans.get(signature)
        if plan is None:
            if not registration.plain(args):
                return self.forward_overload(*args)
            plan = self._remember(signature, "forward", args)
        if registration.needs_gradient(self, args):
            return self._with_gradient(plan, *args)
        return self.execute(plan, "forward", len(self.inputs), args)

    @cached_property
    def source(self) -> str:
        """A hash of the op's sources and of what they share with others: with other sources, rows are stale."""
        return sources.digest(p for p in self._folder.iterdir() if p.suffix in (".py", ".cpp", ".h"))

    @cached_property
    def compiled_source(self) -> str:
        """A hash of what is compiled for GPUs, and of what launches it, which predictions depend on."""
        return sources.digest(self._folder.glob("triton*.py"))

    @property
    def _folder(self) -> Path:
        return Path(importlib.util.find_spec(self.backends[0].module).origin).parent  # type: ignore[union-attr, arg-type]

    def backend(self, name: str) -> Backend:
        for backend in self.backends:
            if backend.name == name:
                return backend
        names = ", ".join(["auto", *(b.name for b in self.backends)])
        raise ValueError(f"{self.name}: no backend {name!r}; there are {names}")

    def key(self, problem: Problem) -> autotune.Key:
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

    def choose(self, problem: Problem, name: str = "auto") -> Plan:
        """The plan for a problem: the named backend or nothing; for "auto" the tables' choice, else the rule.

        The rule, used where nothing was measured, under torch.use_deterministic_algorithms(True), and where a lock
        (`autotune.use`) is silent: our last listed backend that can run the problem, with its default config.

        Raises:
            ValueError: there is no backend of that name.
            RuntimeError: the named or locked backend (or none at all) can run the problem; every reason is given.
        """
        if name != "auto":
            return self._named(problem, self.backend(name))
        candidates, key = self.candidates(problem), self.key(problem)
        if not candidates:
            why = "; ".join(f"{b.name}: {', '.join(b.cannot(problem))}" for b in self.backends)
            raise RuntimeError(f"{self.name}: no backend can run {problem}: {why}")
        lock = autotune.lock()
        if lock is not None and (locked := lock.find(key)) is not None:
            return self._locked(problem, locked, candidates)
        wrong = [(record.backend, record.config) for record in autotune.refused(key, self.source)]
        candidates = [c for c in candidates if (c[0].name, c[1]) not in wrong] or candidates
        choice = self._measured(key, candidates)
        if choice is not None:
            return Plan(self.backend(choice.backend), choice.config, choice.origin)
        # of other packages' backends none runs unmeasured, unless there is nothing else
        last = next((b for b, _ in reversed(candidates) if not b.foreign), candidates[-1][0])
        return Plan(last, next(config for backend, config in candidates if backend is last), "rule")

    def _measured(self, key: autotune.Key, candidates: Sequence[tuple[Backend, Config]]) -> autotune.Choice | None:
        """What the tables say; nothing where timings must not decide."""
        if torch.are_deterministic_algorithms_enabled() or autotune.lock() is not None:
            return None
        offered = [(backend.name, config) for backend, config in candidates]
        return autotune.choose(key, offered, self.source, self.compiled_source)

    def _named(self, problem: Problem, backend: Backend) -> Plan:
        """The backend with its best config. Others are not even asked: that may compile them."""
        reasons = backend.cannot(problem)
        if reasons:
            why = "; ".join(reasons)
            raise RuntimeError(f"{self.name}: backend {backend.name!r} cannot run this problem: {why} ({problem})")
        configs = backend.configs(problem)
        choice = self._measured(self.key(problem), [(backend, config) for config in configs])
        return Plan(backend, choice.config, choice.origin) if choice else Plan(backend, configs[0], "named")

    def _locked(self, problem: Problem, locked: Locked, candidates: Sequence[tuple[Backend, Config]]) -> Plan:
        for backend, config in candidates:
            if (backend.name, dict(config)) == (locked.backend, dict(locked.config)):
                return Plan(backend, config, f"locked by {locked.path}")
        named = [backend for backend in self.backends if backend.name == locked.backend]
        reasons = named[0].cannot(problem) if named else ["there is no such backend"]
        why = "; ".join(reasons) or f"it has no such config any more ({dict(locked.config)})"
        raise RuntimeError(f"{self.name}: {locked.path} locks backend {locked.backend!r}, which cannot run: {why}")

    def run_forward(self, *args: Any) -> tuple[Tensor, ...]:
        """The operator's kernel: looks the plan up (and checks the tensors where it is new) and runs it."""
        return self.run("forward", args)

    def run_backward(self, *args: Any) -> tuple[Tensor, ...]:
        """The backward operator's kernel; a gradient that is not needed comes back empty."""
        gradients = self.run("backward", args)
        like = next(t for t in args if t is not None)
        return tuple(like.new_empty(0) if g is None else g for g in gradients)

    def run(self, direction: str, args: Sequence[Any]) -> Any:
        count = len(self.names(direction))
        signature = self._signature(direction, count, args)
        plan = self._plans.get(signature) or self._remember(signature, direction, args)
        return self.execute(plan, direction, count, args)

    def execute(self, plan: Callable[..., Any], direction: str, count: int, args: Sequence[Any]) -> Any:
        """Runs the plan on tensors that it was made for. count: of the tensors before cu_seqlens."""
        cu_seqlens = args[count]
        if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
            check_cu_seqlens(self.name, cu_seqlens, self.check(direction, args)["T"])
        if torch._C._is_any_autocast_enabled():
            # what a backend is made of has dtypes of its own choice
            with torch.autocast(next(t for t in args if t is not None).device.type, enabled=False):
                return plan(*args[: count + 1])
        return plan(*args[: count + 1])

    @staticmethod
    def _signature(way: str, count: int, args: Sequence[Any]) -> tuple[Any, ...]:
        """All that the choice of a plan depends on. way: "called" (plain tensors only), "forward" or "backward"."""
        return (
            way,
            autotune.generation(),
            torch.get_num_threads(),
            torch._C._get_deterministic_algorithms(),
            args[count + 1 :],
            *[None if t is None else (type(t), t.shape, t.dtype, t.device) for t in args[: count + 1]],
        )

    def _remember(self, signature: tuple[Any, ...], direction: str, args: Sequence[Any]) -> Callable[..., Any]:
        plan = self._prepare(direction, args)
        if len(self._plans) >= MAX_PLANS:
            self._plans.clear()
        self._plans[signature] = plan
        return plan

    def names(self, direction: str) -> tuple[str, ...]:
        """The names of the operator's tensors before cu_seqlens."""
        return self._names[direction]

    @cached_property
    def _names(self) -> dict[str, tuple[str, ...]]:
        gradients = tuple(f"d{arg.name}" for arg in self.outputs)
        return {"forward": tuple(arg.name for arg in self.inputs), "backward": (*gradients, *self.residuals)}

    def _prepare(self, direction: str, args: Sequence[Any]) -> Callable[..., Any]:
        problem = self.problem_of(direction, args)
        plan = self.choose(problem, args[-1])
        for met in _recordings:
            met.setdefault(problem, plan)
        extra: dict[str, Any] = {"config": plan.config}
        if direction == "backward":
            extra["needs"] = tuple(bool(args[-2] >> i & 1) for i in range(len(self.inputs)))
        count = len(self.names(direction))
        return partial(plan.backend.function(direction), **dict(zip(self.options, args[count + 1 :])), **extra)

    def _described(self, direction: str, args: Sequence[Any]) -> list[tuple[Arg, Tensor | None]]:
        """The tensors whose axes and dtypes pose the problem: the inputs, or in backward the residuals."""
        by_name = {arg.name: arg for arg in (*self.inputs, *self.outputs)}
        return [(by_name[n], t) for n, t in zip(self.names(direction), args) if n in by_name]

    def check(self, direction: str, args: Sequence[Any]) -> dict[str, int]:
        """The sizes of every axis; raises TypeError or ValueError naming the op, the axis and both values."""
        described = self._described(direction, args)
        cu_seqlens = args[len(self.names(direction))]
        return check(self.name, [arg for arg, _ in described], [tensor for _, tensor in described], cu_seqlens)

    def problem_of(self, direction: str, args: Sequence[Any]) -> Problem:
        """The problem posed by the operator's arguments (tensors, cu_seqlens, options); checks them."""
        sizes, count = self.check(direction, args), len(self.names(direction))
        facts: dict[str, Any] = dict(zip(self.options, args[count + 1 :]))
        dtypes = {}
        described = self._described(direction, args)
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
        described = self._described("forward", args)
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


def _foreign(op: str) -> Iterator[Backend]:
    """Backends from other packages: entry points "op.backend" of the group "mixers.backends", each a module."""
    for point in _entry_points():
        name, _, backend = point.name.partition(".")
        if name == op and backend:
            yield Backend(backend, point.value, foreign=True)


@cache
def _entry_points() -> EntryPoints:
    """Reading those of all installed packages takes a while: once for all ops."""
    return entry_points(group="mixers.backends")


program.register(Engine())
_recordings: list[dict[Problem, Plan]] = []


@contextlib.contextmanager
def recording() -> Iterator[dict[Problem, Plan]]:
    """Collects the problems that ops meet inside the block, with the plan chosen for each.

    Problems met before are collected again: the block starts with a fresh memory of plans.
    """
    met: dict[Problem, Plan] = {}
    autotune.changed()
    _recordings.append(met)
    try:
        yield met
    finally:
        _recordings.remove(met)
