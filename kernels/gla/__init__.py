"""Gated linear attention: a matrix state with a decay per head or per key, as most linear attention has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.gla import naive
from kernels.loop import differentiable
from kernels.op import Backend, Cost, Op
from kernels.problem import Arg, Problem, state_dtype


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Linear attention whose matrix state decays by data-dependent factors, head by head.

        S[t] = diag(exp(log_decay[t])) S[t-1] + k[t] v[t]ᵀ,   y[t] = scale · S[t]ᵀ q[t]

    and with a bonus u for the current token

        y[t] = scale · (S[t-1] + diag(u) k[t] v[t]ᵀ)ᵀ q[t]

    where S[-1] = initial_state and final_state = S[T-1].

    Args:
        q, k: queries and keys [B, T, H, K] in float64, float32, float16 or bfloat16.
        v: values [B, T, H, V] in their dtype.
        log_decay: logarithms of the decays, at most 0 (-inf: forget everything), [B, T, H, K] or, one for all keys of
            a head, [B, T, H], in the state dtype (float64 for float64, else float32); None: nothing decays.
        initial_state: [N, H, K, V] in the state dtype, or None for zeros. N is B, or the number of packed sequences.
        bonus: u [H, K] in the state dtype, or None for the first form.
        scale: K^-½ by default.
        cu_seqlens: [N + 1] int32 or int64, needs B = 1: rows cu_seqlens[n] to cu_seqlens[n + 1] are sequence n, which
            has its own initial and final state; a sequence may be empty, its final state is then its initial state.
        backend: "auto" (the tuned choice, else the last listed that can run), or a backend by name, which never falls
            back.

    Returns:
        y [B, T, H, V] in v's dtype, and final_state [N, H, K, V] in the state dtype, in which sums are accumulated.

    Every input has a gradient, through y and through final_state, and a second one.

    Raises:
        TypeError: a dtype does not fit. ValueError: a shape, device, cu_seqlens or backend name does not fit.
        RuntimeError: the named backend cannot run this problem; the message has its reasons.

    Source: Yang et al. 2023, "Gated linear attention transformers with hardware-efficient training" (arXiv 2312.06635);
    bonus: Peng et al. 2024, "Eagle and Finch: RWKV with matrix-valued states" (arXiv 2404.05892).
    """
    if log_decay is not None and log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    elif log_decay is not None and log_decay.ndim == 4 and q.ndim == 4 and log_decay.shape[3] != q.shape[3]:
        raise ValueError(f"gla: axis K is {q.shape[3]} in q but {log_decay.shape[3]} in log_decay")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    y, final_state = OP(q, k, v, log_decay, initial_state, bonus, cu_seqlens, scale, backend)
    return y, final_state


def _sample(
    sizes: dict[str, int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    log_decay: bool = True,
    initial_state: bool = True,
    bonus: bool = False,
) -> dict[str, Tensor | None]:
    """Unit-variance rows and states; decays spread over (0, 1), mostly near 1. J, the decays a head, is K or 1."""
    B, T, H, K, V = (sizes[letter] for letter in "BTHKV")
    J = K if sizes.get("J", K) > 1 else 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    wide = state_dtype(dtype)
    return {
        "q": normal(B, T, H, K).to(device, dtype),
        "k": normal(B, T, H, K).to(device, dtype),
        "v": normal(B, T, H, V).to(device, dtype),
        "log_decay": torch.nn.functional.logsigmoid(3 + 2 * normal(B, T, H, J)).to(device, wide) if log_decay else None,
        "initial_state": normal(sizes.get("N", B), H, K, V).to(device, wide) if initial_state else None,
        "bonus": normal(H, K).to(device, wide) if bonus else None,
    }


def _cost(problem: Problem) -> Cost:
    """Two products of K V numbers a token and head forward, k vᵀ and Sᵀ q; backward those of S and dS, and dq, dk, dv.

    Every input is read once, every output written once.
    """
    B, T, H, K, V = (problem.sizes[letter] for letter in "BTHKV")
    size, wide = problem.dtypes["q"].itemsize, state_dtype(problem.dtypes["q"]).itemsize
    decays = problem.sizes["J"] * wide if problem.options["log_decay"] else 0
    products = 2 * B * T * H * K * V
    if problem.direction == "forward":
        return Cost(B * T * H * ((2 * K + 2 * V) * size + decays), 2 * products)
    return Cost(B * T * H * ((4 * K + 3 * V) * size + 2 * decays), 5 * products)


def _differentiable_backward(*args: Any, backend: str, **options: Any) -> tuple[Tensor | None, ...]:
    return differentiable(naive.forward, 2, *args, **options)


NAMES = ("q", "k", "v", "log_decay", "initial_state", "bonus")
OP = Op(
    name="gla",
    inputs=(
        Arg("q", "B T H K"),
        Arg("k", "B T H K"),
        Arg("v", "B T H V"),
        Arg("log_decay", "B T H J", "state", optional=True),
        Arg("initial_state", "N H K V", "state", optional=True),
        Arg("bonus", "H K", "state", optional=True),
    ),
    outputs=(Arg("y", "B T H V"), Arg("final_state", "N H K V", "state")),
    options={"scale": 1.0},
    residuals=NAMES,
    gradients={name: name for name in NAMES},
    backends=(
        Backend("naive", "kernels.gla.naive"),
        Backend("compiled", "kernels.gla.compiled"),
        Backend("triton", "kernels.gla.triton", devices=("cuda",)),
    ),
    sample=_sample,
    cost=_cost,
    differentiable_backward=_differentiable_backward,
)
