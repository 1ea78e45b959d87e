"""The gates as one generated function, and the chunks of `kernels.scan.compiled`, for every device that Inductor knows.

Decays and inputs stand between the two in the state dtype. By default on CPU, and where there is no compiler,
everything runs as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from kernels import inductor
from kernels.hgru.gates import gates, gates_backward
from kernels.loop import wanted
from kernels.problem import Problem, state_dtype
from kernels.scan import compiled as scan


def configs(problem: Problem) -> Sequence[Mapping[str, int]]:
    return scan.configs(problem)


def forward(
    i: Tensor,
    f: Tensor,
    lower_bound: Tensor | None,
    theta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    activation: str,
    reverse: bool,
    config: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    """h like i, and final_state [N, D] or [N, D, 2] in the state dtype."""
    bounds = _given(lower_bound, i), _given(theta, i)
    decay, x = _run(gates, config, i, f, *bounds, activation=activation)
    h, final_state = scan.forward(decay, x, initial_state, cu_seqlens, reverse=reverse, config=config)
    return h.to(i.dtype), final_state


def backward(
    dh: Tensor | None,
    dfinal_state: Tensor | None,
    i: Tensor,
    f: Tensor,
    h: Tensor,
    lower_bound: Tensor | None,
    theta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    activation: str,
    reverse: bool,
    needs: tuple[bool, ...],
    config: Mapping[str, int],
) -> tuple[Tensor | None, ...]:
    """(di, df, dlower_bound, dtheta, dinitial_state), each None where `needs` says so."""
    wide = state_dtype(i.dtype)
    bounds = _given(lower_bound, i), _given(theta, i)
    decay, _ = _run(gates, config, i, f, *bounds, activation=activation)
    da, dx, dinitial = scan.backward(
        None if dh is None else dh.to(wide),
        dfinal_state,
        decay,
        h.to(wide),
        initial_state,
        cu_seqlens,
        reverse=reverse,
        needs=(True, True, needs[4]),
        config=config,
    )
    found = _run(gates_backward, config, i, f, da, dx, *bounds, activation=activation)
    return wanted((*found, dinitial), (i, f, lower_bound, theta, initial_state), needs)


def _given(bound: Tensor | None, like: Tensor) -> Tensor:
    """The lower bound or the angles [D]; zeros, which come to the same, where there are none."""
    return like.new_zeros(like.shape[2], dtype=state_dtype(like.dtype)) if bound is None else bound


def _run(function: Callable[..., Any], config: Mapping[str, int], *tensors: Tensor | None, activation: str) -> Any:
    if config["inductor"]:
        return inductor.compiled(function, *tensors, activation=activation)  # type: ignore[arg-type]
    return function(*tensors, activation=activation)
