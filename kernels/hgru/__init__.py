"""HGRN's recurrence: the forget gate from its raw projection, and the scan that it drives, real and complex."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.hgru.gates import ACTIVATIONS, gates
from kernels.loop import differentiable
from kernels.op import Backend, Cost, Op
from kernels.problem import Arg, Problem, state_dtype
from kernels.scan import scan


def hgru(
    i: Tensor,
    f: Tensor,
    lower_bound: Tensor | None = None,
    theta: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    activation: str = "silu",
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Hierarchically gated recurrent unit: raw projections in, hidden states out.

        λ[t] = γ + (1 − γ) σ(f[t]),   h[t] = λ[t] e^{iθ} h[t-1] + (1 − λ[t]) act(i[t])

    channel by channel, h[-1] = initial_state and final_state = h[T-1]. 1 − λ is computed as (1 − γ) σ(−f): nothing
    cancels where the gate saturates.

    Args:
        i: inputs [B, T, D] in float64, float32, float16 or bfloat16; or [B, T, D, 2]: complex states as (real,
            imaginary) pairs. The activation is applied to every number.
        f: the forget gate before its sigmoid, [B, T, D] in i's dtype; the parts of a pair share it.
        lower_bound: γ [D], 0 <= γ < 1, in the state dtype (float64 for float64 i, else float32), or None for zeros.
        theta: the angle θ [D] by which a pair is rotated at every step, in the state dtype; None for no rotation.
        initial_state: [N, D], or [N, D, 2] beside pairs, in the state dtype, or None for zeros. N is B, or the number
            of packed sequences.
        activation: "silu"; "identity"; "tanh"; "sigmoid"; or "positive": x + ½ for x >= 0 and σ(x) below (minGRU).
        reverse: time runs from T-1 down to 0; the initial state enters at T-1, the final state leaves at 0.
        cu_seqlens: [N + 1] int32 or int64, needs B = 1: rows cu_seqlens[n] to cu_seqlens[n + 1] are sequence n, which
            has its own initial and final state; a sequence may be empty, its final state is then its initial state.
        backend: "auto" (the tuned choice, else the last listed that can run) or a name from `OP.backends`; a named
            backend never falls back.

    Returns:
        h like i, and final_state [N, D] or [N, D, 2] in the state dtype, in which gates and states are computed.

    Every input has a gradient, through h and through final_state, and a second one. The backward pass computes the
    gates again: i, f and h are all that is kept.

    Raises:
        TypeError: a dtype does not fit. ValueError: a shape, a device, cu_seqlens or a name does not fit, or theta
        comes without pairs. RuntimeError: the named backend cannot run this problem; the message has its reasons.

    Source: Qin, Yang, Zhong 2023, "Hierarchically gated recurrent neural network for sequence modeling" (arXiv
    2311.04823).
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"hgru: no activation {activation!r}; there are {', '.join(map(repr, ACTIVATIONS))}")
    if theta is not None and i.ndim == 3:
        raise ValueError(f"hgru: theta rotates pairs, expected i as [B, T, D, 2], but i has 3 axes {list(i.shape)}")
    h, final_state = OP(i, f, lower_bound, theta, initial_state, cu_seqlens, activation, reverse, backend)
    return h, final_state


def _sample(
    sizes: dict[str, int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    pairs: bool = False,
    lower_bound: bool = True,
    theta: bool = False,
    initial_state: bool = True,
) -> dict[str, Tensor | None]:
    """Unit-variance inputs and states, gates spread over (0, 1), bounds and angles as layers have them. Theta comes
    with pairs."""
    B, T, D = (sizes[letter] for letter in "BTD")
    two, wide = [2] if pairs or theta else [], state_dtype(dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform() -> Tensor:
        return torch.rand(D, generator=generator, dtype=torch.float64)

    return {
        "i": normal(B, T, D, *two).to(device, dtype),
        "f": (1 + 2 * normal(B, T, D)).to(device, dtype),
        "lower_bound": (0.9 * uniform()).to(device, wide) if lower_bound else None,
        "theta": (torch.pi * uniform()).to(device, wide) if two else None,
        "initial_state": normal(sizes.get("N", B), D, *two).to(device, wide) if initial_state else None,
    }


def _cost(problem: Problem) -> Cost:
    """Forward reads i, f and writes h; backward reads i, f, h, dh and writes di, df. A sigmoid counts as one flop."""
    numbers = problem.sizes["B"] * problem.sizes["T"] * problem.sizes["D"]
    parts = 2 if problem.options["pairs"] else 1
    forward = problem.direction == "forward"
    tensors, flops = (2 * parts + 1, 4 + 5 * parts) if forward else (4 * parts + 2, 9 + 9 * parts)
    return Cost(numbers * tensors * problem.dtypes["i"].itemsize, numbers * flops)


def _forward(
    i: Tensor,
    f: Tensor,
    lower_bound: Tensor | None,
    theta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    activation: str,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """In terms of the public scan, which can be differentiated twice."""
    decay, x = gates(i, f, lower_bound, theta, activation)
    # pairs stay pairs: the operator takes them as they are
    h, final_state = scan(decay, x, initial_state, reverse=reverse, cu_seqlens=cu_seqlens)
    return h.to(i.dtype), final_state


def _differentiable_backward(
    dh: Tensor | None,
    dfinal_state: Tensor | None,
    i: Tensor,
    f: Tensor,
    h: Tensor,
    *others: Tensor | None,
    backend: str,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    return differentiable(_forward, 2, dh, dfinal_state, i, f, *others, **options)


OP = Op(
    name="hgru",
    inputs=(
        Arg("i", "B T D", pairs=True),
        # a share of nothing: what some activations make of 0 is not 0
        Arg("f", "B T D", nothing=100.0),
        Arg("lower_bound", "D", "state", optional=True),
        Arg("theta", "D", "state", optional=True),
        Arg("initial_state", "N D", "state", optional=True, pairs=True),
    ),
    outputs=(Arg("h", "B T D", pairs=True), Arg("final_state", "N D", "state", pairs=True)),
    options={"activation": "silu", "reverse": False},
    residuals=("i", "f", "h", "lower_bound", "theta", "initial_state"),
    gradients={name: name for name in ("i", "f", "lower_bound", "theta", "initial_state")},
    backends=(
        Backend("naive", "kernels.hgru.naive"),
        Backend("compiled", "kernels.hgru.compiled"),
        Backend("native", "kernels.hgru.native", devices=("cpu",)),
        Backend("triton", "kernels.hgru.triton", devices=("cuda",)),
        Backend("fla", "kernels.hgru.fla", devices=("cuda",), foreign=True),
    ),
    sample=_sample,
    cost=_cost,
    differentiable_backward=_differentiable_backward,
)
