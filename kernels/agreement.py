"""What right means: an implementation's error against the loop in float64, beside the loop's own error in that dtype.

`draw` makes the tensors of a problem, `Expected.of` runs the op's first backend (the loop) on them twice, in float64
and in the problem's dtypes, and `Expected.difference` says what is wrong with somebody's outputs. Forward and backward
are problems of their own: a backward pass is compared on the residuals of the loop's forward pass.
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
from kernels.problem import Arg, Problem, state_dtype

# An error may be this many times the loop's own, plus so many ulp of the output's scale: a sum taken in another order
# errs differently, and a result rounded once more errs by an ulp. The gradient of a parameter sums over all rows: of n
# partial sums every one is rounded, which makes √n ulp. A logarithm among the residuals was rounded too, and the loop
# does without it.
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
        like = [self.op.gradients.get(arg.name, "") for arg in self.op.inputs]
        return tuple(present.get(residual) is not None for residual in like)

    @property
    def results(self) -> tuple[Arg, ...]:
        """What the call returns: the op's outputs, or in backward one gradient an input."""
        if self.problem.direction == "forward":
            return self.op.outputs
        return tuple(replace(arg, name=f"d{arg.name}") for arg in self.op.inputs)

    @property
    def dtype(self) -> torch.dtype:
        """Of the sequences."""
        return sequence_dtype(self.op, self.problem)

    @property
    def largest_logarithm(self) -> float:
        """The largest value that a backward pass receives as a logarithm, at least 1; 0 if it receives none."""
        logarithms = {arg.name for arg in self.op.outputs if not arg.differentiable}
        given = zip(self.op.names(self.problem.direction), self.tensors)
        return max((max(_sizes(tensor)[0], 1.0) for name, tensor in given if name in logarithms), default=0.0)

    def loop(self) -> tuple[Tensor | None, ...]:
        """What the op's first backend makes of them."""
        with torch.no_grad():
            return tuple(self.call(self.op.backends[0], {})())

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same numbers, all in that dtype; on the CPU where the device has no float64."""
        device = torch.device("cpu") if self.problem.device.type == "mps" else self.problem.device

        def convert(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)

        problem = replace(self.problem, dtypes=dict.fromkeys(self.problem.dtypes, dtype), device=device)
        return Inputs(self.op, problem, tuple(map(convert, self.tensors)), convert(self.cu_seqlens))


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
    dtype = sequence_dtype(op, problem)
    decay = next((d for name, d in problem.dtypes.items() if _arg(op, name).role == "decay"), dtype)
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
    gradients = [
        torch.randn(out.shape, generator=generator, device="cpu").to(out.device, out.dtype)
        if arg.differentiable
        else None
        for arg, out in zip(op.outputs, outputs)
    ]
    return Inputs(op, problem, (*gradients, *(known[name] for name in op.residuals)), cu_seqlens)


def cuts(length: int, sequences: int, generator: torch.Generator | None = None) -> Tensor:
    """cu_seqlens [N + 1] of uneven sequences; where there are more than two, the second is empty."""
    inner = torch.randint(length + 1, (sequences - 1,), generator=generator, device="cpu").sort().values
    if sequences > 2:
        inner[1] = inner[0]
    return torch.cat([inner.new_tensor([0]), inner, inner.new_tensor([length])]).to(torch.int32)


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
        exact, own = inputs.to(torch.float64).loop(), inputs.loop()
        losses = [errors(rounded, right) for rounded, right in zip(own, exact)]
        # the mean square of n errors tells how large they are to one part in √n only
        counts = [max(1, 0 if right is None else right.numel()) for right in exact]
        if inputs.dtype == torch.float64:
            # nothing wider stands beside float64: the loop's error is taken to be that in float32, scaled
            narrow = inputs.to(torch.float32)
            shrink = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            pairs = zip(narrow.loop(), narrow.to(torch.float64).loop())
            losses = [(shrink * worst, shrink * average) for worst, average in (errors(*pair) for pair in pairs)]
        losses = [(worst, average * (1 + count**-0.5)) for (worst, average), count in zip(losses, counts)]
        dtypes = tuple(None if tensor is None else tensor.dtype for tensor in own)
        scales = [_sizes(right) for right in exact]
        noise = torch.finfo(state_dtype(inputs.dtype)).eps * inputs.largest_logarithm
        allowed = []
        for arg, dtype in zip(inputs.results, dtypes):
            # results of one role share error and scale: a gradient that cancels is no more exact than those beside it
            alike = [n for n, other in enumerate(inputs.results) if (other.role, dtypes[n]) == (arg.role, dtype)]
            ulp = 0.0 if dtype is None else torch.finfo(dtype).eps
            rows = 0 if {"B", "N"} & set(arg.letters) else inputs.problem.sizes["B"] * inputs.problem.sizes["T"]
            summed = rows**0.5 * torch.finfo(state_dtype(inputs.dtype)).eps
            limits = []
            for kind in (0, 1):
                loss, scale = max(losses[n][kind] for n in alike), max(scales[n][kind] for n in alike)
                limit = MULTIPLE * (loss + noise * scale) + ULPS * ulp * scale + summed * max(s[kind] for s in scales)
                # a logarithm that only a backward pass sees: its error is the relative error of what is made from it
                limits.append(limit if arg.differentiable else max(limit, ULPS * torch.finfo(inputs.dtype).eps))
            allowed.append((limits[0], limits[1]))
        return Expected(inputs.results, exact, dtypes, tuple(allowed))

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


def sequence_dtype(op: Op, problem: Problem) -> torch.dtype:
    return next(dtype for name, dtype in problem.dtypes.items() if _arg(op, name).role == "sequence")


def errors(got: Tensor | None, exact: Tensor | None) -> tuple[float, float]:
    """The largest absolute error and the root of the mean square; infinite where only one of the two is finite."""
    if got is None or exact is None:
        return 0.0, 0.0
    got = got.detach().to(exact.device, exact.dtype)
    gap = torch.where(got == exact, 0.0, got - exact)
    return _sizes(gap) if bool(gap.isfinite().all()) else (float("inf"), float("inf"))


def _wrong(got: Any, exact: Tensor | None, dtype: torch.dtype | None, allowed: tuple[float, float]) -> str | None:
    if exact is None:
        return None if got is None else "is a tensor where nothing is expected"
    if not isinstance(got, Tensor):
        return f"is {type(got).__name__}, expected a tensor"
    if got.shape != exact.shape:
        return f"has shape {list(got.shape)}, expected {list(exact.shape)}"
    if got.dtype != dtype:
        return f"is {got.dtype}, expected {dtype}"
    found = errors(got, exact)
    if found[0] == float("inf"):
        return "is not finite"
    for error, limit, what in zip(found, allowed, ("at its worst", "on average")):
        if not error <= limit:
            return f"is off by {error:.2g} {what}, allowed {limit:.2g}"
    return None


def _sizes(tensor: Tensor | None) -> tuple[float, float]:
    """The largest absolute value, and the root of the mean square, of what is finite."""
    if tensor is None or tensor.numel() == 0:
        return 0.0, 0.0
    wide = torch.where(tensor.isfinite(), tensor.detach(), 0.0).double()
    return float(wide.abs().max()), float(wide.square().mean().sqrt())


def _sample(op: Op, sizes: Mapping[str, int], facts: Mapping[str, Any], **given: Any) -> dict[str, Tensor | None]:
    """op.sample with those of the facts that it takes; optional tensors that the facts rule out are left out."""
    accepted = inspect.signature(op.sample).parameters
    # random numbers come from a generator on the CPU, whatever torch.set_default_device says
    with torch.device("cpu"):
        sampled = op.sample(dict(sizes), **given, **{name: fact for name, fact in facts.items() if name in accepted})
    for arg in op.inputs:
        if arg.optional and facts.get(arg.name) is False:
            sampled[arg.name] = None
    return sampled


def _arg(op: Op, name: str) -> Arg:
    return next(arg for arg in (*op.inputs, *op.outputs) if arg.name == name)
