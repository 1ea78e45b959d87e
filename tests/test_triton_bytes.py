"""The bytes that the Triton scan moves. The tests themselves are in apart/triton_bytes.py."""

from __future__ import annotations

from tests.triton_interpreter import run


def test_bytes_moved() -> None:
    assert run("triton_bytes.py", interpret=True) >= 88
