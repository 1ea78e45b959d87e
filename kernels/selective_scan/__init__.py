"""The selective scan of Mamba (S6): a diagonal state-space model whose step, input and output depend on the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.loop import differentiable
from kernels.op import Backend, Cost, Op
from kernels.problem import Arg, Problem, state_dtype
from kernels.selective_scan import naive


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """K state-space channels for each channel of the input, with a step size of its own at every token.

        h[t] = exp(Δ[t] A) h[t-1] + Δ[t] x[t] B[t],   y[t] = C[t] · h[t] + D x[t]

    for each channel d: h[t] in R^K, Δ[t], x[t], D numbers, A in R^K, and B[t], C[t] in R^K the same for all channels.
    h[-1] = initial_state and final_state = h[T-1].

    Args:
        x: inputs [B, T, D] in float64, float32, float16 or bfloat16.
        delta: step sizes Δ >= 0 (after their softplus), [B, T, D] in x's dtype or the state dtype.
        A: [D, K], negative, in the state dtype (float64 for float64 x, else float32).
        B, C: [B, T, K] in x's dtype.
        D: [D] in the state dtype, or None for zeros.
        initial_state: [N, D, K] in the state dtype, or None for zeros. N is B, or the number of packed sequences.
        cu_seqlens: [N + 1] int32 or int64, needs B = 1: rows cu_seqlens[n] to cu_seqlens[n + 1] are sequence n, which
            has its own initial and final state; a sequence may be empty, its final state is then its initial state.
        backend: "auto" (the tuned choice, else the last listed that can run) or "naive", "compiled", "native",
            "triton"; a named backend never falls back.

    Returns:
        y [B, T, D] in x's dtype, and final_state [N, D, K] in the state dtype, in which sums are accumulated.

    Every input has a gradient, through y and through final_state, and a second one.

    Raises:
        TypeError: a dtype does not fit. ValueError: a shape, device, cu_seqlens or backend name does not fit.
        RuntimeError: the named backend cannot run this problem; the message has its reasons.

    Source: Gu & Dao 2023, "Mamba: linear-time sequence modeling with selective state spaces" (arXiv 2312.00752).
    """
    y, final_state = OP(x, delta, A, B, C, D, initial_state, cu_seqlens, backend)
    return y, final_state


def _sample(
    sizes: dict[str, int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    decay_dtype: torch.dtype | None = None,
    D: bool = True,
    initial_state: bool = True,
) -> dict[str, Tensor | None]:
    """Unit-variance rows and states; A = -1, ..., -K and step sizes from 0.001 to 1, as the layer starts with."""
    batch, T, width, K = (sizes[letter] for letter in "BTDK")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wide = state_dtype(dtype)
    exponent = torch.rand((batch, T, width), generator=generator, dtype=torch.float64)
    return {
        "x": normal(batch, T, width).to(device, dtype),
        "delta": (10 ** (-3 * exponent)).to(device, decay_dtype or dtype),
        "A": -torch.arange(1, K + 1, dtype=torch.float64).repeat(width, 1).to(device, wide),
        "B": normal(batch, T, K).to(device, dtype),
        "C": normal(batch, T, K).to(device, dtype),
        "D": normal(width).to(device, wide) if D else None,
        "initial_state": normal(sizes.get("N", batch), width, K).to(device, wide) if initial_state else None,
    }


def _cost(problem: Problem) -> Cost:
    """Six flops (an exponential counts as one) a state channel and token forward, fifteen backward.

    Every input is read once, every output written once; states are never written.
    """
    B, T, D, K = (problem.sizes[letter] for letter in "BTDK")
    size, step = problem.dtypes["x"].itemsize, problem.dtypes["delta"].itemsize
    if problem.direction == "forward":
        return Cost(B * T * ((2 * D + 2 * K) * size + D * step), 6 * B * T * D * K)
    return Cost(B * T * ((3 * D + 4 * K) * size + 2 * D * step), 15 * B * T * D * K)


def _differentiable_backward(*args: Any, backend: str, **options: Any) -> tuple[Tensor | None, ...]:
    return differentiable(naive.forward, 2, *args, **options)


NAMES = ("x", "delta", "A", "B", "C", "D", "initial_state")
OP = Op(
    name="selective_scan",
    inputs=(
        Arg("x", "B T D"),
        Arg("delta", "B T D", "decay"),
        Arg("A", "D K", "state"),
        Arg("B", "B T K"),
        Arg("C", "B T K"),
        Arg("D", "D", "state", optional=True),
        Arg("initial_state", "N D K", "state", optional=True),
    ),
    outputs=(Arg("y", "B T D"), Arg("final_state", "N D K", "state")),
    residuals=NAMES,
    gradients={name: name for name in NAMES},
    backends=(
        Backend("naive", "kernels.selective_scan.naive"),
        Backend("compiled", "kernels.selective_scan.compiled"),
        Backend("native", "kernels.selective_scan.native", devices=("cpu",)),
        Backend("triton", "kernels.selective_scan.triton", devices=("cuda",)),
    ),
    sample=_sample,
    cost=_cost,
    differentiable_backward=_differentiable_backward,
)
