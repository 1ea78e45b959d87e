"""Torch's fused attention kernels, which never hold the scores: one call forward and one backward, on CPU and on CUDA.

Sequences are [B, T, H, W] with one width W for q, k and v; lse [B, T, H] is the logarithm of the softmax's divisor.
`mask` is additive, [B or 1, H or 1, T, S] in q's dtype, or None. What comes back where it hides every key is undefined.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten
# CUDA kernels load this many numbers at once, pad lse to rows of 32 and want rows of a mask to begin at multiples of 16
_LOAD, _LSE_ROWS, _MASK_COLUMNS = 8, 32, 16


def reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there are no such kernels; None if there are."""
    if device.type == "cuda" and torch.version.hip:
        return "torch's fused kernels for ROCm have another log-sum-exp"
    if device.type == "cuda" and dtype == torch.float64:
        return "torch has no fused kernel for float64 on cuda"
    return None


def width(numbers: int, device: torch.device) -> int:
    """The least width of heads, at least `numbers`, that the kernels take."""
    return numbers if device.type == "cpu" else -(-numbers // _LOAD) * _LOAD


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """y [B, T, H, W] and lse. causal: T = S and query t sees the keys up to t."""
    q, k, v = (_loadable(x) for x in (q, k, v))
    if _on_cpu(q):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y, lse = _aten._scaled_dot_product_flash_attention_for_cpu.default(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
        return y.transpose(1, 2), lse.transpose(1, 2)
    k, v = (_repeat(x, q) for x in (k, v))
    # the four None: sequences of one length; 0.0: dropout
    y, lse, *_ = _aten._efficient_attention_forward.default(
        q, k, v, _bias(mask, q, k), None, None, None, None, 0.0, int(causal), True, scale=scale
    )
    return y, lse[..., : q.shape[1]].transpose(1, 2)


def backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of one call of `forward`, or the share of k in them where y and lse belong to more keys than k has."""
    dy, q, k, v, y = (_loadable(x) for x in (dy, q, k, v, y))
    if _on_cpu(q):
        dy, q, k, v, y, lse = (x.transpose(1, 2) for x in (dy, q, k, v, y, lse))
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
            dy, q, k, v, y, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
    groups = k.shape[2]
    k, v = (_repeat(x, q) for x in (k, v))
    rows = F.pad(lse.transpose(1, 2), (0, -q.shape[1] % _LSE_ROWS), value=torch.inf)
    # without dropout nobody looks at its seed and offset
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    # more than one split of the keys would add to dq in any order
    dq, dk, dv, _ = _aten._efficient_attention_backward.default(
        dy, q, k, v, _bias(mask, q, k), y.contiguous(), None, None, q.shape[1], k.shape[1], rows, 0.0, seed, seed,
        int(causal), False, scale=scale, num_splits_key=1,
    )  # fmt: skip
    dk, dv = (g.unflatten(2, (groups, -1)).sum(3) for g in (dk, dv))
    return dq, dk, dv


def merge(y: Tensor, lse: Tensor, y_more: Tensor, lse_more: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from attention over each."""
    both = torch.logaddexp(lse, lse_more)
    weight, weight_more = ((x - both).exp()[..., None] for x in (lse, lse_more))
    return (weight * y + weight_more * y_more).to(y.dtype), both


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _loadable(x: Tensor) -> Tensor:
    """The kernels believe the last stride to be 1; those on CUDA want the others and the first number aligned."""
    able = x.stride(-1) == 1
    if not _on_cpu(x):
        able = able and not any(s % _LOAD for s in (*x.stride()[:-1], x.storage_offset()))
    return x if able else x.clone(memory_format=torch.contiguous_format)


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    """[B, S, G, W] as [B, S, H, W]."""
    times = q.shape[2] // x.shape[2]
    return x if times == 1 else x.repeat_interleave(times, 2)


def _bias(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask for every head, with rows that begin where CUDA can load them."""
    if mask is None:
        return None
    columns = mask.shape[-1]
    aligned = F.pad(mask, (0, -columns % _MASK_COLUMNS))[..., :columns]
    return aligned.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])
