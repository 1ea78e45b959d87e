"""Initial values in place: what modules that were built without memory need."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def fill_as_built(module: Any) -> None:
    """Parameters and buffers get the values of a module that is built now with the arguments that the module remembers,
    on their device and in their dtype.

    On "meta" there is nothing to fill. Tensors that are sharded (DTensor) get the first process's values.

    Raises:
        ValueError: the module has other tensors than the one that is built, as where a projection was wrapped.
    """
    here = _tensors(module)
    device = next((tensor.device for tensor in here.values()), torch.device("cpu"))
    if device.type == "meta":
        return
    with torch.no_grad(), torch.device(device):
        there = _tensors(type(module)(**module._config))
        if different := sorted(here.keys() ^ there.keys()):
            name = type(module).__name__
            raise ValueError(f"{name}: cannot reset {', '.join(different)}: not what building a {name} gives")
        for name, tensor in here.items():
            tensor.copy_(_sharded_like(tensor, there[name]))


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    found: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    return found | dict(module.named_buffers(remove_duplicate=False))


def _sharded_like(tensor: Any, whole: Tensor) -> Tensor:
    if not hasattr(tensor, "device_mesh"):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(tensor.dtype), tensor.device_mesh, tensor.placements)
