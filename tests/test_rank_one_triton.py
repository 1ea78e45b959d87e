"""The Triton delta rule and dplr, interpreted and compiled. The tests themselves are in apart/rank_one_*.py."""

from __future__ import annotations

import pytest

from tests.triton_interpreter import run


def test_values_and_gradients() -> None:
    assert run("rank_one_values.py", interpret=True, share=6) >= 134


@pytest.mark.long
def test_every_kernel() -> None:
    assert run("rank_one_compile.py", "-m", "long", interpret=False) >= 600
