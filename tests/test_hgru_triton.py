"""HGRN's recurrence in Triton, interpreted and compiled. The tests themselves are in apart/hgru_*.py."""

from __future__ import annotations

import pytest

from tests.triton_interpreter import run


def test_values_and_gradients() -> None:
    assert run("hgru_values.py", interpret=True, share=4) >= 89


@pytest.mark.long
def test_every_kernel() -> None:
    assert run("hgru_compile.py", "-m", "long", interpret=False) >= 300
