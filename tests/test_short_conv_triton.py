"""The Triton short convolution, interpreted and compiled. The tests themselves are in apart/short_conv_*.py."""

from __future__ import annotations

import pytest

from tests.triton_interpreter import run


def test_values_and_gradients() -> None:
    assert run("short_conv_values.py", interpret=True, share=4) >= 103


@pytest.mark.long
def test_every_kernel() -> None:
    assert run("short_conv_compile.py", "-m", "long", interpret=False) >= 500
