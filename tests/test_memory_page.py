"""docs/memory.md says what the mixers keep."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

import mixers

ROOT = Path(__file__).parents[1]


def test_the_page_has_every_mixer_and_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    memory = importlib.import_module("memory")
    lines = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8").splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines[lines.index(memory.PAGE.splitlines()[-1]) + 1 :]}
    assert set(mixers.names()) <= set(rows)
    assert "\n".join(lines).startswith(memory.PAGE)
    names = ("hgrn", "attention", "gla", "mamba", "deltanet")
    for row in (*map(memory.Row, names), memory.Row("hgrn", {"recompute": True})):
        assert f" {memory.kept(row) / 1024:.2f} |" in rows[str(row)]
