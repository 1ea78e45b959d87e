"""Adapters to flash-linear-attention's kernels, and what they share: an adapter is a backend with `foreign=True`.

Theirs compete where they were compared and measured on the device, and are never chosen by rule. Importing their
package takes seconds and waits for the first call; `cannot` and `configs` only look whether it is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from kernels.problem import Problem

# The distribution that has fla.ops; flash-linear-attention has the layers.
DISTRIBUTION = "fla-core"

# Importing their package and compiling every config that their autotuner chooses from, before the first call returns;
# a chunked function launches many kernels. Guesses on the safe side: who takes longer than that is taken to hang.
RECURRENT_SECONDS, CHUNKED_SECONDS = 40.0, 150.0

# Tensors by name, as theirs are called; outputs as the op has them.
Run = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Kernel:
    """One of their functions, and what it takes.

    path: "fla.ops.gla:chunk_gla". decays: which of "none", "head" and "key" it takes. decay: its argument for them.
    gradients: it has a backward pass. narrow: it takes 16-bit sequences only. packed: and packed ones. keys: the most.
    """

    path: str
    decays: tuple[str, ...] = ()
    decay: str = "g"
    gradients: bool = True
    narrow: bool = False
    packed: bool = True
    keys: int | None = None

    @property
    def name(self) -> str:
        return self.path.partition(":")[2]

    def cannot(self, problem: Problem) -> list[str]:
        """Why it does not fit the problem; empty if it does."""
        reasons = []
        decays = decays_of(problem)
        if self.decays and decays not in self.decays:
            reasons.append(f"decays: {decays}; takes {' or '.join(self.decays)}")
        if problem.direction == "backward" and not self.gradients:
            reasons.append("has no backward pass")
        if self.narrow and torch.float32 in problem.dtypes.values():
            reasons.append("takes no float32")
        if problem.options["packed"] and not self.packed:
            reasons.append("takes no packed sequences")
        if self.keys is not None and problem.sizes["K"] > self.keys:
            reasons.append(f"axis K is {problem.sizes['K']}; at most {self.keys}")
        return [f"{self.name}: {', '.join(reasons)}"] if reasons else []


def decays_of(problem: Problem) -> str:
    """Of an op of matrix states: "none", or one for each "head" or "key"."""
    if not problem.options.get("log_decay"):
        return "none"
    return "head" if problem.sizes["J"] == 1 else "key"


@cache
def installed() -> str | None:
    """The version of their package, without importing it."""
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return None


def cannot(problem: Problem, kernels: Sequence[Kernel]) -> list[str]:
    """Why none of the kernels can run the problem; empty if one can."""
    if installed() is None:
        return [f"{DISTRIBUTION} is not installed"]
    if torch.float64 in problem.dtypes.values():
        return ["computes in float32, the tensors are float64"]
    reasons = [kernel.cannot(problem) for kernel in kernels]
    return [] if any(not each for each in reasons) else ["; ".join(why for each in reasons for why in each)]


def configs(problem: Problem, kernels: Sequence[Kernel]) -> list[dict[str, str]]:
    """A candidate for each kernel that fits. The version is part of it: what another one did says nothing."""
    fit = [kernel for kernel in kernels if not kernel.cannot(problem)]
    return [{"kernel": kernel.name, "version": installed() or ""} for kernel in fit]


def startup(problem: Problem, config: Mapping[str, str]) -> float:
    """Seconds until the first call returns."""
    return RECURRENT_SECONDS if "recurrent" in config["kernel"] else CHUNKED_SECONDS


@cache
def function(path: str) -> Callable[..., Any]:
    """What "package.module:name" says; imports it."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def chosen(config: Mapping[str, str], kernels: Sequence[Kernel]) -> Kernel:
    return next(kernel for kernel in kernels if kernel.name == config["kernel"])


def bounds(cu_seqlens: Tensor | None) -> Tensor | None:
    """An int64 copy of their own: their functions remember what they made of a tensor, and this may be written to."""
    return None if cu_seqlens is None else cu_seqlens.to(torch.int64, copy=True)


def matrix_state(config: Mapping[str, str], kernels: Sequence[Kernel], cu_seqlens: Tensor | None, scale: float) -> Run:
    """The chosen kernel as a function of an op's own q, k, v, beta, log_decay and initial_state, by name."""
    kernel, cu_seqlens = chosen(config, kernels), bounds(cu_seqlens)
    theirs = function(kernel.path)

    def run(*, log_decay: Tensor | None, **tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        decays = {}
        if log_decay is not None:
            per_head = log_decay.shape[3] == 1 and "head" in kernel.decays
            decays[kernel.decay] = log_decay.squeeze(3) if per_head else log_decay
        y, final = theirs(**tensors, **decays, scale=scale, output_final_state=True, cu_seqlens=cu_seqlens)
        return y.contiguous(), final

    return run


def gradients(
    name: str,
    run: Run,
    inputs: dict[str, Tensor | None],
    needs: Sequence[bool],
    given: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """The gradients of run(**inputs) from those of its outputs, each None where `needs` says so: runs it once more.

    Raises:
        RuntimeError: none came back for an input that should have one.
    """
    wanted = {key: t for (key, t), needed in zip(inputs.items(), needs) if needed and t is not None}
    with torch.enable_grad():
        leaves = {key: t.detach().requires_grad_() for key, t in wanted.items()}
        outputs = run(**{**inputs, **leaves})
        pairs = [(out, g) for out, g in zip(outputs, given) if g is not None]
        found = torch.autograd.grad(
            [out for out, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True
        )
    for key, gradient in zip(leaves, found):
        if gradient is None:
            raise RuntimeError(f"{name} returns no gradient of {key}")
    made = dict(zip(leaves, found))
    return tuple(
        made[key].to(t.dtype).contiguous() if key in made and t is not None else None for key, t in inputs.items()
    )
