"""Triton kernels compiled for sm_80, sm_90, sm_100 and gfx942. The tests themselves are in apart/*_compile.py."""

from __future__ import annotations

import pytest

from tests.triton_interpreter import run

# in two processes, of about the same length
HALVES = {
    "vectors": (["triton", "hgru", "short_conv", "gated_norm"], 46),
    "matrices": (["gla", "rank_one", "selective_scan"], 41),
}


@pytest.mark.parametrize("half", HALVES)
def test_representative_kernels(half: str) -> None:
    (first, *others), kernels = HALVES[half]
    scripts = [f"tests/apart/{name}_compile.py" for name in others]
    assert run(f"{first}_compile.py", *scripts, "-m", "not long", interpret=False, share=8) >= kernels


@pytest.mark.long
def test_every_kernel() -> None:
    assert run("triton_compile.py", "-m", "long", interpret=False) >= 1152
