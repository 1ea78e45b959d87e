"""One table for all ranks: the measurements of rank 0 take the place of everybody's own.

Ranks that tuned by themselves have timed different noise; they would run different kernels and get different bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from autotune import lookup
from autotune.device import fingerprint
from autotune.record import Record


def agree(group: Any = None, *, device: torch.device | None = None) -> int:
    """Every rank of the group calls this; from then on all look their choices up in rank 0's tables of the device.

    What anybody measures afterwards is saved as always, and counts from the next call on. `autotune.refresh()` goes
    back to the rank's own tables.

    group: a process group, by default the whole world; its rank 0 decides. device: by default the current accelerator,
    else the CPU.

    Returns:
        How many records were agreed on.

    Raises:
        RuntimeError: torch.distributed is not initialised, or the ranks' devices have different fingerprints.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("autotune.agree: torch.distributed is not initialised; call init_process_group first")
    name = fingerprint(device or _current_device())
    names: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(names, name, group=group)
    if len(set(names)) > 1:
        found = ", ".join(f"rank {rank} has {each}" for rank, each in enumerate(names))
        raise RuntimeError(f"autotune.agree: the ranks' devices differ: {found}")
    lines: list[Any] = [None]
    if dist.get_rank(group) == 0:
        lines = [[record.to_line() for record in lookup.user_store(name).read()]]
    dist.broadcast_object_list(lines, group=group, group_src=0)
    lookup.adopt(name, [Record.from_line(line.encode()) for line in lines[0]])
    return len(lines[0])


def _current_device() -> torch.device:
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    return torch.device("cpu")
