"""The scan in C++ for CPUs: rows streamed in time, threads over sequences and blocks of columns. See native.cpp.

States are kept in float32 (float64 for float64), also where the sequences are float16 or bfloat16. The bits of the
results depend neither on the number of threads nor on the config.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels import jit_cpp, pool
from kernels.memory import FORMATS, address, contiguous, side_by_side
from kernels.problem import Problem, state_dtype

SOURCE = Path(__file__).with_suffix(".cpp")
# fewer numbers than this are done before a second thread has woken up
SERIAL_SIZE = 32768


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    if problem.device.type != "cpu":
        return [f"runs on cpu, the tensors are on {problem.device.type}"]
    # the backward pass is posed by the residuals a, h
    a, x = problem.dtypes["a"], problem.dtypes["x" if "x" in problem.dtypes else "h"]
    if (a, x) not in FORMATS:
        return [f"no kernel for a in {a} with x in {x}"]
    reason = jit_cpp.reason(SOURCE)
    return [] if reason is None else [reason]


def configs(problem: Problem) -> Sequence[dict[str, int]]:
    """Candidates for the tuner, the default first.

    block: a thread walks down at most so many columns side by side. around_cache_mib: outputs of this size together,
    in MiB, are written around the cache.
    """
    return [
        {"block": 2048, "around_cache_mib": 24},
        {"block": 2048, "around_cache_mib": 8},
        {"block": 1024, "around_cache_mib": 24},
    ]


def forward(
    a: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    reverse: bool,
    config: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    """h like x, and final_state [N, D] or [N, D, 2] in the dtype of states."""
    h = pool.empty_like(x)
    batch, _, *columns = x.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = x.new_empty((sequences, *columns), dtype=state_dtype(x.dtype))
    _forward(a, x, initial_state, cu_seqlens, h, final_state, reverse, config)
    return h, final_state


def forward_out(
    a: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    h: Tensor,
    final_state: Tensor,
    *,
    reverse: bool,
    config: Mapping[str, int],
) -> None:
    """`forward` into contiguous tensors that are there already."""
    _forward(a, x, initial_state, cu_seqlens, h, final_state, reverse, config)


def backward(
    dh: Tensor | None,
    dfinal_state: Tensor | None,
    a: Tensor,
    h: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    reverse: bool,
    needs: tuple[bool, ...],
    config: Mapping[str, int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """da like a, dx like h and dinitial_state, each None where `needs` says so."""
    a, h, dh = side_by_side(a), side_by_side(h), None if dh is None else side_by_side(dh)
    cu_seqlens, initial_state, dfinal_state = _bounds(cu_seqlens), contiguous(initial_state), contiguous(dfinal_state)
    da = pool.empty_like(a) if needs[0] else None
    dx = pool.empty_like(h) if needs[1] else None
    dinitial_state = torch.empty_like(initial_state) if needs[2] and initial_state is not None else None
    _function("scan_backward", 24)(
        *_sequences(a, h, cu_seqlens, reverse, config, 2),
        a.data_ptr(),
        h.data_ptr(),
        address(dh),
        *a.stride()[:2],
        *h.stride()[:2],
        *((0, 0) if dh is None else dh.stride()[:2]),
        address(initial_state),
        address(dfinal_state),
        address(da),
        address(dx),
        address(dinitial_state),
    )
    return da, dx, dinitial_state


def _forward(
    a: Tensor,
    x: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    h: Tensor,
    final_state: Tensor,
    reverse: bool,
    config: Mapping[str, int],
) -> None:
    a, x, initial_state, cu_seqlens = side_by_side(a), side_by_side(x), contiguous(initial_state), _bounds(cu_seqlens)
    _function("scan_forward", 19)(
        *_sequences(a, x, cu_seqlens, reverse, config, 1),
        a.data_ptr(),
        x.data_ptr(),
        *a.stride()[:2],
        *x.stride()[:2],
        address(initial_state),
        h.data_ptr(),
        final_state.data_ptr(),
    )


@functools.cache
def _function(name: str, fields: int) -> Callable[..., None]:
    return jit_cpp.load(SOURCE).function(name, fields)


def _sequences(
    a: Tensor, x: Tensor, cu_seqlens: Tensor | None, reverse: bool, config: Mapping[str, int], outputs: int
) -> tuple[int, ...]:
    """The fields of Sequences, then format and pairs. outputs: how many tensors like x are written."""
    shape = x.shape
    pairs = len(shape) == 4
    columns = shape[2] * 2 if pairs else shape[2]
    total = shape[0] * shape[1] * columns
    return (
        address(cu_seqlens),
        shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        shape[1],
        columns,
        reverse,
        torch.get_num_threads() if total >= SERIAL_SIZE else 1,
        config["block"],
        outputs * x.nbytes >= config["around_cache_mib"] << 20,
        FORMATS[a.dtype, x.dtype],
        pairs,
    )


def _bounds(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous()
