"""The Triton selective scan, interpreted and compiled. The tests themselves are in apart/selective_scan_*.py."""

from __future__ import annotations

import pytest

from tests.triton_interpreter import run


def test_values_and_gradients() -> None:
    assert run("selective_scan_values.py", interpret=True, share=4) >= 53


@pytest.mark.long
def test_every_kernel() -> None:
    assert run("selective_scan_compile.py", "-m", "long", interpret=False) >= 200
