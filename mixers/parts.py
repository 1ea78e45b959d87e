"""What mixers and blocks are made of: norms, activations, the gated channel mixer, HGRN's lower bounds, rotary."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in this dtype. Tensors that have it are not asked: for one token, calls cost more than numbers."""
    return x if x.dtype == dtype else x.to(dtype)


def choice(who: str, option: str, value: str, allowed: object) -> str:
    """`value`, if it is one of `allowed`; else a ValueError that lists them."""
    if value not in allowed:  # type: ignore[operator]
        raise ValueError(f"{who}: {option} is {value!r}, expected one of {', '.join(map(repr, allowed))}")  # type: ignore[call-overload]
    return value


def norm(kind: str, dim: int) -> nn.Module:
    """ "layer": (x - mean) / std · w + b;  "rms": x / rms(x) · w;  over the last axis."""
    choice("norm", "kind", kind, ("layer", "rms"))
    return nn.LayerNorm(dim) if kind == "layer" else nn.RMSNorm(dim, eps=1e-5)


class GLU(nn.Module):
    """Gated linear unit, the channel mixer: y = W3 (act(W1 x) ⊙ W2 x), W1, W2: dim -> width.

    Source: Shazeer, "GLU variants improve Transformer", arXiv 2002.05202.
    """

    def __init__(self, dim: int, width: int, *, activation: str = "silu", bias: bool = True) -> None:
        super().__init__()
        self.activation = choice("GLU", "activation", activation, ACTIVATIONS)
        self.gate = nn.Linear(dim, width, bias=bias)
        self.up = nn.Linear(dim, width, bias=bias)
        self.down = nn.Linear(width, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


class LowerBounds(nn.Module):
    """HGRN's lower bounds of the forget gates, learned across layers (arXiv 2311.04823, section 3.3).

    P = softmax over layers of Γ [L, D];  the bound of layer k = 1..L is
        "inclusive":  P_2 + ... + P_k          (the language-model code)
        "exclusive":  P_1 + ... + P_{k-1}      (the paper's text, the ImageNet and LRA code)
    Equal at the start, (k - 1)/L; 0 for the first layer; never 1. Computed in float32.
    """

    def __init__(self, layers: int, dim: int, *, convention: str = "inclusive") -> None:
        super().__init__()
        self.convention = choice("LowerBounds", "convention", convention, ("inclusive", "exclusive"))
        self.weight = nn.Parameter(torch.ones(layers, dim))

    def forward(self) -> Tensor:
        """The bounds [L, D], float32 or wider."""
        weight = self.weight if self.weight.dtype == torch.float64 else self.weight.float()
        shares = weight.softmax(0)
        if self.convention == "inclusive":
            return shares.cumsum(0) - shares[0]
        return shares.cumsum(0) - shares

    def row(self, layer: int) -> BoundOfLayer:
        return BoundOfLayer(self, layer)


class BoundOfLayer:
    """One layer's row of the shared bounds; refers to them without owning them."""

    def __init__(self, bounds: LowerBounds, layer: int) -> None:
        self.bounds, self.layer = bounds, layer

    def __call__(self) -> Tensor:
        return self.bounds()[self.layer]


class LowerBounded(nn.Module):
    """What HGRN and HGRN2 share: a lower bound γ of the forget gates, fixed, learned, or read from elsewhere."""

    fixed_bound: Tensor
    _lower_bound: tuple[float | Callable[[], Tensor] | None]

    def lower_bound(self) -> Tensor | float:
        """γ: a number, or one for each of the gates."""
        bound = self._lower_bound[0]
        return bound() if callable(bound) else self.fixed_bound if bound is None else bound

    def _set_lower_bound(self, who: str, bound: float | Tensor | Callable[[], Tensor] | None, width: int) -> None:
        if isinstance(bound, Tensor):
            if bound.shape != (width,):
                raise ValueError(f"{who}: lower_bound has shape {list(bound.shape)}, expected [{width}]")
            if isinstance(bound, nn.Parameter):
                self.fixed_bound = bound
            else:
                self.register_buffer("fixed_bound", bound.detach().clone())
            bound = None
        elif bound is None:
            bound = 0.0
        elif isinstance(bound, nn.Module):
            self.bound = bound
        elif not callable(bound) and not 0 <= bound < 1:
            raise ValueError(f"{who}: lower_bound is {bound}, expected 0 <= lower_bound < 1")
        # in a tuple, so that bounds shared between layers belong to the Stack that owns them, not to every layer
        self._lower_bound = (bound,)


def frequencies(half: int, base: float, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Those of rotary position embeddings, base^(-j / half) [half]."""
    return base ** (torch.arange(0, -half, -1, device=device, dtype=dtype) / half)


# for tokens alone, whose frequencies are the same every time
kept_frequencies = functools.cache(frequencies)


def rotate(q: Tensor, k: Tensor, positions: Tensor, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of q, k [B, T, H, K] at positions [B or 1, T], in float32 (arXiv 2104.09864).

    Halves convention: (x1, x2) -> (x1 cos - x2 sin, x1 sin + x2 cos) with x1 the first half of K and
    angle = position · base^(-2j/K). A last column that has no partner stays. q and k may differ in their heads.
    """
    half = q.shape[-1] // 2
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    angle = positions[:, :, None, None] * frequencies(half, base, device=q.device, dtype=wide)
    cos, sin = angle.cos(), angle.sin()

    def turned(x: Tensor) -> Tensor:
        x1, x2, *rest = cast(x, wide).split_with_sizes([half, half] + [1] * (x.shape[-1] % 2), -1)
        first, second = torch.addcmul(x1 * cos, x2, sin, value=-1), torch.addcmul(x2 * cos, x1, sin)
        return cast(torch.cat([first, second, *rest], -1), x.dtype)

    if q.shape[1] > 1:
        return turned(q), turned(k)
    # of a token, fewer calls are worth a copy
    q, k = turned(torch.cat([q, k], 2)).split_with_sizes([q.shape[2], k.shape[2]], 2)
    return q, k
