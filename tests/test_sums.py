"""Sums over rows in C++: every row counts once, and many rows cost few digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kernels import jit_cpp
from kernels.agreement import draw, pose
from kernels.catalogue import OPS
from kernels.short_conv import native

pytestmark = [
    pytest.mark.usefixtures("nan_filled"),
    pytest.mark.skipif(jit_cpp.reason(native.SOURCE) is not None, reason="no compiler"),
]

CPU = torch.device("cpu")
LEVELS = 3
CASCADE = """
#include "{sums}"
extern "C" int few() {{ return Cascade<float, {levels}>::kFew; }}
extern "C" void add_up(const int64_t* fields) {{
    const float* row = reinterpret_cast<const float*>(fields[0]);
    const int64_t rows = fields[1], n = fields[2];
    float* memory = reinterpret_cast<float*>(fields[3]);
    Cascade<float, {levels}> sums(memory, n);
    for (int64_t r = 0; r < rows; ++r, row += n, sums.next())
        for (int64_t i = 0; i < n; ++i) memory[i] += row[i];
    if (sums.total() != memory) memory[0] = 0.0f / 0.0f;
}}
"""


def test_every_row_is_added_once_and_few_digits_are_lost(tmp_path: Path) -> None:
    source, columns = tmp_path / "native.cpp", 48
    source.write_text(CASCADE.format(sums=Path(jit_cpp.__file__).parent / "sums.h", levels=LEVELS))
    library = jit_cpp.load(source)
    add_up, few = library.function("add_up", 4), library._dll.few()
    generator = torch.Generator().manual_seed(0)
    # the highest level gets more than it would hand on
    most = few**LEVELS + few ** (LEVELS - 1) + few + 1
    integers = torch.randint(-8, 9, (most, columns), generator=generator).float()
    numbers = torch.randn(most, columns, generator=generator)
    for rows in (0, 1, few - 1, few, few + 1, few**2 - 1, few**2, few**2 + few, most):
        for added, ulps in ((integers, 0.0), (numbers, 4.0)):
            memory = torch.empty(LEVELS, columns)
            add_up(added.data_ptr(), rows, columns, memory.data_ptr())
            error = (memory[0] - added[:rows].double().sum(0)).square().mean().sqrt()
            # of a sum of unit variances
            assert error <= ulps * 2.0**-24 * rows**0.5


# op, sizes but the channels', the channels' letter, rows, the gradient that sums over these, and the digits that it may
# lose, as multiples of the last one. What hgru sums are gates, whose own errors are 3.3 of it on AVX-512
SUMMED = [
    ("short_conv", {"W": 2}, "D", 2000, "weight", 3),
    ("short_conv", {"W": 2}, "D", 2000, "bias", 3),
    ("gated_norm", {"H": 1}, "V", 2000, "weight", 3),
    ("gated_norm", {"H": 1}, "V", 2000, "bias", 3),
    ("hgru", {}, "D", 600, "lower_bound", 4),
    ("gla", {"H": 1, "V": 3, "J": 1}, "K", 600, "bonus", 3),
    ("selective_scan", {"K": 1}, "D", 600, "D", 3),
]


@pytest.mark.parametrize(("name", "sizes", "channels", "rows", "parameter", "most"), SUMMED)
def test_gradients_of_parameters_lose_few_digits(
    name: str, sizes: dict[str, int], channels: str, rows: int, parameter: str, most: int
) -> None:
    """One row after the other, 600 rows would lose 6, and 2000 rows 12."""
    op, backend = OPS[name], OPS[name].backend("native")
    sizes = {"B": 1, "T": rows, channels: 65, **sizes}
    problem = pose(op, "backward", sizes, dtype=torch.float32, device=CPU, bonus=True)
    inputs = draw(op, problem)
    number = [arg.name for arg in op.inputs].index(parameter)
    found = inputs.call(backend, backend.configs(problem)[0])()[number]
    exact = inputs.to(torch.float64).loop()[number]
    assert found is not None
    assert exact is not None
    error = (found - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error <= most * 2.0**-24
