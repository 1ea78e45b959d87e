"""The short convolution's C++ and generated code: bits, vectors, far offsets, graphs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import jit_cpp
from kernels.agreement import Expected, draw, pose
from kernels.short_conv import OP, native, short_conv

pytestmark = pytest.mark.usefixtures("nan_filled")

CPU = torch.device("cpu")
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def test_native_gives_the_same_bits_whoever_computes_them() -> None:
    before = torch.get_num_threads()
    for packed, dtype in itertools.product((False, True), (FLOAT32, BFLOAT16)):
        sizes = {"B": 1 if packed else 3, "T": 900, "D": 150, "W": 4, "N": 9 if packed else 3}
        problem = pose(OP, "backward", sizes, dtype=dtype, device=CPU, activation="silu", bias=True, packed=packed)
        inputs = draw(OP, problem)
        backend, seen = OP.backend("native"), []
        try:
            for threads, config in itertools.product((1, 2, 3), backend.configs(problem)):
                torch.set_num_threads(threads)
                seen.append(inputs.call(backend, config)())
        finally:
            torch.set_num_threads(before)
        for other in seen[1:]:
            assert all(torch.equal(a, b) for a, b in zip(seen[0], other))


def test_native_uses_the_widest_vectors() -> None:
    flags = jit_cpp.cpu_features().split()
    expected = 64 if {"avx512f", "avx512bw", "avx512vl"} <= set(flags) else 32 if {"avx2", "fma"} <= set(flags) else 16
    assert jit_cpp.load(native.SOURCE).vector_bytes() == expected


def test_offsets_beyond_31_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    far = torch.empty(2**31 + 2**30, dtype=BFLOAT16)
    weight = torch.randn(8, 2)
    for shape, strides in (([1, 3, 8], (0, 2**30, 1)), ([3, 2, 8], (2**30, 64, 1))):
        x = far.as_strided(shape, strides)
        x.copy_(torch.randn(shape))
        for reverse in (False, True):
            found = short_conv(x, weight, reverse=reverse, backend="native")
            right = short_conv(
                x.clone(memory_format=torch.contiguous_format), weight, reverse=reverse, backend="native"
            )
            assert all(torch.equal(f, r) for f, r in zip(found, right))


def test_one_graph_for_all_lengths() -> None:
    graphs = 0

    def backend(graph: Any, example: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def function(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return short_conv(x, weight, None, state, activation="silu")

    weight, state = torch.randn(6, 4), torch.randn(2, 3, 6)
    for length in (9, 33, 700):
        x = torch.randn(2, length, 6)
        torch.testing.assert_close(function(x, weight, state), short_conv(x, weight, None, state, activation="silu"))
    assert graphs == 1


def test_generated_code_agrees() -> None:
    """`compiled` through Inductor."""
    backend = OP.backend("compiled")
    for direction, length in itertools.product(("forward", "backward"), (19, 70)):
        sizes = {"B": 2, "T": length, "D": 9, "W": 2}
        problem = pose(OP, direction, sizes, dtype=FLOAT32, device=CPU, activation="silu")
        configs = [config for config in backend.configs(problem) if config["inductor"]]
        if not configs:
            pytest.fail("no C++ compiler: Inductor cannot be checked here")
        inputs = draw(OP, problem)
        wrong = Expected.of(inputs).difference(inputs.call(backend, configs[0])())
        assert wrong is None, wrong
