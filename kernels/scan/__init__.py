"""The scan h[t] = a[t] h[t-1] + x[t], real and complex: the recurrence under every linear RNN with a vector state."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.op import Backend, Cost, Op
from kernels.problem import Arg, Problem, state_dtype
from kernels.scan import formula


def scan(
    a: Tensor,
    x: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """First-order linear recurrence over time, channel by channel.

        h[t] = a[t] h[t-1] + x[t],   h[-1] = initial_state,   final_state = h[T-1]

    Args:
        a: decays [B, T, D]; the dtype of x, or float32 beside a 16-bit x.
        x: inputs [B, T, D] in float64, float32, float16, bfloat16, complex128 or complex64; or [B, T, D, 2], a and x
            both: complex numbers as (real, imaginary) pairs of any of the real dtypes.
        initial_state: [N, D] in the state dtype (float64 for float64 x, else float32; complex likewise), or None for
            zeros. N is B, or the number of packed sequences.
        reverse: time runs from T-1 down to 0; the initial state enters at T-1, the final state leaves at 0.
        cu_seqlens: [N + 1] int32 or int64, needs B = 1: rows cu_seqlens[n] to cu_seqlens[n + 1] are sequence n, which
            has its own initial and final state; a sequence may be empty, its final state is then its initial state.
        backend: "auto" (the tuned choice, else the last listed that can run) or "naive", "compiled", "native",
            "triton"; a named backend never falls back.

    Returns:
        h [B, T, D] in x's dtype, and final_state [N, D] in the state dtype; the state is accumulated in that dtype.

    Every input has a gradient, through h and through final_state, and a second one.

    Raises:
        TypeError: a dtype does not fit. ValueError: a shape, device, cu_seqlens or backend name does not fit.
        RuntimeError: the named backend cannot run this problem; the message has its reasons.

    Source: Martin & Cundy 2018, "Parallelizing linear recurrent neural nets over sequence length" (arXiv 1709.04057).
    """
    try:
        real = not x.is_complex()
    except AttributeError:
        # no tensor, of which the op says what it expected
        real = True
    if real:
        h, final = OP(a, x, initial_state, cu_seqlens, reverse, backend)
        return h, final
    for name, tensor in (("a", a), ("x", x), ("initial_state", initial_state)):
        if tensor is not None and not tensor.is_complex():
            raise TypeError(f"scan: {name} is {tensor.dtype} beside complex tensors, expected a complex dtype")
    initial = None if initial_state is None else torch.view_as_real(initial_state.resolve_conj())
    a, x = torch.view_as_real(a.resolve_conj()), torch.view_as_real(x.resolve_conj())
    h, final = OP(a, x, initial, cu_seqlens, reverse, backend)
    return torch.view_as_complex(h), torch.view_as_complex(final)


def _sample(
    sizes: dict[str, int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    decay_dtype: torch.dtype | None = None,
    pairs: bool = False,
    initial_state: bool = True,
) -> dict[str, Tensor | None]:
    """Decays spread over (0, 1), as the layers make them; unit-variance inputs and states."""
    two = [2] if pairs else []

    def normal(*shape: int) -> Tensor:
        return torch.randn([*shape, *two], generator=generator, dtype=torch.float64)

    rows = sizes["B"], sizes["T"], sizes["D"]
    a = torch.sigmoid(2 + 2 * torch.randn(rows, generator=generator, dtype=torch.float64))
    if pairs:
        angle = torch.rand(rows, generator=generator, dtype=torch.float64) * torch.pi
        a = torch.stack((a * angle.cos(), a * angle.sin()), -1)
    state = normal(sizes.get("N", sizes["B"]), sizes["D"]).to(device, state_dtype(dtype))
    return {
        "a": a.to(device, decay_dtype or dtype),
        "x": normal(*rows).to(device, dtype),
        "initial_state": state if initial_state else None,
    }


def _cost(problem: Problem) -> Cost:
    """Forward reads a, x and writes h; backward reads a, h, dh and writes da, dx."""
    numbers = problem.sizes["B"] * problem.sizes["T"] * problem.sizes["D"] * (2 if problem.options["pairs"] else 1)
    decay = problem.dtypes["a"].itemsize
    if problem.direction == "forward":
        size, flops = decay + 2 * problem.dtypes["x"].itemsize, 2
    else:
        size, flops = 2 * decay + 3 * problem.dtypes["h"].itemsize, 3
    return Cost(numbers * size, numbers * flops * (2 if problem.options["pairs"] else 1))


def _differentiable_backward(*args: Tensor | None, reverse: bool, backend: str) -> tuple[Tensor | None, ...]:
    return formula.gradients(scan, *args, reverse=reverse, backend=backend)  # type: ignore[arg-type]


OP = Op(
    name="scan",
    inputs=(
        Arg("a", "B T D", "decay", pairs=True),
        Arg("x", "B T D", pairs=True),
        Arg("initial_state", "N D", "state", optional=True, pairs=True),
    ),
    outputs=(Arg("h", "B T D", pairs=True), Arg("final_state", "N D", "state", pairs=True)),
    options={"reverse": False},
    residuals=("a", "h", "initial_state"),
    gradients={"a": "a", "x": "h", "initial_state": "initial_state"},
    backends=(
        Backend("naive", "kernels.scan.naive"),
        Backend("compiled", "kernels.scan.compiled"),
        Backend("native", "kernels.scan.native", devices=("cpu",)),
        Backend("triton", "kernels.scan.triton", devices=("cuda",)),
    ),
    sample=_sample,
    cost=_cost,
    differentiable_backward=_differentiable_backward,
)
