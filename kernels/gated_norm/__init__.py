"""A norm of each row and its gate in one pass: norm(x) ⊙ act(gate), or norm(x ⊙ act(gate))."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.gated_norm import naive
from kernels.op import Backend, Cost, Op
from kernels.problem import Arg, Problem, number

NORMS = ("layer", "rms")
ACTIVATIONS = tuple(naive.ACTIVATIONS)


def gated_norm(
    x: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str = "rms",
    activation: str = "silu",
    gate_first: bool = False,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """The norm of each row, or of each head of each row, times an activated gate.

        y = (n(x) ⊙ weight + bias) ⊙ act(gate),   n(u) = (u − μ) / √(mean of (u − μ)² + eps),  μ = mean of u or 0
        gate_first:   y = n(x ⊙ act(gate)) ⊙ weight + bias

    Args:
        x: [B, T, D], normalised over D; or [B, T, H, V], every head normalised over V. float64, float32, float16 or
            bfloat16, and any strides.
        gate: as many numbers in x's dtype, as [B, T, H · V] or in x's shape; None for 1.
        weight: [D], or [V] for all heads, or [H, V]; in x's dtype, or float32 beside a 16-bit x. None for ones.
        bias: likewise; None for zeros.
        norm: "layer" subtracts the mean, "rms" does not.
        activation: of the gate: "identity", "silu", "sigmoid", "tanh", "gelu" or "relu".
        gate_first: the gate comes before the norm, as in Mamba-2.
        eps: added to the mean square.
        backend: "auto" (the tuned choice, else the last listed that can run) or "naive", "native", "triton"; a named
            backend never falls back.

    Returns:
        y in x's shape and dtype, contiguous. All is computed in float32, for float64 x in float64, and rounded once.

    Rows do not see each other, and so packed sequences need no borders. Every input has a gradient, and a second one.

    Raises:
        TypeError: a dtype does not fit. ValueError: a shape, a device or a name does not fit.
        RuntimeError: the named backend cannot run this problem; the message has its reasons.

    Source: Ba et al. 2016, "Layer normalization" (arXiv 1607.06450); Zhang & Sennrich 2019, "Root mean square layer
    normalization" (arXiv 1910.07467); with a gate in Sun et al. 2023, "Retentive network" (arXiv 2307.08621), with the
    gate first in Dao & Gu 2024, "Transformers are SSMs" (arXiv 2405.21060).
    """
    if norm not in NORMS:
        raise ValueError(f"gated_norm: no norm {norm!r}; there are {', '.join(map(repr, NORMS))}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated_norm: no activation {activation!r}; there are {', '.join(map(repr, ACTIVATIONS))}")
    shape = x.shape
    if len(shape) not in (3, 4):
        raise ValueError(f"gated_norm: x has {len(shape)} axes {list(shape)}, expected [B, T, D] or [B, T, H, V]")
    if len(shape) == 4:
        rows, H = x, shape[2]
    else:
        rows, H = x.unsqueeze(2), 1
    if gate is not None:
        given = gate.shape
        if len(shape) == 3 and given == shape:
            gate = gate.unsqueeze(2)
        elif given != shape:
            if given != (*shape[:2], H * shape[-1]):
                raise ValueError(f"gated_norm: gate is {list(given)}, which does not fit x {list(shape)}")
            gate = gate.view_as(rows)
    # [V] -> [H, V]; what has other axes is the op's to refuse
    if weight is not None and weight.ndim == 1:
        weight = weight.expand(H, -1)
    if bias is not None and bias.ndim == 1:
        bias = bias.expand(H, -1)
    eps = number("gated_norm", "eps", eps)
    found = OP(rows, gate, weight, bias, None, norm == "layer", activation, gate_first, eps, backend)
    return found[0] if len(shape) == 4 else found[0].squeeze(2)


def _sample(
    sizes: dict[str, int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    decay_dtype: torch.dtype | None = None,
    gate: bool = True,
    weight: bool = True,
    bias: bool = True,
) -> dict[str, Tensor | None]:
    """Rows and gates of unit variance; weights around 1, biases around 0."""
    B, T, H, V = (sizes[letter] for letter in "BTHV")

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    parameters = decay_dtype or dtype
    return {
        "x": normal(B, T, H, V).to(device, dtype),
        "gate": normal(B, T, H, V).to(device, dtype) if gate else None,
        "weight": (1 + 0.1 * normal(H, V)).to(device, parameters) if weight else None,
        "bias": (0.1 * normal(H, V)).to(device, parameters) if bias else None,
    }


def _cost(problem: Problem) -> Cost:
    """Forward reads x and gate and writes y; backward reads dy too, and writes the gradients of x and gate.

    An activation counts as four flops, its derivative as three; parameters are too few to count.
    """
    sizes, forward = problem.sizes, problem.direction == "forward"
    numbers, gates = sizes["B"] * sizes["T"] * sizes["H"] * sizes["V"], bool(problem.options["gate"])
    streams = (2 + gates) if forward else (3 + 2 * gates)
    flops = (6 + 5 * gates) if forward else (18 + 10 * gates)
    return Cost(numbers * problem.dtypes["x"].itemsize * streams, numbers * flops)


def _differentiable_backward(*args: Any, backend: str, **options: Any) -> tuple[Tensor | None, ...]:
    return naive.backward(*args, **options)


NAMES = ("x", "gate", "weight", "bias")
OP = Op(
    name="gated_norm",
    inputs=(
        Arg("x", "B T H V"),
        Arg("gate", "B T H V", optional=True),
        Arg("weight", "H V", "decay", optional=True),
        Arg("bias", "H V", "decay", optional=True),
    ),
    outputs=(Arg("y", "B T H V"),),
    options={"center": False, "activation": "silu", "gate_first": False, "eps": 1e-5},
    residuals=NAMES,
    gradients={name: name for name in NAMES},
    backends=(
        Backend("naive", "kernels.gated_norm.naive"),
        Backend("native", "kernels.gated_norm.native", devices=("cpu",)),
        Backend("triton", "kernels.gated_norm.triton", devices=("cuda",)),
    ),
    sample=_sample,
    cost=_cost,
    differentiable_backward=_differentiable_backward,
)
