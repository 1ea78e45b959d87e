"""What GLA, HGRN2 and RWKV-6 share: where one native call may make a token, from their projections to their norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kernels.gated_norm.native import ACTIVATIONS
from kernels.gla.gated_step import SOURCE
from kernels.lone import alone, readable
from mixers.heads import GatedNorm
from mixers.projections import untouched


def for_step(
    norm: GatedNorm,
    x: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    backend: str,
    *others: Tensor,
    states: Sequence[Tensor] = (),
) -> dict[str, Any] | None:
    """What `kernels.gla.gated_step.step` has to know of the norm; None where gla and the norm are to be asked.

    x is [B, T, dim], as the others in the layer's dtype; state and what else is in `states` in the state dtype.
    """
    if not alone(x, cu_seqlens, backend, SOURCE) or not untouched(norm, GatedNorm):
        return None
    if norm.gate_first or norm.activation not in ACTIVATIONS:
        return None
    weight, bias = norm.weight, norm.bias
    if not readable(x, (weight, bias, *others), (state, *states)):
        return None
    return {
        "weight": weight, "bias": bias, "center": norm.center, "activation": norm.activation, "eps": norm.eps,
    }  # fmt: skip
