"""The gated norm in C++ for CPUs: every row is read once from memory and written once, forward and backward.

See native.cpp. Sums are float32 (float64 for float64). The bits of the results do not depend on the number of threads:
gradients of weights and biases are summed over runs of rows first, whoever computes these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels import jit_cpp, pool
from kernels.memory import DTYPES, address, bits, heads_side_by_side, no_kernel
from kernels.problem import Problem, state_dtype

SOURCE = Path(__file__).with_suffix(".cpp")
# in the order in which native.cpp counts them
ACTIVATIONS = {"identity": 1, "silu": 2, "sigmoid": 3}
# fewer numbers than this are done before a second thread has woken up
SERIAL_SIZE = 32768
# numbers that a thread takes at a time, forward
RUN_SIZE = 16384
_function = jit_cpp.functions(SOURCE)


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    activation = problem.options["activation"]
    if activation not in ACTIVATIONS and problem.options["gate"]:
        return [f"no kernel for activation {activation!r}"]
    return no_kernel(problem, "x") or jit_cpp.reasons(SOURCE)


def configs(problem: Problem) -> Sequence[dict[str, int]]:
    """Candidates for the tuner, the default first. around_cache_mib: outputs of this size, in MiB, are written around
    the cache."""
    return [{"around_cache_mib": 24}, {"around_cache_mib": 0}]


def forward(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    center: bool,
    activation: str,
    gate_first: bool,
    eps: float,
    config: Mapping[str, int],
) -> tuple[Tensor]:
    """(y,) like x."""
    y = pool.empty_like(x)
    run = max(1, RUN_SIZE // (x.shape[2] * x.shape[3]))
    given = _Given(x, gate, weight, bias)
    _function("gated_norm_forward", 21)(*given.fields(center, activation, gate_first, eps, run, config), y.data_ptr())
    return (y,)


def backward(
    dy: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    center: bool,
    activation: str,
    gate_first: bool,
    eps: float,
    needs: tuple[bool, ...],
    config: Mapping[str, int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dgate, dweight, dbias), each like its input, or None where `needs` says so or there is no such input."""
    dy = heads_side_by_side(torch.zeros_like(x) if dy is None else dy)
    given = _Given(x, gate, weight, bias)
    rows, wide = x.shape[0] * x.shape[1], state_dtype(x.dtype)
    # few enough that rounded sums stay short, and enough for many threads
    run = 64 if rows < 16384 else 256
    dx = pool.empty_like(x) if needs[0] else None
    dgate = pool.empty_like(gate) if needs[1] and gate is not None else None
    dweight = x.new_empty(weight.shape, dtype=wide) if needs[2] and weight is not None else None
    dbias = x.new_empty(bias.shape, dtype=wide) if needs[3] and bias is not None else None
    partials = None
    if dweight is not None or dbias is not None:
        partials = x.new_empty((-(-rows // run), 2, *x.shape[2:]), dtype=wide)
    _function("gated_norm_backward", 28)(
        *given.fields(center, activation, gate_first, eps, run, config),
        dy.data_ptr(),
        *dy.stride()[:2],
        *map(address, (dx, dgate, dweight, dbias, partials)),
    )
    if dweight is not None and weight is not None:
        dweight = dweight.to(weight.dtype)
    if dbias is not None and bias is not None:
        dbias = dbias.to(bias.dtype)
    return dx, dgate, dweight, dbias


class _Given:
    """The inputs as native.cpp reads them; keeps the copies that it made alive."""

    def __init__(self, x: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> None:
        wide = state_dtype(x.dtype)
        self.x, self.gate = heads_side_by_side(x), None if gate is None else heads_side_by_side(gate)
        self.weight, self.bias = _widened(weight, wide), _widened(bias, wide)

    def fields(
        self, center: bool, activation: str, gate_first: bool, eps: float, run: int, config: Mapping[str, int]
    ) -> tuple[int, ...]:
        """The fields of native.cpp's Problem."""
        x, gate = self.x, self.gate
        numbers, stride = x.numel(), x.stride()
        gate_stride = (0, 0) if gate is None else gate.stride()
        return (
            *x.shape,
            center,
            0 if gate is None else ACTIVATIONS[activation],
            gate_first and gate is not None,
            DTYPES[x.dtype],
            torch.get_num_threads() if numbers >= SERIAL_SIZE else 1,
            run,
            numbers * x.element_size() >= config["around_cache_mib"] << 20,
            bits(eps),
            x.data_ptr(),
            stride[0],
            stride[1],
            address(gate),
            gate_stride[0],
            gate_stride[1],
            address(self.weight),
            address(self.bias),
        )


def _widened(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if parameter is None or (parameter.dtype == dtype and parameter.is_contiguous()):
        return parameter
    return parameter.to(dtype).contiguous()
