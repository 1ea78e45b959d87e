"""Gated DeltaNet: the delta rule with a decay for each head."""

from __future__ import annotations

from torch import nn

from mixers.delta import ConvolvedQKV, DeltaMixer, decay_parameters
from mixers.heads import GatedNorm
from mixers.options import positive
from mixers.registry import register


@register
class GatedDeltaNet(DeltaMixer):
    """Delta rule with forgetting: the whole state of a head decays by a factor that depends on the data.

        q_t = unit(φ_q(W_q x)_t),   k_t = unit(φ_k(W_k x)_t),   v_t = φ_v(W_v x)_t,   β_t = σ(W_β x_t)
        log α_t = −A softplus(W_α x_t + b),   R = α_t S_{t−1}
        S_t = R + β_t k_t (v_t − Rᵀ k_t)ᵀ,   o_t = S_tᵀ q_t / √K,   head by head
        y_t = W_o (rms(o_t) ⊙ SiLU(W_g x_t))

    φ is a short causal convolution, then SiLU; unit(u) = u / √(|u|² + 10^-6) in each head. β and log α are computed in
    float32. At the start A = exp(A_log) is uniform in (0, 16] and softplus(b) log-uniform in [0.001, 0.1].

    Shapes: x, y [B, T, dim]; state {"S": [B, value_heads, K, V] in float32 (float64 for float64 x), "conv":
    [B, short_conv − 1, 2 heads K + value_heads V], the last projections, in the dtype they are computed in}.
    Cost: (2 heads K + 3 value_heads V) dim multiplications a token, 6 dim² by default, and 3 value_heads K V for the
    state, which does not grow with T.

    Args:
        dim: width of x and y.
        heads: query and key heads; None: so many that K is near 256.
        head_dim: K; None: ¾ dim / heads.
        expand_v: V = expand_v · K.
        value_heads: value heads, a multiple of heads, each group of them with one query and key; None: heads.
        short_conv: width of the convolutions; 0 for none, φ is SiLU then.
        conv_bias: biases in the convolutions.
        gate: the gate on the output; False: W_o rms(o_t).
        negative_eigenvalues: β in (0, 2) instead of (0, 1): the state may flip along a key, which tracks parities.
        backend: of the delta rule; see `kernels.delta_rule.delta_rule`.

    Source: Yang, Kautz, Hatamizadeh, "Gated delta networks: improving Mamba2 with delta rule", arXiv 2412.06464;
    value heads: Qwen3-Next.
    """

    family = "matrix-state linear RNN"
    source = "arXiv 2412.06464"
    ops = ("delta_rule",)

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        value_heads: int | None = None,
        short_conv: int = 4,
        conv_bias: bool = False,
        gate: bool = True,
        negative_eigenvalues: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        positive("gated_deltanet", head_dim=head_dim, expand_v=expand_v)
        heads = max(round(0.75 * dim / (head_dim or 256)), 1) if heads is None else heads
        value_heads = heads if value_heads is None else value_heads
        if heads < 1 or value_heads < 1 or value_heads % heads:
            raise ValueError(f"gated_deltanet: value_heads is {value_heads}, expected a multiple of heads = {heads}")
        self.dim, self.heads, self.value_heads, self.backend = dim, heads, value_heads, backend
        self.key_width = max(int(0.75 * dim / heads), 1) if head_dim is None else head_dim
        self.value_width = max(int(expand_v * self.key_width), 1)
        self.largest_beta = 2.0 if negative_eigenvalues else 1.0
        keys, values = heads * self.key_width, value_heads * self.value_width
        self.qkv = ConvolvedQKV(
            "gated_deltanet",
            dim,
            heads,
            keys,
            values,
            short_conv=short_conv,
            conv_bias=conv_bias,
            value_heads=value_heads,
        )
        self.beta_proj = nn.Linear(dim, value_heads, bias=False)
        self.decay_proj = nn.Linear(dim, value_heads, bias=False)
        self.A_log, self.dt_bias = decay_parameters(value_heads, value_heads, smallest=0.0)
        self.g_proj = nn.Linear(dim, values, bias=False) if gate else None
        self.norm = GatedNorm(self.value_width)
        self.o_proj = nn.Linear(values, dim, bias=False)
