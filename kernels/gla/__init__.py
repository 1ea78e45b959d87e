"""Gated linear attention: a matrix state with a decay per head or per key, as most linear attention has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.gla import naive
from kernels.loop import differentiable
from kernels.matrix_state import DECAY_AND_STATE, OUTPUTS, QKV, Sampler, decay_bytes, scale_of, with_axis
from kernels.op import Backend, Cost, Op
from kernels.problem import Arg, Problem


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
    log_decay, scale = with_axis("gla", log_decay, q), scale_of("gla", scale, q)
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
    draw = Sampler(sizes, dtype, device, generator)
    return {
        "q": draw.rows(draw.normal("B T H K")),
        "k": draw.rows(draw.normal("B T H K")),
        "v": draw.rows(draw.normal("B T H V")),
        "log_decay": draw.log_decay(log_decay),
        "initial_state": draw.initial_state(initial_state),
        "bonus": draw.wide(draw.normal("H K")) if bonus else None,
    }


def _cost(problem: Problem) -> Cost:
    """Two products of K V numbers a token and head forward, k vᵀ and Sᵀ q; backward those of S and dS, and dq, dk, dv.

    Every input is read once, every output written once.
    """
    B, T, H, K, V = (problem.sizes[letter] for letter in "BTHKV")
    size, decays = problem.dtypes["q"].itemsize, decay_bytes(problem)
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
        *QKV,
        *DECAY_AND_STATE,
        Arg("bonus", "H K", "state", optional=True),
    ),
    outputs=OUTPUTS,
    options={"scale": 1.0},
    residuals=NAMES,
    gradients={name: name for name in NAMES},
    backends=(
        Backend("naive", "kernels.gla.naive"),
        Backend("compiled", "kernels.gla.compiled"),
        Backend("native", "kernels.gla.native", devices=("cpu",)),
        Backend("triton", "kernels.gla.triton", devices=("cuda",)),
        Backend("fla", "kernels.gla.fla", devices=("cuda",), foreign=True),
    ),
    sample=_sample,
    cost=_cost,
    differentiable_backward=_differentiable_backward,
)
