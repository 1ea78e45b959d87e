"""Based: linear attention with the Taylor series of softmax's exponential, beside attention in a short window."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kernels.gla.step import can_step, step
from kernels.problem import state_dtype
from mixers.attention import Attention
from mixers.heads import heads_for, split
from mixers.linear_attention import attend
from mixers.mixer import SequenceMixer, placed
from mixers.projections import project, project_each
from mixers.registry import register


@register
class Based(SequenceMixer):
    """Linear attention whose features multiply to the Taylor series of the exponential, and exact attention nearby.

        φ(x) = (1, x / d^¼, x xᵀ / √(2 d)),   so that φ(q)ᵀ φ(k) = 1 + s + s² / 2,   s = qᵀ k / √d
        q_t = W_q x_t,   k_t = W_k x_t in d dimensions,   v_t = W_v x_t
        S_t = S_{t−1} + φ(k_t) v_tᵀ,   z_t = z_{t−1} + φ(k_t),   head by head
        y_t = W_o (S_tᵀ φ(q_t) / (zᵀ φ(q_t) + 1e-12)) + window attention(x)_t

    Of x xᵀ, which is symmetric, only the upper half is kept: K = 1 + d + d (d + 1) / 2 features. The paper's networks
    have the two kinds of attention in layers of their own; here both see the same x and are summed. With window=None
    the layer is the linear attention alone.

    Shapes: x, y [B, T, dim]; state {"S": [B, H, K, dim / H + 1] in float32 (float64 for float64 x), whose last column
    is z, "window": the state of `mixers.attention.Attention`, at most window − 1 tokens of keys and values}.
    Cost: 2 dim² + 2 dim H d multiplications a token and 2 dim K for the state, and those of the window's attention;
    the state does not grow with T.

    Args:
        dim: width of x and y.
        heads: H, also of the window; None: dim / 64, or the next smaller number that divides dim.
        feature_dim: d, the width of queries and keys before φ.
        window: how many tokens the exact attention sees, the present included; None: no such attention.
        backend: of the recurrence; see `kernels.gla.gla`.

    Source: Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff",
    arXiv 2402.18668.
    """

    family = "matrix-state linear RNN"
    source = "arXiv 2402.18668"
    ops = ("gla",)
    EPS = 1e-12

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        feature_dim: int = 16,
        window: int | None = 64,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if feature_dim < 1:
            raise ValueError(f"based: feature_dim is {feature_dim}, expected at least 1")
        self.dim, self.heads, self.backend = dim, heads_for("based", heads, 64, dim), backend
        self.feature_dim = feature_dim
        self.q_proj = nn.Linear(dim, self.heads * feature_dim, bias=False)
        self.k_proj = nn.Linear(dim, self.heads * feature_dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.window = None if window is None else Attention(dim, heads=self.heads, window=window)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        device, dtype = placed(self.q_proj, device, dtype)
        d = self.feature_dim
        shape = batch, self.heads, 1 + d + d * (d + 1) // 2, self.dim // self.heads + 1
        state: dict[str, Any] = {"S": torch.zeros(shape, device=device, dtype=state_dtype(dtype))}
        if self.window is not None:
            state["window"] = self.window.init_state(batch, device=device, dtype=dtype)
        return state

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        window, after = self.window, {}
        rows = project(x, self.q_proj, self.k_proj, self.v_proj, *(() if window is None else window.projections()))
        q, k, v = (split(row, self.heads) for row in rows[:3])
        if can_step(q, state["S"], cu_seqlens, self.backend, k, v):
            y, after["S"] = step(q, k, v, state["S"], scale=1.0, eps=self.EPS)
        else:
            q, k = taylor(torch.stack([q, k])).unbind()
            y, after["S"] = attend(q, k, v, state["S"], True, cu_seqlens, self.backend, eps=self.EPS)
        if window is None:
            return project(y.flatten(-2), self.o_proj)[0], after
        q, *rows = window.split(rows[3:])
        near, after["window"] = window.mix_heads(q, rows, state["window"], cu_seqlens)
        far, near = project_each([(y.flatten(-2), self.o_proj), (near.flatten(-2), window.o_proj)])
        return far + near, after

    def comparable(self, state: Any) -> list[Tensor]:
        return [state["S"], *([] if self.window is None else self.window.comparable(state["window"]))]

    def state_size(self, length: int = 1) -> int:
        d = self.feature_dim
        size = self.heads * (1 + d + d * (d + 1) // 2) * (self.dim // self.heads + 1)
        return size + (0 if self.window is None else self.window.state_size(length))


def taylor(x: Tensor) -> Tensor:
    """φ(x) of x [..., d]: [..., 1 + d + d (d + 1) / 2]."""
    d = x.shape[-1]
    row, column = torch.triu_indices(d, d, device=x.device)
    # x_i x_j stands for x_j x_i too, whose products are summed: twice the square, but not on the diagonal
    weight = torch.ones_like(row, dtype=x.dtype).masked_fill(row == column, math.sqrt(0.5))
    x = x / d**0.25
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., row] * x[..., column] * weight], -1)
