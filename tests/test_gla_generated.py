"""Gated linear attention whose states between chunks are a scan in generated code: one graph for all lengths."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from kernels import inductor
from kernels.agreement import Expected, draw, pose
from kernels.gla import OP
from kernels.gla import compiled as backend

CONFIG = {"chunk": 2, "rows": 0, "inductor": 1}


def test_it_is_a_candidate_where_all_chunks_are_worked_on_at_once() -> None:
    sizes = {"B": 1, "T": 99, "H": 1, "K": 4, "V": 4, "J": 4}
    problem = pose(OP, "forward", sizes, dtype=torch.float32, device=torch.device("cuda"))
    configs = backend.configs(problem)
    assert not configs[0].get("inductor")
    assert {config["rows"] for config in configs if config.get("inductor")} == {0}


@pytest.mark.long
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_lengths_share_a_graph(direction: str) -> None:
    if inductor.reason("cpu"):
        pytest.fail("no C++ compiler: Inductor cannot be checked here")
    graphs = []
    for length in (45, 70, 99, 301):
        sizes = {"B": 2, "T": length, "H": 2, "K": 5, "V": 3, "J": 5}
        problem = pose(OP, direction, sizes, dtype=torch.float32, device=torch.device("cpu"), initial_state=True)
        inputs = draw(OP, problem)
        wrong = Expected.of(inputs).difference(inputs.call(OP.backend("compiled"), CONFIG)())
        assert wrong is None, wrong
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0
    assert graphs[-1] == graphs[1], graphs
