"""Op: one public function, several interchangeable implementations, one choice per problem.

An op is an opaque `torch.library` operator, so that it is one node for torch.compile and torch.export whatever
length comes along; which backend runs is decided inside it, at run time, by a look-up that never measures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import autotune
from autotune import program
from autotune.lock import Locked
from kernels import registration, transforms, unrolled
from kernels.backend import Backend, Config, from_packages, with_options
from kernels.declaration import Cost, Declaration
from kernels.engine import Engine
from kernels.problem import Problem, check_cu_seqlens
from kernels.registration import Prepared

__all__ = ["Backend", "Config", "Cost", "Op", "Plan", "recording"]

# Found once: on the way of every call, a name in another module costs as much as the answer.
_autocast = torch._C._is_any_autocast_enabled
_watched, _is_grad_enabled = registration.watched, torch.is_grad_enabled

# Plans are cheap to make again; the bound keeps a stream of ever new shapes from growing without end.
MAX_PLANS = 8192


@dataclass(frozen=True)
class Plan:
    """What will run for one signature, and where that decision came from."""

    backend: Backend
    config: Config
    origin: str


@dataclass(frozen=True, eq=False)
class Op(Declaration):
    """A declared operator that can be called: it chooses a backend for each problem, and remembers what it chose."""

    forward_overload: Callable[..., Any] = field(init=False, repr=False)
    backward_overload: Callable[..., Any] = field(init=False, repr=False)
    _plans: dict[Any, Prepared] = field(default_factory=dict, repr=False)
    _prepared: Callable[[Callable[..., Any], Sequence[Any]], Prepared] = field(init=False, repr=False)
    _signature: Callable[..., tuple[tuple[Any, ...], bool]] = field(init=False, repr=False)
    _backward_signature: Callable[..., tuple[tuple[Any, ...], bool]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "backends", (*self.backends, *from_packages(self.name)))
        object.__setattr__(self, "_prepared", registration.register(self))
        inputs = {arg.name: arg.optional for arg in self.inputs} | {"cu_seqlens": True}
        residuals = {name: inputs.get(name, False) for name in (*self.residuals, "cu_seqlens")}
        gradients = {f"d{arg.name}": True for arg in self.outputs}
        object.__setattr__(self, "_signature", unrolled.signature([*inputs.items()]))
        object.__setattr__(self, "_backward_signature", unrolled.signature([*(gradients | residuals).items()]))
        # found here, because torch.compile does not trace through the lock of a cached_property
        object.__setattr__(self, "forward_overload", registration.overload(self.name))
        object.__setattr__(self, "backward_overload", registration.overload(f"{self.name}_backward"))

    def __call__(self, *args: Any) -> tuple[Tensor, ...]:
        """The opaque operator itself: tensors, cu_seqlens, options and the backend's name, all by position."""
        if _watched():
            return transforms.call(self, args) if transforms.transformed() else self.forward_overload(*args)
        end = len(self.inputs) + 1
        tensors = args[:end]
        try:
            signature, requires_grad = self._signature("called", *tensors, args[end:])
        except AttributeError:
            self.check_types(args)
            self.check("forward", args)
            raise
        call = self._plans.get(signature)
        if call is None:
            if not registration.plain(args):
                self.check_types(args)
                return self.forward_overload(*args)
            call = self._remember(signature, "forward", args)
        if requires_grad and _is_grad_enabled():
            return call.with_gradient(call.run, *tensors[: call.given])
        return call.run(*tensors)

    def run_forward(self, *args: Any) -> tuple[Tensor, ...]:
        """The operator's kernel: looks the plan up (and checks the tensors where it is new) and runs it."""
        return self.run("forward", args)

    def run_backward(self, *args: Any) -> tuple[Tensor, ...]:
        """The backward operator's kernel; a gradient that is not needed comes back empty."""
        gradients = self.run("backward", args)
        like = next(t for t in args if t is not None)
        return tuple(like.new_empty(0) if g is None else g for g in gradients)

    def run(self, direction: str, args: Sequence[Any]) -> Any:
        end = len(self.names(direction)) + 1
        tensors = args[:end]
        of = self._signature if direction == "forward" else self._backward_signature
        signature, _ = of(direction, *tensors, args[end:])
        call = self._plans.get(signature) or self._remember(signature, direction, args)
        return call.run(*tensors)

    def _remember(self, signature: tuple[Any, ...], direction: str, args: Sequence[Any]) -> Prepared:
        run = self._prepare(direction, args)
        call = self._prepared(run, args) if direction == "forward" else Prepared(run)
        if len(self._plans) >= MAX_PLANS:
            self._plans.clear()
        self._plans[signature] = call
        return call

    def _prepare(self, direction: str, args: Sequence[Any]) -> Callable[..., Any]:
        problem = self.problem_of(direction, args)
        plan = self.choose(problem, args[-1])
        for met in _recordings:
            met.setdefault(problem, plan)
        extra: dict[str, Any] = {"config": plan.config}
        if direction == "backward":
            extra["needs"] = tuple(bool(args[-2] >> i & 1) for i in range(len(self.inputs)))
        count = len(self.names(direction))
        options = dict(zip(self.options, args[count + 1 :]))
        run = with_options(plan.backend.function(direction), **options, **extra)
        return run if args[count] is None and not _autocast() else partial(self._guarded, run, problem.sizes["T"])

    def _guarded(self, run: Callable[..., Any], length: int, *tensors: Tensor | None) -> Any:
        """Runs a plan for packed sequences, whose borders are checked, or under autocast: what a backend is made of has
        dtypes of its own choice."""
        cu_seqlens = tensors[-1]
        if cu_seqlens is not None and cu_seqlens.is_cpu:
            check_cu_seqlens(self.name, cu_seqlens, length)
        if not _autocast():
            return run(*tensors)
        with torch.autocast(next(t for t in tensors if t is not None).device.type, enabled=False):
            return run(*tensors)

    def choose(self, problem: Problem, name: str = "auto") -> Plan:
        """The plan for a problem: the named backend or nothing; for "auto" the tables' choice, else the rule.

        The rule, used where nothing was measured, under torch.use_deterministic_algorithms(True), and where a lock
        (`autotune.use`) is silent: our last listed backend that can run the problem, with its default config.

        Raises:
            ValueError: there is no backend of that name.
            RuntimeError: the named or locked backend cannot run the problem, or none can; every reason is given.
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
        wrong = [(record.backend, record.config) for record in autotune.refused(key, self.source(problem.device.type))]
        candidates = [c for c in candidates if (c[0].name, c[1]) not in wrong] or candidates
        choice = self._measured(problem, candidates)
        if choice is not None:
            return Plan(self.backend(choice.backend), choice.config, choice.origin)
        # of other packages' backends none runs unmeasured, unless there is nothing else
        last = next((b for b, _ in reversed(candidates) if not b.foreign), candidates[-1][0])
        return Plan(last, next(config for backend, config in candidates if backend is last), "rule")

    def _measured(self, problem: Problem, candidates: Sequence[tuple[Backend, Config]]) -> autotune.Choice | None:
        """What the tables say; nothing where timings must not decide."""
        if torch.are_deterministic_algorithms_enabled() or autotune.lock() is not None:
            return None
        offered = [(backend.name, config) for backend, config in candidates]
        return autotune.choose(self.key(problem), offered, self.source(problem.device.type), self.compiled_source)

    def require(self, backend: Backend, problem: Problem) -> None:
        """Raises RuntimeError, with the reasons, where a backend cannot run the problem."""
        reasons = backend.cannot(problem)
        if reasons:
            why = "; ".join(reasons)
            raise RuntimeError(f"{self.name}: backend {backend.name!r} cannot run this problem: {why} ({problem})")

    def _named(self, problem: Problem, backend: Backend) -> Plan:
        """The backend with its best config. Others are not even asked: that may compile them."""
        self.require(backend, problem)
        configs = backend.configs(problem)
        choice = self._measured(problem, [(backend, config) for config in configs])
        return Plan(backend, choice.config, choice.origin) if choice else Plan(backend, configs[0], "named")

    def _locked(self, problem: Problem, locked: Locked, candidates: Sequence[tuple[Backend, Config]]) -> Plan:
        for backend, config in candidates:
            if (backend.name, dict(config)) == (locked.backend, dict(locked.config)):
                return Plan(backend, config, f"locked by {locked.path}")
        named = [backend for backend in self.backends if backend.name == locked.backend]
        reasons = named[0].cannot(problem) if named else ["there is no such backend"]
        why = "; ".join(reasons) or f"it has no such config any more ({dict(locked.config)})"
        raise RuntimeError(f"{self.name}: {locked.path} locks backend {locked.backend!r}, which cannot run: {why}")


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
