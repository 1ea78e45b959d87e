"""One training step under DDP and under FSDP2, on the latter from no memory on: two processes on gloo agree with one on
the whole batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import mixers


def _model() -> nn.Module:
    torch.manual_seed(0)
    return mixers.Stack(8, ["hgrn", "mingru", "hgrn"])


def _batch() -> torch.Tensor:
    return torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(1))


def _step(model: nn.Module, x: torch.Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x)[0].square().mean().backward()
    optimizer.step()


def _rank(rank: int, port: int, kind: str, path: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    with torch.device("cpu" if kind == "ddp" else "meta"):
        model = _model()
    x = _batch()[2 * rank : 2 * rank + 2]
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
        _step(wrapped, x)
        full = model.state_dict()
    else:
        from torch.distributed.fsdp import fully_shard
        from torch.distributed.tensor import init_device_mesh

        mesh = init_device_mesh("cpu", (2,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        torch.manual_seed(0)
        model.reset_parameters()
        _step(model, x)
        full = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    if rank == 0:
        torch.save(full, path)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_one_step_of_two_processes_is_one_step_of_one(kind: str, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = tmp_path / "state.pt"
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(port), kind, str(path)], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors
    model = _model()
    _step(model, _batch())
    found = torch.load(path, weights_only=True)
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6, msg=name)


if __name__ == "__main__":
    _rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
