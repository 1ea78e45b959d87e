"""DeltaNet: linear attention whose matrix state replaces what it holds for a key."""

from __future__ import annotations

from torch import nn

from mixers.delta import ConvolvedQKV, DeltaMixer
from mixers.heads import GatedNorm, heads_for
from mixers.options import positive
from mixers.registry import register


@register
class DeltaNet(DeltaMixer):
    """Delta rule: before a value is written for a key, what the state holds for that key is taken away.

        q_t = unit(φ_q(W_q x)_t),   k_t = unit(φ_k(W_k x)_t),   v_t = φ_v(W_v x)_t,   β_t = σ(W_β x_t)
        S_t = S_{t−1} + β_t k_t (v_t − S_{t−1}ᵀ k_t)ᵀ,   o_t = S_tᵀ q_t / √K,   head by head
        y_t = W_o rms(o_t)    (with a gate: W_o (rms(o_t) ⊙ SiLU(W_g x_t)))

    φ is a short causal convolution, then SiLU; unit(u) = u / √(|u|² + 10^-6) in each head, in float32, as is β.

    Shapes: x, y [B, T, dim]; state {"S": [B, H, K, V] in float32 (float64 for float64 x), "conv": [B, short_conv − 1,
    H (2 K + V)], the last projections, in the dtype they are computed in}, H K = expand_k · dim, H V = expand_v · dim.
    Cost: (2 expand_k + 2 expand_v) dim² multiplications a token (3 expand_v with a gate) and 3 H K V for the state,
    which does not grow with T.

    Args:
        dim: width of x and y.
        heads: H; None: one for every 128 key channels, or the next smaller number that divides both widths.
        expand_k, expand_v: key and value channels per dim.
        short_conv: width of the convolutions; 0 for none, φ is SiLU then.
        conv_bias: biases in the convolutions.
        gate: a gate on the output.
        negative_eigenvalues: β in (0, 2) instead of (0, 1): the state may flip along a key, which tracks parities.
        backend: of the delta rule; see `kernels.delta_rule.delta_rule`.

    Source: Yang et al., "Parallelizing linear transformers with the delta rule over sequence length", arXiv 2406.06484;
    negative eigenvalues: Grazzi et al., arXiv 2411.12537.
    """

    family = "matrix-state linear RNN"
    source = "arXiv 2406.06484"
    ops = ("delta_rule",)

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        short_conv: int = 4,
        conv_bias: bool = False,
        gate: bool = False,
        negative_eigenvalues: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        positive("deltanet", expand_k=expand_k, expand_v=expand_v)
        keys, values = max(int(dim * expand_k), 1), max(int(dim * expand_v), 1)
        self.dim, self.heads, self.backend = dim, heads_for("deltanet", heads, 128, keys, values), backend
        self.key_width, self.value_width = keys // self.heads, values // self.heads
        self.largest_beta = 2.0 if negative_eigenvalues else 1.0
        self.qkv = ConvolvedQKV("deltanet", dim, self.heads, keys, values, short_conv=short_conv, conv_bias=conv_bias)
        self.beta_proj = nn.Linear(dim, self.heads, bias=False)
        self.decay_proj = self.A_log = self.dt_bias = None
        self.g_proj = nn.Linear(dim, values, bias=False) if gate else None
        self.norm = GatedNorm(self.value_width)
        self.o_proj = nn.Linear(values, dim, bias=False)
