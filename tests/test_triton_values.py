"""The Triton scan in the interpreter. The tests themselves are in apart/triton_values.py and apart/triton_bytes.py."""

from __future__ import annotations

from tests.triton_interpreter import run


def test_values_and_bytes() -> None:
    assert run("triton_values.py", "tests/apart/triton_bytes.py", interpret=True, share=4) >= 183
