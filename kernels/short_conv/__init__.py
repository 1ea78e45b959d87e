"""The short causal convolution over time, one filter per channel, with the last inputs as its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.op import Backend, Cost, Op
from kernels.problem import Arg, Problem
from kernels.short_conv import formula

ACTIVATIONS = (None, "silu")


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    activation: str | None = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over time, with the last W - 1 inputs as its state.

        y[t] = act(bias + sum over j < W of weight[:, W-1-j] x[t-j]),   x[-j] = initial_state[:, W-1-j]

    Args:
        x: inputs [B, T, D] in float64, float32, float16 or bfloat16; any T >= 1, less than W too.
        weight: [D, W], the last tap for the present: `nn.Conv1d(D, D, W, groups=D, padding=W - 1).weight.squeeze(1)`.
            W is at least 1; the dtype of x, or float32 beside a 16-bit x. Likewise bias [D], or None for zeros.
        initial_state: the W - 1 inputs before the first, the oldest first, [N, W - 1, D] in x's dtype, or None for
            zeros. N is B, or the number of packed sequences.
        activation: None, or "silu": act(z) = z sigmoid(z).
        reverse: time runs from T-1 down to 0; the initial state comes before row T-1, the final state ends with row 0.
        cu_seqlens: [N + 1] int32 or int64, needs B = 1: rows cu_seqlens[n] to cu_seqlens[n + 1] are sequence n, which
            has its own initial and final state; a sequence may be empty, its final state is then its initial state.
        backend: "auto" (the tuned choice, else the last listed that can run) or "naive", "compiled", "native",
            "triton"; a named backend never falls back.

    Returns:
        y [B, T, D] and final_state [N, W - 1, D], the last W - 1 inputs, both in x's dtype. Sums are accumulated in
        float32, for float64 x in float64, and rounded once.

    Every input has a gradient, through y and through final_state, and a second one.

    Raises:
        TypeError: a dtype does not fit. ValueError: a shape, a device, cu_seqlens or a name does not fit.
        RuntimeError: the named backend cannot run this problem; the message has its reasons.

    Source: the convolution before the mixer in Fu et al. 2023, "Hungry Hungry Hippos" (arXiv 2212.14052), and in
    Gu & Dao 2023, "Mamba" (arXiv 2312.00752).
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"short_conv: no activation {activation!r}; there are {', '.join(map(repr, ACTIVATIONS))}")
    y, final_state = OP(x, weight, bias, initial_state, cu_seqlens, activation or "", reverse, backend)
    return y, final_state


def _sample(
    sizes: dict[str, int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    decay_dtype: torch.dtype | None = None,
    bias: bool = True,
    initial_state: bool = True,
) -> dict[str, Tensor | None]:
    """Unit-variance inputs and states; weights as nn.Conv1d draws them, which keeps outputs of that size."""
    B, T, D, W = sizes["B"], sizes["T"], sizes["D"], sizes["W"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) / W**0.5

    parameters = decay_dtype or dtype
    return {
        "x": normal(B, T, D).to(device, dtype),
        "weight": uniform(D, W).to(device, parameters),
        "bias": uniform(D).to(device, parameters) if bias else None,
        "initial_state": normal(sizes.get("N", B), W - 1, D).to(device, dtype) if initial_state else None,
    }


def _cost(problem: Problem) -> Cost:
    """Forward reads x and writes y; backward reads x, dy and writes dx. Both pass the weights once."""
    sizes = problem.sizes
    numbers = sizes["B"] * sizes["T"] * sizes["D"]
    forward = problem.direction == "forward"
    weights = sizes["D"] * sizes["W"] * problem.dtypes["weight"].itemsize * (1 if forward else 2)
    taps = sizes["W"] * (2 if forward else 4 + 2 * bool(problem.options["activation"]))
    return Cost(numbers * problem.dtypes["x"].itemsize * (2 if forward else 3) + weights, numbers * taps)


def _differentiable_backward(*args: Tensor | None, backend: str, **options: Any) -> tuple[Tensor | None, ...]:
    return formula.gradients(*args, **options)  # type: ignore[arg-type]


OP = Op(
    name="short_conv",
    inputs=(
        Arg("x", "B T D"),
        Arg("weight", "D W", "decay"),
        Arg("bias", "D", "decay", optional=True),
        Arg("initial_state", "N W-1 D", optional=True),
    ),
    outputs=(Arg("y", "B T D"), Arg("final_state", "N W-1 D")),
    options={"activation": "", "reverse": False},
    residuals=("x", "weight", "bias", "initial_state"),
    gradients={name: name for name in ("x", "weight", "bias", "initial_state")},
    backends=(
        Backend("naive", "kernels.short_conv.naive"),
        Backend("compiled", "kernels.short_conv.compiled"),
        Backend("native", "kernels.short_conv.native", devices=("cpu",)),
        Backend("triton", "kernels.short_conv.triton", devices=("cuda",)),
    ),
    sample=_sample,
    cost=_cost,
    differentiable_backward=_differentiable_backward,
)
