"""Diagonal plus rank one: a matrix state with the most general transition that chunks can still be made of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.dplr import naive
from kernels.loop import differentiable
from kernels.matrix_state import DECAY_AND_STATE, OUTPUTS, QKV, Sampler, decay_bytes, scale_of, with_axis
from kernels.op import Backend, Cost, Op
from kernels.problem import Arg, Problem


def dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Linear attention with a transition that is diagonal plus of rank one, head by head.

        S[t] = diag(exp(log_decay[t])) S[t-1] + b[t] (a[t]ᵀ S[t-1]) + k[t] v[t]ᵀ,   y[t] = scale · S[t]ᵀ q[t]

    where S[-1] = initial_state and final_state = S[T-1]. The delta rule is a = −β k exp(log_decay), b = k, with k β in
    place of k.

    Args:
        q, k: queries and keys [B, T, H, K] in float64, float32, float16 or bfloat16.
        v: values [B, T, H, V] in their dtype.
        a, b: what is read from the state and where it is added, [B, T, H, K] in the dtype of q.
        log_decay: logarithms of the decays, at most 0 (-inf: forget everything), [B, T, H, K] or, one for all keys of
            a head, [B, T, H], in the state dtype (float64 for float64, else float32); None: nothing decays.
        initial_state: [N, H, K, V] in the state dtype, or None for zeros. N is B, or the number of packed sequences.
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

    Source: Peng et al. 2025, "RWKV-7 Goose with expressive dynamic state evolution" (arXiv 2503.14456).
    """
    log_decay, scale = with_axis("dplr", log_decay, q), scale_of("dplr", scale, q)
    y, final_state = OP(q, k, v, a, b, log_decay, initial_state, cu_seqlens, scale, backend)
    return y, final_state


def _sample(
    sizes: dict[str, int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    log_decay: bool = True,
    initial_state: bool = True,
) -> dict[str, Tensor | None]:
    """Unit-variance rows and states, a = −κ and b = η κ with κ of length 1, η in (0, 1). J is K or 1."""
    draw = Sampler(sizes, dtype, device, generator)
    read = F.normalize(draw.normal("B T H K"), dim=-1)
    return {
        "q": draw.rows(draw.normal("B T H K")),
        "k": draw.rows(draw.normal("B T H K")),
        "v": draw.rows(draw.normal("B T H V")),
        "a": draw.rows(-read),
        "b": draw.rows(read * draw.normal("B T H K").sigmoid()),
        "log_decay": draw.log_decay(log_decay),
        "initial_state": draw.initial_state(initial_state),
    }


def _cost(problem: Problem) -> Cost:
    """Four products of K V numbers a token and head forward, Sᵀ a, b pᵀ, k vᵀ and Sᵀ q; backward their two each, and S.

    Every input is read once, every output written once.
    """
    B, T, H, K, V = (problem.sizes[letter] for letter in "BTHKV")
    size, decays = problem.dtypes["q"].itemsize, decay_bytes(problem)
    products = 2 * B * T * H * K * V
    if problem.direction == "forward":
        return Cost(B * T * H * ((4 * K + 2 * V) * size + decays), 4 * products)
    return Cost(B * T * H * ((8 * K + 3 * V) * size + 2 * decays), 11 * products)


def _differentiable_backward(*args: Any, backend: str, **options: Any) -> tuple[Tensor | None, ...]:
    return differentiable(naive.forward, 2, *args, **options)


NAMES = ("q", "k", "v", "a", "b", "log_decay", "initial_state")
OP = Op(
    name="dplr",
    inputs=(
        *QKV,
        Arg("a", "B T H K"),
        Arg("b", "B T H K"),
        *DECAY_AND_STATE,
    ),
    outputs=OUTPUTS,
    options={"scale": 1.0},
    residuals=NAMES,
    gradients={name: name for name in NAMES},
    backends=(
        Backend("naive", "kernels.dplr.naive"),
        Backend("compiled", "kernels.dplr.compiled"),
        Backend("native", "kernels.dplr.native", devices=("cpu",)),
        Backend("triton", "kernels.dplr.triton", devices=("cuda",)),
    ),
    sample=_sample,
    cost=_cost,
    differentiable_backward=_differentiable_backward,
)
