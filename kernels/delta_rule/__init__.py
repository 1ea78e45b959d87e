"""The delta rule: a matrix state that replaces what it holds for a key, with a decay per head or per key."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.delta_rule import naive
from kernels.loop import differentiable
from kernels.matrix_state import DECAY_AND_STATE, OUTPUTS, QKV, Sampler, decay_bytes, scale_of, with_axis
from kernels.op import Backend, Cost, Op
from kernels.problem import Arg, Problem


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Linear attention that corrects what its matrix state holds for a key, head by head.

        R = diag(exp(log_decay[t])) S[t-1]
        S[t] = R + β[t] k[t] (v[t] − Rᵀ k[t])ᵀ = (I − β[t] k[t] k[t]ᵀ) R + β[t] k[t] v[t]ᵀ
        y[t] = scale · S[t]ᵀ q[t]

    where S[-1] = initial_state and final_state = S[T-1]. The state stays bounded for β in [0, 2] and keys of length 1.

    Args:
        q, k: queries and keys [B, T, H, K] in float64, float32, float16 or bfloat16.
        v: values [B, T, H, V] in their dtype.
        beta: how much of what is held is replaced, [B, T, H] in their dtype or the state dtype.
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

    Source: Yang et al. 2024, "Parallelizing linear transformers with the delta rule over sequence length" (arXiv
    2406.06484); per head: Yang et al. 2024, "Gated delta networks" (arXiv 2412.06464); per key: Kimi Team 2025,
    "Kimi Linear" (arXiv 2510.26692).
    """
    log_decay, scale = with_axis("delta_rule", log_decay, q), scale_of("delta_rule", scale, q)
    y, final_state = OP(q, k, v, beta, log_decay, initial_state, cu_seqlens, scale, backend)
    return y, final_state


def _sample(
    sizes: dict[str, int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    decay_dtype: torch.dtype | None = None,
    log_decay: bool = True,
    initial_state: bool = True,
) -> dict[str, Tensor | None]:
    """Unit-variance queries, values and states, keys of length 1, beta in (0, 1); decays mostly near 1. J is K or 1."""
    draw = Sampler(sizes, dtype, device, generator)
    return {
        "q": draw.rows(draw.normal("B T H K")),
        "k": draw.rows(F.normalize(draw.normal("B T H K"), dim=-1)),
        "v": draw.rows(draw.normal("B T H V")),
        "beta": draw.normal("B T H").sigmoid().to(device, decay_dtype or dtype),
        "log_decay": draw.log_decay(log_decay),
        "initial_state": draw.initial_state(initial_state),
    }


def _cost(problem: Problem) -> Cost:
    """Three products of K V numbers a token and head forward, Rᵀ k, k uᵀ and Sᵀ q; backward these and their two each.

    Every input is read once, every output written once.
    """
    B, T, H, K, V = (problem.sizes[letter] for letter in "BTHKV")
    size, decays = problem.dtypes["q"].itemsize, decay_bytes(problem)
    beta = problem.dtypes["beta"].itemsize
    products = 2 * B * T * H * K * V
    if problem.direction == "forward":
        return Cost(B * T * H * ((2 * K + 2 * V) * size + beta + decays), 3 * products)
    return Cost(B * T * H * ((4 * K + 3 * V) * size + 2 * (beta + decays)), 8 * products)


def _differentiable_backward(*args: Any, backend: str, **options: Any) -> tuple[Tensor | None, ...]:
    return differentiable(naive.forward, 2, *args, **options)


NAMES = ("q", "k", "v", "beta", "log_decay", "initial_state")
OP = Op(
    name="delta_rule",
    inputs=(
        *QKV,
        Arg("beta", "B T H", "decay"),
        *DECAY_AND_STATE,
    ),
    outputs=OUTPUTS,
    options={"scale": 1.0},
    residuals=NAMES,
    gradients={name: name for name in NAMES},
    backends=(
        Backend("naive", "kernels.delta_rule.naive"),
        Backend("compiled", "kernels.delta_rule.compiled"),
        Backend("native", "kernels.delta_rule.native", devices=("cpu",)),
        Backend("triton", "kernels.delta_rule.triton", devices=("cuda",)),
        Backend("fla", "kernels.delta_rule.fla", devices=("cuda",), foreign=True),
    ),
    sample=_sample,
    cost=_cost,
    differentiable_backward=_differentiable_backward,
)
