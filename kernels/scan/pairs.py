"""Complex numbers held as real pairs [..., 2], so that every real dtype will do and Inductor can generate code."""

from __future__ import annotations

import torch
from torch import Tensor


def multiply(a: Tensor, b: Tensor, pairs: bool) -> Tensor:
    """a b, of real numbers or of complex ones held as real pairs."""
    if not pairs:
        return a * b
    (ar, ai), (br, bi) = a.unbind(-1), b.unbind(-1)
    return torch.stack((ar * br - ai * bi, ar * bi + ai * br), -1)


def conjugate(a: Tensor, pairs: bool) -> Tensor:
    return torch.stack((a[..., 0], -a[..., 1]), -1) if pairs else a


def ones(like: Tensor, pairs: bool) -> Tensor:
    """The number 1 in the shape of `like`."""
    return (
        torch.stack((torch.ones_like(like[..., 0]), torch.zeros_like(like[..., 0])), -1)
        if pairs
        else torch.ones_like(like)
    )
