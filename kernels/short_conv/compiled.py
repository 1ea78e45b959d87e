"""The loops over the taps under torch.compile, each fused into a few kernels, for every device that Inductor knows.

Gathering the extended rows costs a copy of x. By default on CPU, where generating the code takes longer than most
programs would gain, and where there is no compiler, the loops run as they are. See formula.py for the equations and the
arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from kernels import inductor
from kernels.problem import Problem
from kernels.short_conv import formula


def configs(problem: Problem) -> Sequence[Mapping[str, int]]:
    if problem.device.type != "cpu":
        return [{"inductor": 1}]
    return [{"inductor": 0}] if inductor.reason("cpu") else [{"inductor": 0}, {"inductor": 1}]


def forward(*tensors: Tensor | None, config: Mapping[str, int], **options: Any) -> tuple[Tensor, Tensor]:
    """(y, final_state)"""
    return formula.forward(*tensors, run=_run(config), **options)  # type: ignore[arg-type]


def backward(*tensors: Tensor | None, config: Mapping[str, int], **options: Any) -> tuple[Tensor | None, ...]:
    """(dx, dweight, dbias, dinitial_state)"""
    return formula.gradients(*tensors, run=_run(config), **options)  # type: ignore[arg-type]


def _run(config: Mapping[str, int]) -> Callable[..., Any]:
    return inductor.compiled if config["inductor"] else formula.directly
