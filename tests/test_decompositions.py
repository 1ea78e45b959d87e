"""Exported programs in torch's own operators compute what the mixers do, and know nothing of this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import mixers
from kernels.decompositions import decompositions

BATCH = 3


def given(name: str, length: int, dim: int = 12) -> tuple[mixers.SequenceMixer, Tensor, Any]:
    torch.manual_seed(0)
    mixer = mixers.build(name, dim).eval()
    x = torch.randn(BATCH, 5 + length, dim)
    return mixer, x[:, 5:].contiguous(), mixer(x[:, :5])[1]


def written_out(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    assert any("sequence_mixers" in str(node.target) for node in program.graph.nodes)
    found = program.run_decompositions(decompositions())
    assert not any("sequence_mixers" in str(node.target) for node in found.graph.nodes)
    return found


def close(mixer: mixers.SequenceMixer, found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0])
    for one, two in zip(mixer.comparable(found[1]), mixer.comparable(expected[1])):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", mixers.names())
@torch.no_grad()
def test_a_token_of_any_batch(name: str) -> None:
    mixer, x, state = given(name, 1)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {0: batch}, tree_map(lambda _: {0: batch}, state)
    program = written_out(torch.export.export(mixer, (x, state), dynamic_shapes=shapes)).module()
    close(mixer, program(x, state), mixer(x, state))
    two = x[:2], mixers.state.select(state, torch.tensor([2, 0]))
    close(mixer, program(*two), mixer(*two))


@pytest.mark.parametrize("name", ["hgrn", "gsa", "gated_deltanet", "forgetting_attention"])
@torch.no_grad()
def test_several_tokens_and_a_named_backend(name: str) -> None:
    mixer, x, state = given(name, 4)
    mixer.backend = "native"
    program = written_out(torch.export.export(mixer, (x, state))).module()
    mixer.backend = "naive"
    close(mixer, program(x, state), mixer(x, state))


def test_a_dynamic_length_is_refused() -> None:
    mixer, x, _ = given("mingru", 4)
    program = torch.export.export(mixer, (x,), dynamic_shapes={"x": {1: torch.export.Dim("length", min=2, max=64)}})
    with pytest.raises(ValueError, match="hgru: the length is dynamic"):
        program.run_decompositions(decompositions())


@torch.no_grad()
def test_a_program_is_loaded_without_this_package(tmp_path: Path) -> None:
    mixer, x, state = given("hgrn", 1)
    torch.export.save(written_out(torch.export.export(mixer, (x, state))), tmp_path / "program.pt2")
    torch.save((x, state, mixer(x, state)[0]), tmp_path / "tensors.pt")
    code = """
import sys, torch
x, state, y = torch.load("tensors.pt")
torch.testing.assert_close(torch.export.load("program.pt2").module()(x, state)[0], y)
assert not {"mixers", "kernels"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.long
@pytest.mark.parametrize("name", ["hgrn", "gated_deltanet", "attention"])
@torch.no_grad()
def test_a_compiled_package(name: str, tmp_path: Path) -> None:
    mixer, x, state = given(name, 1)
    program = written_out(torch.export.export(mixer, (x, state)))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "program.pt2"))
    close(mixer, torch._inductor.aoti_load_package(package)(x, state), mixer(x, state))
