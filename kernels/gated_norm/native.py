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
from kernels.memory import DTYPES, address, heads_side_by_side, no_kernel
from kernels.problem import Problem, state_dtype

SOURCE = Path(__file__).with_suffix(".cpp")
# in the order in which native.h counts them
ACTIVATIONS = {"identity": 1, "silu": 2, "sigmoid": 3}
# fewer numbers than this are done before a second thread has woken up
SERIAL_SIZE = 32768
# numbers that a thread takes at a time, forward
RUN_SIZE = 16384
DEFAULT = {"around_cache_mib": 24}
# native.h's Problem, and what follows it
FORWARD_FIELDS, BACKWARD_FIELDS = "11qd10q" + "q", "11qd10q" + "8q"
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
    return [DEFAULT, {"around_cache_mib": 0}]


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
    given = x, gate, weight, bias = _readable(x, gate, weight, bias)
    y = pool.empty_like(x)
    _, _, H, V = x.shape
    run = max(1, RUN_SIZE // (H * V))
    _function("gated_norm_forward", FORWARD_FIELDS)(
        *_fields(*given, center, activation, gate_first, eps, run, config), y.data_ptr()
    )
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
    dtypes = [None if parameter is None else parameter.dtype for parameter in (weight, bias)]
    given = x, gate, weight, bias = _readable(x, gate, weight, bias)
    B, T, H, V = x.shape
    # rows whose sums a thread leaves: few enough that many threads have some
    run = 64 if B * T < 16384 else 256
    runs, wide = -(-B * T // run), state_dtype(x.dtype)
    dx = pool.empty_like(x) if needs[0] else None
    dgate = pool.empty_like(gate) if needs[1] and gate is not None else None
    dweight = x.new_empty(H, V, dtype=wide) if needs[2] and weight is not None else None
    dbias = x.new_empty(H, V, dtype=wide) if needs[3] and bias is not None else None
    partials = None
    if runs > 1 and (dweight is not None or dbias is not None):
        partials = x.new_empty(runs, 2, H, V, dtype=wide)
    _function("gated_norm_backward", BACKWARD_FIELDS)(
        *_fields(*given, center, activation, gate_first, eps, run, config),
        dy.data_ptr(),
        *dy.stride()[:2],
        *map(address, (dx, dgate, dweight, dbias, partials)),
    )
    dweight, dbias = (d if d is None or d.dtype == dtype else d.to(dtype) for d, dtype in zip((dweight, dbias), dtypes))
    return dx, dgate, dweight, dbias


def _readable(
    x: Tensor, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The inputs as native.h's Problem reads them, some of them copies."""
    wide = state_dtype(x.dtype)
    return (
        heads_side_by_side(x),
        None if gate is None else heads_side_by_side(gate),
        None if weight is None else _widened(weight, wide),
        None if bias is None else _widened(bias, wide),
    )


def _widened(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    if parameter.dtype != dtype:
        parameter = parameter.to(dtype)
    return parameter if parameter.is_contiguous() or parameter.stride(1) == 1 else parameter.contiguous()


def _fields(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    center: bool,
    activation: str,
    gate_first: bool,
    eps: float,
    run: int,
    config: Mapping[str, int],
) -> tuple[float, ...]:
    """The fields of native.h's Problem. A parameter that all heads share lies 0 numbers behind itself."""
    batch, row, _, _ = x.stride()
    opened = 0, 0, 0
    if gate is not None:
        gate_batch, gate_row, _, _ = gate.stride()
        opened = gate.data_ptr(), gate_batch, gate_row
    return (
        *x.shape,
        center,
        0 if gate is None else ACTIVATIONS[activation],
        gate_first and gate is not None,
        DTYPES[x.dtype],
        torch.get_num_threads() if x.numel() >= SERIAL_SIZE else 1,
        run,
        x.nbytes >= config["around_cache_mib"] << 20,
        eps,
        x.data_ptr(),
        batch,
        row,
        *opened,
        *((0, 0) if weight is None else (weight.data_ptr(), weight.stride()[0])),
        *((0, 0) if bias is None else (bias.data_ptr(), bias.stride()[0])),
    )
