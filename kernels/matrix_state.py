"""What gla, delta_rule and dplr share: ops with a state [K, V] for each head that decays per head or per key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.loop import Loop, Step, StepBackward, wanted
from kernels.packing import Packing
from kernels.problem import Arg, Problem, number, state_dtype

QKV = (Arg("q", "B T H K"), Arg("k", "B T H K"), Arg("v", "B T H V"))
# J is K, or 1 where the keys of a head share their decay
DECAY_AND_STATE = (
    Arg("log_decay", "B T H J", "state", optional=True),
    Arg("initial_state", "N H K V", "state", optional=True),
)
OUTPUTS = (Arg("y", "B T H V"), Arg("final_state", "N H K V", "state"))


def with_axis(op: str, log_decay: Tensor | None, q: Tensor) -> Tensor | None:
    """[B, T, H, J] of [B, T, H] or [B, T, H, K].

    Raises:
        ValueError: a decay for each key, but not as many as q has.
    """
    if not isinstance(log_decay, Tensor):
        return log_decay
    if log_decay.ndim == 3:
        return log_decay.unsqueeze(-1)
    if log_decay.ndim == 4 and isinstance(q, Tensor) and q.ndim == 4 and log_decay.shape[3] != q.shape[3]:
        raise ValueError(f"{op}: axis K is {q.shape[3]} in q but {log_decay.shape[3]} in log_decay")
    return log_decay


def scale_of(op: str, scale: float | None, q: Tensor) -> float:
    """As given, or K^−½. What has no K is the op's to refuse, by name."""
    if scale is not None:
        return number(op, "scale", scale)
    try:
        return q.shape[-1] ** -0.5
    except (AttributeError, IndexError, ZeroDivisionError):
        return 1.0


class Sampler:
    """Draws the tensors of a problem: unit-variance rows and states, decays spread over (0, 1), mostly near 1."""

    def __init__(
        self,
        sizes: Mapping[str, int],
        dtype: torch.dtype,
        device: torch.device | str,
        generator: torch.Generator | None,
    ) -> None:
        self.sizes = {**sizes, "N": sizes.get("N", sizes["B"]), "J": sizes["K"] if sizes.get("J", 2) > 1 else 1}
        self.dtype, self.device, self.generator = dtype, device, generator

    def normal(self, axes: str) -> Tensor:
        shape = [self.sizes[letter] for letter in axes.split()]
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def rows(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype)

    def wide(self, x: Tensor) -> Tensor:
        return x.to(self.device, state_dtype(self.dtype))

    def log_decay(self, there: bool) -> Tensor | None:
        return self.wide(F.logsigmoid(3 + 2 * self.normal("B T H J"))) if there else None

    def initial_state(self, there: bool) -> Tensor | None:
        return self.wide(self.normal("N H K V")) if there else None


def decay_bytes(problem: Problem) -> int:
    """Of the log decays of one token and head."""
    wide = state_dtype(problem.dtypes["q"]).itemsize
    return problem.sizes["J"] * wide if problem.options["log_decay"] else 0


def forward(
    step: Step,
    rows: Sequence[Tensor | None],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    parameters: Sequence[Tensor | None] = (),
) -> tuple[Tensor, Tensor]:
    """(y [B, T, H, V], final_state [N, H, K, V]) by the loop; the first three rows are q, k, v."""
    y, final = _loop(step, rows, initial_state, cu_seqlens, parameters).forward()
    return (scale * y).to(_v(rows).dtype), final


def backward(
    step: Step,
    step_backward: StepBackward,
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    rows: Sequence[Tensor | None],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    needs: Sequence[bool],
    parameters: Sequence[Tensor | None] = (),
) -> tuple[Tensor | None, ...]:
    """The gradients of the rows, initial_state and the parameters, each None where `needs` says so."""
    loop = _loop(step, rows, initial_state, cu_seqlens, parameters)
    dy = torch.zeros_like(_v(rows)) if dy is None else dy
    drows, dinitial, dparameters = loop.backward(step_backward, scale * dy.to(loop.initial.dtype), dfinal_state)
    return wanted((*drows, dinitial, *dparameters), (*rows, initial_state, *parameters), needs)


def _loop(
    step: Step,
    rows: Sequence[Tensor | None],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    parameters: Sequence[Tensor | None],
) -> Loop:
    q, v = rows[0], _v(rows)
    assert q is not None
    packing = Packing.of(q, cu_seqlens, False)
    if initial_state is None:
        shape = packing.sequences, q.shape[2], q.shape[3], v.shape[3]
        initial_state = q.new_zeros(shape, dtype=state_dtype(q.dtype))
    return Loop(step, rows, initial_state, packing, parameters)


def _v(rows: Sequence[Tensor | None]) -> Tensor:
    v = rows[2]
    assert v is not None
    return v
