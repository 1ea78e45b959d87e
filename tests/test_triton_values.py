"""The Triton scan in the interpreter. The tests themselves are in apart/triton_values.py."""

from __future__ import annotations

from tests.triton_interpreter import run


def test_values_and_gradients() -> None:
    assert run("triton_values.py", interpret=True, share=2) >= 250
