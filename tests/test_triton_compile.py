"""The Triton scan compiled for sm_80, sm_90, sm_100 and gfx942. The tests themselves are in apart/triton_compile.py."""

from __future__ import annotations

import pytest

from tests.triton_interpreter import run


def test_representative_kernels() -> None:
    assert run("triton_compile.py", "-m", "not long", interpret=False, share=8) >= 18


@pytest.mark.long
def test_every_kernel() -> None:
    assert run("triton_compile.py", "-m", "long", interpret=False) >= 576
