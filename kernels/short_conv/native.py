"""The convolution in C++ for CPUs: one pass over the rows forward and one backward. See native.cpp.

Sums are float32 (float64 for float64). The bits of the results depend neither on the number of threads nor on the
config: gradients of the weights are summed over runs of RUN rows first, whoever computes these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels import jit_cpp, pool
from kernels.memory import DTYPES, address, bounds, contiguous, no_kernel, sequences, side_by_side
from kernels.problem import Problem, state_dtype

SOURCE = Path(__file__).with_suffix(".cpp")
# fewer numbers than this are done before a second thread has woken up
SERIAL_SIZE = 32768
# rows that a thread takes at a time; backward, those whose gradients are summed in the format of the sums
RUN = {"forward": 64, "backward": 256}
_function = jit_cpp.functions(SOURCE)


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    return no_kernel(problem, "x") or jit_cpp.reasons(SOURCE)


def configs(problem: Problem) -> Sequence[dict[str, int]]:
    """Candidates for the tuner, the default first.

    working_set_kib: what a thread's rows and weights may take up in the cache. around_cache_mib: outputs of this size,
    in MiB, are written around the cache.
    """
    return [
        {"working_set_kib": 32, "around_cache_mib": 24},
        {"working_set_kib": 256, "around_cache_mib": 24},
        {"working_set_kib": 32, "around_cache_mib": 0},
    ]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    activation: str,
    reverse: bool,
    config: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    """y like x, and final_state [N, W - 1, D] in x's dtype."""
    y = pool.empty_like(x)
    final_state = x.new_empty((sequences(x, cu_seqlens), weight.shape[1] - 1, x.shape[2]))
    given = _Given(x, weight, bias, initial_state, cu_seqlens)
    fields = given.fields("forward", activation, reverse, config)
    _function("short_conv_forward", 22)(*fields, y.data_ptr(), final_state.data_ptr())
    return y, final_state


def backward(
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
    needs: tuple[bool, ...],
    config: Mapping[str, int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias and dinitial_state, each like its input, or None where `needs` says so."""
    given = _Given(x, weight, bias, initial_state, cu_seqlens)
    dy, dfinal_state = side_by_side(dy), contiguous(dfinal_state)
    dx = pool.empty_like(x) if needs[0] else None
    dinitial_state = None
    if needs[3] and initial_state is not None:
        dinitial_state = torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    D, W = weight.shape
    partials = sums = None
    if needs[1] or needs[2]:
        runs = -(-x.shape[0] * x.shape[1] // RUN["backward"])
        partials = x.new_empty((runs, W + 1, D), dtype=given.taps.dtype)
        sums = torch.empty_like(partials[0])
    _function("short_conv_backward", 28)(
        *given.fields("backward", activation, reverse, config),
        address(dy),
        *((0, 0) if dy is None else dy.stride()[:2]),
        address(dfinal_state),
        address(dx),
        address(dinitial_state),
        address(partials),
        address(sums),
    )
    dweight = dbias = None
    if sums is not None and needs[1]:
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format).copy_(sums[:W].t())
    if sums is not None and needs[2] and bias is not None:
        dbias = torch.empty_like(bias, memory_format=torch.contiguous_format).copy_(sums[W])
    return dx, dweight, dbias, dinitial_state


class _Given:
    """The inputs as native.cpp reads them; keeps the copies that it made alive."""

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, cu_seqlens: Tensor | None
    ) -> None:
        sums = state_dtype(x.dtype)
        self.x = side_by_side(x)
        # [D, W], with any strides
        self.taps = weight if weight.dtype == sums else weight.to(sums)
        self.bias = None if bias is None else bias.to(sums).contiguous()
        self.initial_state, self.cu_seqlens = contiguous(initial_state), bounds(cu_seqlens)

    def fields(self, direction: str, activation: str, reverse: bool, config: Mapping[str, int]) -> tuple[int, ...]:
        """The fields of native.cpp's Problem, and the strides of its taps."""
        x = self.x
        batch, rows, columns = x.shape
        numbers = batch * rows * columns
        size = numbers * x.element_size()
        return (
            address(self.cu_seqlens),
            sequences(x, self.cu_seqlens),
            rows,
            columns,
            self.taps.shape[1],
            reverse,
            activation == "silu",
            DTYPES[x.dtype],
            torch.get_num_threads() if numbers >= SERIAL_SIZE else 1,
            RUN[direction],
            config["working_set_kib"] << 10,
            size >= config["around_cache_mib"] << 20,
            x.data_ptr(),
            *x.stride()[:2],
            self.taps.data_ptr(),
            address(self.bias),
            address(self.initial_state),
            *self.taps.stride(),
        )
