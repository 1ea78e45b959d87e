"""KDA: Kimi delta attention, the delta rule with a decay for each key."""

from __future__ import annotations

from torch import nn

from mixers.delta import ConvolvedQKV, DeltaMixer, decay_parameters
from mixers.heads import GatedNorm, heads_for
from mixers.options import positive
from mixers.registry import register


@register
class KDA(DeltaMixer):
    """Kimi delta attention: Gated DeltaNet with a decay for every row of the state in place of one for all.

        q_t = unit(φ_q(W_q x)_t),   k_t = unit(φ_k(W_k x)_t),   v_t = φ_v(W_v x)_t,   β_t = σ(W_β x_t)
        log α_t = −A softplus(W_α↑ W_α↓ x_t + b),   R = diag(α_t) S_{t−1}
        S_t = R + β_t k_t (v_t − Rᵀ k_t)ᵀ,   o_t = S_tᵀ q_t / √K,   head by head
        y_t = W_o (rms(o_t) ⊙ σ(W_g↑ W_g↓ x_t))

    φ is a short causal convolution, then SiLU; unit(u) = u / √(|u|² + 10^-6) in each head; the projections W↑ W↓ have
    the rank of a head's width. β and log α are computed in float32. At the start A = exp(A_log) is uniform in [1, 16],
    one number a head, and softplus(b) log-uniform in [0.001, 0.1].

    Shapes: x, y [B, T, dim]; state {"S": [B, H, K, V] in float32 (float64 for float64 x), "conv":
    [B, short_conv − 1, H (2 K + V)], the last projections, in the dtype they are computed in}.
    Cost: (2 K + 2 V) H dim + rank (2 dim + H (K + V)) multiplications a token and 4 H K V for the state, which does not
    grow with T.

    Args:
        dim: width of x and y.
        heads: H; None: dim / head_dim, or with no head_dim either one for every 128 of dim, if it divides dim.
        head_dim: K; None: dim / heads.
        expand_v: V = expand_v · K.
        rank: of the projections for decays and gate; None: V.
        short_conv: width of the convolutions; 0 for none, φ is SiLU then.
        conv_bias: biases in the convolutions.
        gate_bias: a bias in the gate, as flash-linear-attention has it.
        negative_eigenvalues: β in (0, 2) instead of (0, 1): the state may flip along a key, which tracks parities.
        backend: of the delta rule; see `kernels.delta_rule.delta_rule`.

    Source: Kimi Team, "Kimi Linear: an expressive, efficient attention architecture", arXiv 2510.26692.
    """

    family = "matrix-state linear RNN"
    source = "arXiv 2510.26692"
    ops = ("delta_rule",)

    def __init__(
        self,
        dim: int,
        *,
        heads: int | None = None,
        head_dim: int | None = None,
        expand_v: float = 1.0,
        rank: int | None = None,
        short_conv: int = 4,
        conv_bias: bool = False,
        gate_bias: bool = False,
        negative_eigenvalues: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        positive("kda", heads=heads, head_dim=head_dim, expand_v=expand_v, rank=rank)
        if head_dim is None:
            heads = heads_for("kda", heads, 128, dim)
            head_dim = dim // heads
        heads = max(dim // head_dim, 1) if heads is None else heads
        self.dim, self.heads, self.backend = dim, heads, backend
        self.key_width, self.value_width = head_dim, max(int(expand_v * head_dim), 1)
        self.largest_beta = 2.0 if negative_eigenvalues else 1.0
        keys, values = heads * self.key_width, heads * self.value_width
        rank = self.value_width if rank is None else rank
        self.qkv = ConvolvedQKV("kda", dim, heads, keys, values, short_conv=short_conv, conv_bias=conv_bias)
        self.beta_proj = nn.Linear(dim, heads, bias=False)
        self.decay_proj = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, keys, bias=False))
        self.A_log, self.dt_bias = decay_parameters(heads, keys, smallest=1.0)
        self.g_proj = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, values, bias=gate_bias))
        self.norm = GatedNorm(self.value_width, activation="sigmoid")
        self.o_proj = nn.Linear(values, dim, bias=False)
