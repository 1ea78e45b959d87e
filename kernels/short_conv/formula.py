"""The convolution and its gradient in plain differentiable torch, as loops over the taps.

With x extended by the S = W - 1 rows of the initial state, w[k] = weight[:, k] and z before the activation:

    z[t] = bias + sum over k of w[k] x[t+k]            y = act(z)        final state = the last S rows of x
    dz = dy act'(z)     dw[k] = sum over t of dz[t] x[t+k]     dbias = sum of dz
    dx[i] = sum over k of w[k] dz[i-k], and in the last S rows the gradient of the final state
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.problem import state_dtype
from kernels.short_conv.extended import Extended


def outputs(rows: Tensor, bias: Tensor, *taps: Tensor, silu: bool) -> Tensor:
    """y [B, M - S, D] of extended rows [B, M, D]; bias and the W taps [D] in the dtype of the sums."""
    z = _convolved(rows, bias, *taps)
    return (z * torch.sigmoid(z) if silu else z).to(rows.dtype)


def row_gradients(
    rows: Tensor, dy: Tensor, dlast: Tensor, bias: Tensor, *taps: Tensor, silu: bool, inputs: bool, parameters: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(drows [B, M, D], dweight [D, W], dbias [D]), each None if not wanted.

    dy, extended by zeros, has its row t at t + S; dlast [B or 1, M or 1, D]: what the final states add to drows.
    """
    S, length = len(taps) - 1, rows.shape[1] - len(taps) + 1
    dz = dy[:, S:].to(bias.dtype)
    if silu:
        z = _convolved(rows, bias, *taps)
        dz = dz * torch.sigmoid(z) * (1 + z * torch.sigmoid(-z))
    drows = dweight = dbias = None
    if inputs:
        around = F.pad(dz, (0, 0, S, S))
        drows = dlast.to(dz.dtype)
        for k, tap in enumerate(taps):
            drows = drows + tap * around[:, S - k : S - k + rows.shape[1]]
        drows = drows.to(rows.dtype)
    if parameters:
        dtaps = [(dz * rows[:, k : k + length].to(dz.dtype)).sum((0, 1)) for k in range(len(taps))]
        dweight, dbias = torch.stack(dtaps, 1), dz.sum((0, 1))
    return drows, dweight, dbias


def _convolved(rows: Tensor, bias: Tensor, *taps: Tensor) -> Tensor:
    length = rows.shape[1] - len(taps) + 1
    z = bias
    for k, tap in enumerate(taps):
        z = z + tap * rows[:, k : k + length].to(tap.dtype)
    return z


def directly(function: Callable[..., Any], *tensors: Tensor, **flags: bool) -> Any:
    return function(*tensors, **flags)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    activation: str,
    reverse: bool,
    run: Callable[..., Any] = directly,
) -> tuple[Tensor, Tensor]:
    """(y, final_state); `run` calls `outputs`."""
    extended = Extended.of(x, weight.shape[1], cu_seqlens, reverse)
    rows = extended.extend(x, initial_state)
    y = run(outputs, rows, *_parameters(weight, bias, state_dtype(x.dtype)), silu=activation == "silu")
    return extended.outputs(y), extended.final(rows)


def gradients(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    activation: str,
    reverse: bool,
    needs: tuple[bool, ...] = (True, True, True, True),
    run: Callable[..., Any] = directly,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dinitial_state); `run` calls `row_gradients`."""
    extended = Extended.of(x, weight.shape[1], cu_seqlens, reverse)
    rows = extended.extend(x, initial_state)
    dlast = x.new_zeros(1, 1, x.shape[2]) if dfinal_state is None else extended.at_final(dfinal_state)
    drows, dweight, dbias = run(
        row_gradients,
        rows,
        extended.extend(torch.zeros_like(x) if dy is None else dy),
        dlast,
        *_parameters(weight, bias, state_dtype(x.dtype)),
        silu=activation == "silu",
        inputs=needs[0] or needs[3],
        parameters=needs[1] or needs[2],
    )
    return (
        extended.inputs(drows) if needs[0] else None,
        dweight.to(weight.dtype) if needs[1] else None,
        dbias.to(bias.dtype) if needs[2] and bias is not None else None,
        extended.initial(drows) if needs[3] and initial_state is not None else None,
    )


def _parameters(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """bias [D] and the taps [D] in the dtype of the sums."""
    bias = weight.new_zeros(weight.shape[0], dtype=dtype) if bias is None else bias.to(dtype)
    return bias, *weight.to(dtype).unbind(1)
