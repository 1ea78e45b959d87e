"""The training text as parallel streams, so that each batch goes on where the one before it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """inputs, targets int64 [B, T], targets one further in the text; `fresh`: no row continues the batch before."""

    inputs: Tensor
    targets: Tensor
    fresh: bool


class Streams:
    """Endless batches of a text: B streams read side by side, T ids at a time, from a new random start every epoch.

    The text is closed to a ring, cut into B equal streams at a random place, and read once; then cut again elsewhere. A
    text shorter than one batch gives shorter rows.

    ids: int64 [length], length > B.
    """

    def __init__(self, ids: Tensor, batch: int, length: int, *, seed: int = 0) -> None:
        self.each = (len(ids) - 1) // batch
        if self.each < 1:
            raise ValueError(f"demo: a text of {len(ids)} characters is too short for {batch} streams")
        self.ids, self.batch, self.length = ids, batch, min(length, self.each)
        self.generator = torch.Generator().manual_seed(seed)
        self.start, self.row = 0, self.each

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        fresh = self.row + self.length > self.each
        if fresh:
            self.start = int(torch.randint(len(self.ids), (1,), generator=self.generator))
            self.row = 0
        streams = self.start + self.row + self.each * torch.arange(self.batch)
        rows = self.ids[(streams[:, None] + torch.arange(self.length + 1)) % len(self.ids)]
        self.row += self.length
        return Batch(rows[:, :-1], rows[:, 1:], fresh)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "start": self.start, "row": self.row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.start, self.row = state["start"], state["row"]
