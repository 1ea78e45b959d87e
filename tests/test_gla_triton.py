"""The Triton gated linear attention, interpreted and compiled. The tests themselves are in apart/gla_*.py."""

from __future__ import annotations

import pytest

from tests.triton_interpreter import run


def test_values_and_gradients() -> None:
    assert run("gla_values.py", interpret=True, share=6) >= 115


@pytest.mark.long
def test_every_kernel() -> None:
    assert run("gla_compile.py", "-m", "long", interpret=False) >= 900
