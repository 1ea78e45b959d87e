"""The gates and the scan in one pass in C++ for CPUs: rows streamed in time, threads over sequences and blocks of
columns. See native.cpp.

Gates and states are float32 (float64 for float64), also where the sequences are float16 or bfloat16. The bits of the
results depend neither on the number of threads nor on the config, but on how often it splits time: gradients of the
lower bound and the angles are summed over the rows of each chunk first, whoever computes these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels import jit_cpp, pool
from kernels.hgru.gates import ACTIVATIONS
from kernels.memory import DTYPES, address, bounds, contiguous, no_kernel, sequences, side_by_side
from kernels.problem import Problem, state_dtype
from kernels.scan import native as scan
from kernels.scan.native import chunk_states

__all__ = ["backward", "cannot", "configs", "forward"]

SOURCE = Path(__file__).with_suffix(".cpp")
KINDS = {name: kind for kind, name in enumerate(ACTIVATIONS)}
# fewer numbers than this are done before a second thread has woken up
SERIAL_SIZE = 16384
# MiB of outputs that no tensor has
NEVER = 1 << 20


def cannot(problem: Problem) -> list[str]:
    """Why this backend cannot run the problem; empty if it can."""
    if wrong := no_kernel(problem, "i"):
        return wrong
    reason = jit_cpp.reason(SOURCE)
    return [] if reason is None else [reason]


def configs(problem: Problem) -> Sequence[dict[str, int]]:
    """Candidates for the tuner, the default first: the scan's.

    Forward in 16 bits on AVX2 nothing goes around the cache by default: the gates take longer than the memory, and rows
    that are copied on their way are work without a gain.
    """
    found = scan.configs(problem)
    computes = problem.dtypes["i"].itemsize == 2 and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return [found[0] | {"around_cache_mib": NEVER}, *found] if computes and problem.direction == "forward" else found


def forward(
    i: Tensor,
    f: Tensor,
    lower_bound: Tensor | None,
    theta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    activation: str,
    reverse: bool,
    config: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    """h like i, and final_state [N, D] or [N, D, 2] in the state dtype."""
    h = pool.empty_like(i)
    given = _Given(i, f, lower_bound, theta, initial_state, cu_seqlens, config)
    if initial_state is None:
        final_state = i.new_empty((given.sequences, *i.shape[2:]), dtype=given.wide)
    else:
        final_state = pool.empty_like(initial_state)
    _function("hgru_forward", 25)(
        *given.fields(activation, reverse, h.nbytes, config), h.data_ptr(), final_state.data_ptr()
    )
    return h, final_state


def backward(
    dh: Tensor | None,
    dfinal_state: Tensor | None,
    i: Tensor,
    f: Tensor,
    h: Tensor,
    lower_bound: Tensor | None,
    theta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    activation: str,
    reverse: bool,
    needs: tuple[bool, ...],
    config: Mapping[str, int],
) -> tuple[Tensor | None, ...]:
    """(di, df, dlower_bound, dtheta, dinitial_state), each like its input, or None where `needs` says so."""
    given = _Given(i, f, lower_bound, theta, initial_state, cu_seqlens, config)
    h, dh, dfinal_state = side_by_side(h), side_by_side(dh), contiguous(dfinal_state)
    di = pool.empty_like(i) if needs[0] else None
    df = pool.empty_like(f) if needs[1] else None
    dinitial_state = None
    if needs[4] and initial_state is not None:
        dinitial_state = torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    sums: list[Tensor | None] = [None, None]
    partials: list[Tensor | None] = [None, None]
    for number, parameter in enumerate((lower_bound, theta)):
        if needs[2 + number] and parameter is not None:
            sums[number] = parameter.new_empty(parameter.shape)
            partials[number] = parameter.new_empty((given.sequences * given.split, *parameter.shape))
    written = sum(0 if t is None else t.nbytes for t in (di, df))
    _function("hgru_backward", 37)(
        *given.fields(activation, reverse, written, config),
        h.data_ptr(),
        address(dh),
        *h.stride()[:2],
        *((0, 0) if dh is None else dh.stride()[:2]),
        *map(address, (dfinal_state, di, df, dinitial_state, *sums, *partials)),
    )
    return di, df, *sums, dinitial_state


class _Given:
    """The inputs as native.cpp reads them; keeps the copies that it made alive."""

    def __init__(
        self,
        i: Tensor,
        f: Tensor,
        lower_bound: Tensor | None,
        theta: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        config: Mapping[str, int],
    ) -> None:
        self.wide = state_dtype(i.dtype)
        self.i, self.f, self.initial_state = side_by_side(i), side_by_side(f), contiguous(initial_state)
        self.cu_seqlens, self.sequences = bounds(cu_seqlens), sequences(i, cu_seqlens)
        self.split, self.chunks = config.get("split", 1), chunk_states(i, cu_seqlens, config)
        self.lower_bound, self.turn = contiguous(lower_bound), None
        if theta is not None:
            self.turn = torch.stack((theta.cos(), theta.sin()))
        elif i.ndim == 4:
            self.turn = i.new_ones((2, i.shape[2]), dtype=self.wide)
            self.turn[1] = 0

    def fields(self, activation: str, reverse: bool, written: int, config: Mapping[str, int]) -> tuple[int, ...]:
        """The fields of native.cpp's Given. written: bytes of the outputs."""
        i, f = self.i, self.f
        cos = address(self.turn)
        return (
            address(self.cu_seqlens),
            self.sequences,
            *f.shape[1:],
            reverse,
            torch.get_num_threads() if i.numel() >= SERIAL_SIZE else 1,
            config["block"],
            written >= config["around_cache_mib"] << 20,
            self.split,
            address(self.chunks),
            DTYPES[i.dtype],
            i.ndim == 4,
            KINDS[activation],
            i.data_ptr(),
            f.data_ptr(),
            *i.stride()[:2],
            *f.stride()[:2],
            address(self.lower_bound),
            cos,
            cos and cos + f.shape[2] * self.wide.itemsize,
            address(self.initial_state),
        )


@functools.cache
def _function(name: str, fields: int) -> Callable[..., None]:
    return jit_cpp.load(SOURCE).function(name, fields)
