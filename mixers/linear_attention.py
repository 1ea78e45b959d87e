"""Linear attention: softmax's exponential replaced by a product of features, and so a sum that is carried along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gla import gla
from kernels.gla.step import can_step, step
from kernels.problem import state_dtype
from mixers.heads import GatedNorm, heads_for, split
from mixers.mixer import SequenceMixer, placed
from mixers.parts import choice
from mixers.projections import project
from mixers.registry import register

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "softplus": F.softplus,
    "silu": F.silu,
    "identity": lambda x: x,
}
POSITIVE = ("elu", "relu", "softplus")


@register
class LinearAttention(SequenceMixer):
    """Linear attention: no decay, so every token counts for ever.

        q_t = φ(W_q x_t),   k_t = φ(W_k x_t),   v_t = W_v x_t
        S_t = S_{t−1} + k_t v_tᵀ,   z_t = z_{t−1} + k_t,   head by head
        y_t = W_o (S_tᵀ q_t / (z_tᵀ q_t + 1e-6))

    With normalize=False y_t = W_o rms(S_tᵀ q_t / √K), for without the normaliser z the sums grow with t.

    Shapes: x, y [B, T, dim]; state {"S": [B, H, K, V + 1]} in float32 (float64 for float64 x), whose last column is z;
    H K = H V = dim. With normalize=False there is no such column.
    Cost: 4 dim² multiplications a token and 2 dim² / H for the state, which does not grow with T.

    Args:
        dim: width of x and y.
        heads: H; None: dim / 64, or the next smaller number that divides dim.
        feature_map: φ: "elu" (elu(x) + 1, the paper's), "relu", "softplus", "silu" or "identity".
        normalize: divide by zᵀ q, which needs a φ that is nowhere negative: one of the first three.
        bias: biases in all projections.
        backend: of the recurrence; see `kernels.gla.gla`.

    Source: Katharopoulos et al., "Transformers are RNNs", arXiv 2006.16236; a norm in place of the normaliser: Qin et
    al., "The Devil in Linear Transformer", arXiv 2210.10340.
    """

    family = "matrix-state linear RNN"
    source = "arXiv 2006.16236"
    ops = ("gla",)

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        feature_map: str = "elu",
        normalize: bool = True,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.feature_map = choice("linear_attention", "feature_map", feature_map, FEATURES)
        if normalize and feature_map not in POSITIVE:
            raise ValueError(
                f"linear_attention: feature_map {feature_map!r} can be negative, and so the sum that normalize=True "
                f"divides by; take normalize=False, or one of {', '.join(map(repr, POSITIVE))}"
            )
        self.dim, self.heads, self.backend = dim, heads_for("linear_attention", heads, 64, dim), backend
        self.width, self.normalize = dim // self.heads, normalize
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, dim, bias=bias)
        self.v_proj = nn.Linear(dim, dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias)
        self.norm = None if normalize else GatedNorm(self.width)

    def init_state(
        self, batch: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> dict[str, Tensor]:
        device, dtype = placed(self.q_proj, device, dtype)
        shape = batch, self.heads, self.width, self.width + self.normalize
        return {"S": torch.zeros(shape, device=device, dtype=state_dtype(dtype))}

    def mix(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Any]:
        q, k, v = (split(row, self.heads) for row in project(x, self.q_proj, self.k_proj, self.v_proj))
        features = FEATURES[self.feature_map]
        q, k = features(q), features(k)
        y, S = attend(q, k, v, state["S"], self.normalize, cu_seqlens, self.backend)
        y = y.flatten(-2) if self.norm is None else self.norm(y)
        return project(y, self.o_proj)[0], {"S": S}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor,
    normalize: bool,
    cu_seqlens: Tensor | None,
    backend: str,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Linear attention of features q, k [B, T, H, K] and values [B, T, H, V]; normalised, S has a last column z."""
    if not normalize:
        return gla(q, k, v, None, S, cu_seqlens=cu_seqlens, backend=backend)
    if can_step(q, S, cu_seqlens, backend, k, v):
        y, S = step(q, k, v, S, scale=1.0, eps=eps)
        return y, S
    # the sum of the keys is what a value of 1 would come to
    y, S = gla(q, k, F.pad(v, (0, 1), value=1.0), None, S, scale=1.0, cu_seqlens=cu_seqlens, backend=backend)
    return y[..., :-1] / (y[..., -1:] + eps), S
