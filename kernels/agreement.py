"""What right means: an implementation's error against the loop in float64, beside the loop's own error in that dtype.

`draw` makes the tensors of a problem, `Expected.of` runs the op's first backend (the loop) on them twice, in float64 and
in the problem's dtypes, and `Expected.difference` says what is wrong with somebody's outputs. Forward and backward are
problems of their own: a backward pass is compared on the residuals of the loop's forward pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.op import Backend, Config, Op
from kernels.problem import Arg, Problem

# An error may be this many times the loop's own, plus so many ulp of the output's scale: a sum taken in another order
# errs differently, and a result rounded once more errs by an ulp.
MULTIPLE = 4.0
ULPS = 2.0


@dataclass(frozen=True, eq=False)
class Inputs:
    """A problem with its tensors: those of `op.names(direction)` in order, and cu_seqlens."""

    op: Op
    problem: Problem
    tensors: tuple[Tensor | None, ...]
    cu_seqlens: Tensor | None

    def call(self, backend: Backend, config: Config) -> Callable[[], tuple[Tensor | None, ...]]:
        """The backend's own function with its arguments: what is compared and timed."""
        options = {name: self.problem.options[name] for name in self.op.options}
        if self.problem.direction == "backward":
            options["needs"] = self.needs
        function = backend.function(self.problem.direction)
        return partial(function, *self.tensors, self.cu_seqlens, **options, config=config)

    @property
    def needs(self) -> tuple[bool, ...]:
        """Which inputs get a gradient: all that are there and can have one."""
        present = dict(zip(self.op.names("backward"), self.tensors))
        return tuple(
            arg.name in self.op.gradients and present.get(self.op.gradients[arg.name]) is not None for arg in self.op.inputs
        )

    @property
    def results(self) -> tuple[Arg, ...]:
        """What the call returns: the op's outputs, or in backward one gradient an input."""
        if self.problem.direction == "forward":
            return self.op.outputs
        return tuple(replace(arg, name=f"d{arg.name}") for arg in self.op.inputs)

    def wide(self) -> Inputs:
        """The same numbers in float64; on the CPU where the device has no float64."""
        device = torch.device("cpu") if self.problem.device.type == "mps" else self.problem.device

        def widen(tensor: Tensor | None) -> Tensor | None:
            dtype = torch.float64 if tensor is not None and tensor.is_floating_point() else None
            return None if tensor is None else tensor.to(device, dtype)

        dtypes = {name: torch.float64 if dtype.is_floating_point else dtype for name, dtype in self.problem.dtypes.items()}
        problem = replace(self.problem, dtypes=dtypes, device=device)
        return Inputs(self.op, problem, tuple(map(widen, self.tensors)), widen(self.cu_seqlens))


def pose(
    op: Op, direction: str, sizes: Mapping[str, int], *, dtype: torch.dtype, device: torch.device, **facts: Any
) -> Problem:
    """The problem that calling the op with sampled tensors of these sizes poses. facts: the op's options, and what
    its `sample` takes: decay_dtype, pairs, initial_state; packed=True cuts T into N sequences.

    Raises:
        ValueError, TypeError: sizes or facts do not fit the op.
    """
    sampled = _sample(op, sizes, facts, dtype=dtype, device=torch.device("meta"))
    cu_seqlens = None
    if facts.get("packed"):
        cu_seqlens = torch.empty(sizes["N"] + 1, dtype=torch.int32, device="meta")
    options = [facts.get(name, default) for name, default in op.options.items()]
    args = [*(sampled[arg.name] for arg in op.inputs), cu_seqlens, *options, "auto"]
    if direction == "backward":
        outputs = dict(zip((out.name for out in op.outputs), op.empty_outputs(args)))
        residuals = [{**sampled, **outputs}[name] for name in op.residuals]
        args = [*[None] * len(op.outputs), *residuals, cu_seqlens, *options, 0, "auto"]
    return replace(op.problem_of(direction, args), device=device)


def draw(op: Op, problem: Problem, *, seed: int = 0, by: str | None = None) -> Inputs:
    """Tensors that pose the problem. by: the backend whose forward pass gives a backward pass its residuals, or "auto";
    by default the loop."""
    generator = torch.Generator().manual_seed(seed)
    dtypes = [(_arg(op, name).role, dtype) for name, dtype in problem.dtypes.items()]
    dtype = next(dtype for role, dtype in dtypes if role == "sequence")
    decay = next((dtype for role, dtype in dtypes if role == "decay"), dtype)
    facts = {"generator": generator, "decay_dtype": decay, **problem.options}
    sampled = _sample(op, problem.sizes, facts, dtype=dtype, device=problem.device)
    cu_seqlens = None
    if problem.options["packed"]:
        cu_seqlens = cuts(problem.sizes["T"], problem.sizes["N"], generator).to(problem.device)
    inputs = tuple(sampled[arg.name] for arg in op.inputs)
    if problem.direction == "forward":
        return Inputs(op, problem, inputs, cu_seqlens)
    options = [problem.options[name] for name in op.options]
    with torch.no_grad():
        outputs = op(*inputs, cu_seqlens, *options, by or op.backends[0].name)
    known = {**sampled, **dict(zip((out.name for out in op.outputs), outputs))}
    gradients = [torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in outputs]
    return Inputs(op, problem, (*gradients, *(known[name] for name in op.residuals)), cu_seqlens)


def cuts(length: int, sequences: int, generator: torch.Generator | None = None) -> Tensor:
    """cu_seqlens [N + 1] of uneven sequences; where there are more than two, the second is empty."""
    inner = torch.randint(length + 1, (sequences - 1,), generator=generator).sort().values
    if sequences > 2:
        inner[1] = inner[0]
    return torch.cat([torch.tensor([0]), inner, torch.tensor([length])]).to(torch.int32)


@dataclass(frozen=True)
class Expected:
    """What the loop gives in float64, and for each result how large an error may be: at its worst, and on average."""

    results: tuple[Arg, ...]
    exact: tuple[Tensor | None, ...]
    dtypes: tuple[torch.dtype | None, ...]
    allowed: tuple[tuple[float, float], ...]

    @staticmethod
    def of(inputs: Inputs) -> Expected:
        """Runs the loop in float64 and in the problem's own dtypes."""
        loop = inputs.op.backends[0]
        with torch.no_grad():
            exact = inputs.wide().call(loop, {})()
            own = inputs.call(loop, {})()
        allowed = []
        for right, rounded in zip(exact, own):
            if right is None or rounded is None:
                allowed.append((0.0, 0.0))
                continue
            worst, average = errors(rounded, right)
            largest, size = _sizes(right)
            ulp = torch.finfo(rounded.dtype).eps
            allowed.append((MULTIPLE * worst + ULPS * ulp * largest, MULTIPLE * average + ULPS * ulp * size))
        dtypes = tuple(None if tensor is None else tensor.dtype for tensor in own)
        return Expected(inputs.results, tuple(exact), dtypes, tuple(allowed))

    def difference(self, outputs: Any) -> str | None:
        """None if the outputs are right, else what is wrong with the first that is not."""
        if not isinstance(outputs, (tuple, list)) or len(outputs) != len(self.exact):
            count = len(outputs) if isinstance(outputs, (tuple, list)) else type(outputs).__name__
            return f"returned {count}, expected {len(self.exact)} tensors"
        for arg, got, exact, dtype, allowed in zip(self.results, outputs, self.exact, self.dtypes, self.allowed):
            wrong = _wrong(got, exact, dtype, allowed)
            if wrong is not None:
                return f"{arg.name} {wrong}"
        return None


def errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """The largest absolute error and the root of the mean square; infinite where something is not finite."""
    if exact.numel() == 0:
        return 0.0, 0.0
    gap = got.detach().to(exact.device, exact.dtype) - exact
    worst, average = _sizes(gap)
    return (worst, average) if bool(gap.isfinite().all()) else (float("inf"), float("inf"))


def _wrong(got: Any, exact: Tensor | None, dtype: torch.dtype | None, allowed: tuple[float, float]) -> str | None:
    if exact is None:
        return None if got is None else "is a tensor where nothing is expected"
    if not isinstance(got, Tensor):
        return f"is {type(got).__name__}, expected a tensor"
    if got.shape != exact.shape:
        return f"has shape {list(got.shape)}, expected {list(exact.shape)}"
    if got.dtype != dtype:
        return f"is {got.dtype}, expected {dtype}"
    if not bool(got.isfinite().all()):
        return "is not finite"
    found = errors(got, exact)
    for error, limit, what in zip(found, allowed, ("at its worst", "on average")):
        if not error <= limit:
            return f"is off by {error:.2g} {what}, allowed {limit:.2g}"
    return None


def _sizes(tensor: Tensor) -> tuple[float, float]:
    """The largest absolute value, and the root of the mean square."""
    if tensor.numel() == 0:
        return 0.0, 0.0
    wide = tensor.detach().double()
    return float(wide.abs().max()), float(wide.square().mean().sqrt())


def _sample(op: Op, sizes: Mapping[str, int], facts: Mapping[str, Any], **given: Any) -> dict[str, Tensor | None]:
    """op.sample with those of the facts that it takes; optional tensors that the facts rule out are left out."""
    accepted = inspect.signature(op.sample).parameters
    sampled = op.sample(dict(sizes), **given, **{name: fact for name, fact in facts.items() if name in accepted})
    for arg in op.inputs:
        if arg.optional and facts.get(arg.name) is False:
            sampled[arg.name] = None
    return sampled


def _arg(op: Op, name: str) -> Arg:
    return next(arg for arg in (*op.inputs, *op.outputs) if arg.name == name)
