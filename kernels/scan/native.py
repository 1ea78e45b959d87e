"""The scan in C++ for CPUs: rows streamed in time, threads over sequences, and over the columns of few. See native.cpp.

States are kept in float32 (float64 for float64), also where the sequences are float16 or bfloat16. The bits of the
results depend neither on the number of threads nor on the config, but on how often it splits time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels import jit_cpp, pool
from kernels.memory import FORMATS, address, bounds, contiguous, no_kernel, sequences, side_by_side
from kernels.problem import Problem, state_dtype

SOURCE = Path(__file__).with_suffix(".cpp")
# fewer numbers than this are done before a second thread has woken up
SERIAL_SIZE = 32768
# A call that reads and writes so much, or less, is taken to find it in the cache
CACHED_BYTES = 12 << 20
# Time may be split where sequences have so many rows and threads at most so many columns each
LONG_ROWS = 4096
COLUMNS_FOR_A_THREAD = 16


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    if problem.device.type != "cpu":
        return [f"runs on cpu, the tensors are on {problem.device.type}"]
    # the backward pass is posed by the residuals a, h
    if wrong := no_kernel(problem, "a", "x" if "x" in problem.dtypes else "h"):
        return wrong
    reason = jit_cpp.reason(SOURCE)
    return [] if reason is None else [reason]


def configs(problem: Problem) -> Sequence[dict[str, int]]:
    """Candidates for the tuner, the default first.

    block: a thread walks down at most so many columns side by side. around_cache_mib: outputs of this size together,
    in MiB, are written around the cache. split: time is split into so many chunks, all but one of which are read twice,
    where there are too few columns to occupy the threads.
    """
    found = [
        {"block": 2048, "around_cache_mib": 24, "split": 1},
        {"block": 2048, "around_cache_mib": 8, "split": 1},
        {"block": 1024, "around_cache_mib": 24, "split": 1},
    ]
    sizes, threads = problem.sizes, torch.get_num_threads()
    count = sizes.get("N", sizes["B"])
    columns = count * sizes["D"] * (2 if problem.options["pairs"] else 1)
    if threads > 1 and sizes["B"] * sizes["T"] >= count * LONG_ROWS and columns <= COLUMNS_FOR_A_THREAD * threads:
        # each thread one chunk before the states between them are known, and one after
        found.append(found[0] | {"split": threads + 1})
    return found


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
    if initial_state is None:
        # sizes one by one: torch takes longer to read a tuple of them
        final_state = x.new_empty(sequences(x, cu_seqlens), *x.shape[2:], dtype=state_dtype(x.dtype))
    else:
        final_state = pool.empty_like(initial_state)
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
    cu_seqlens, initial_state, dfinal_state = bounds(cu_seqlens), contiguous(initial_state), contiguous(dfinal_state)
    da = pool.empty_like(a) if needs[0] else None
    dx = pool.empty_like(h) if needs[1] else None
    dinitial_state = torch.empty_like(initial_state) if needs[2] and initial_state is not None else None
    chunks = chunk_states(h, cu_seqlens, config)
    _function("scan_backward", 27)(
        *_sequences(a, h, cu_seqlens, reverse, config, 2, chunks),
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
    a, x, initial_state, cu_seqlens = side_by_side(a), side_by_side(x), contiguous(initial_state), bounds(cu_seqlens)
    chunks = chunk_states(x, cu_seqlens, config)
    _function("scan_forward", 22)(
        *_sequences(a, x, cu_seqlens, reverse, config, 1, chunks),
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


def chunk_states(x: Tensor, cu_seqlens: Tensor | None, config: Mapping[str, int]) -> Tensor | None:
    """What rows.h keeps of chunks; None where time is not split."""
    split = config.get("split", 1)
    if split == 1:
        return None
    return x.new_empty((3, sequences(x, cu_seqlens), split, *x.shape[2:]), dtype=state_dtype(x.dtype))


def _sequences(
    a: Tensor,
    x: Tensor,
    cu_seqlens: Tensor | None,
    reverse: bool,
    config: Mapping[str, int],
    outputs: int,
    chunks: Tensor | None,
) -> tuple[int, ...]:
    """The fields of Sequences, then format, pairs and in_cache. outputs: how many tensors like x are written."""
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
        config.get("split", 1),
        address(chunks),
        FORMATS[a.dtype, x.dtype],
        pairs,
        # forward two inputs and an output, backward three and two
        (2 * outputs + 1) * x.nbytes <= CACHED_BYTES,
    )
