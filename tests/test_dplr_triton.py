"""The Triton dplr in chunks, interpreted. The tests themselves are in apart/dplr_values.py; those of its loop over
rows, and of what compiles, are beside the delta rule's (test_rank_one_triton.py)."""

from __future__ import annotations

from tests.triton_interpreter import run


def test_values_and_gradients() -> None:
    assert run("dplr_values.py", interpret=True, share=8) >= 30
