"""Packed sequences in plain torch: which sequence a row belongs to, and where each begins and ends in time.

Nothing here reads cu_seqlens back to the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.problem import state_dtype


@dataclass(frozen=True)
class Packing:
    """The sequences in rows [B, T, ...]: a batch of B, or N packed one after the other in a batch of one.

    owner [T]: the sequence that each row belongs to; first, last [T]: whether time enters or leaves a sequence there;
    starts, ends [N]: the rows where it does; empty [N]: whether there are none. With reverse, time runs downwards.
    """

    length: int
    sequences: int
    reverse: bool
    device: torch.device
    cu_seqlens: Tensor | None = None
    owner: Tensor | None = None

    @staticmethod
    def of(x: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> Packing:
        length = x.shape[1]
        if cu_seqlens is None:
            return Packing(length, x.shape[0], reverse, x.device)
        rows = torch.arange(length, device=x.device, dtype=cu_seqlens.dtype)
        owner = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
        return Packing(length, cu_seqlens.shape[0] - 1, reverse, x.device, cu_seqlens.long(), owner)

    @property
    def times(self) -> range:
        """The rows in the order of time."""
        return range(self.length)[::-1] if self.reverse else range(self.length)

    def given(self, state: Tensor | None, like: Tensor) -> Tensor:
        """The state [N, ...], or zeros in the state dtype."""
        if state is not None:
            return state
        return like.new_zeros([self.sequences, *like.shape[2:]], dtype=state_dtype(like.dtype))

    def first_rows(self) -> Tensor:
        """[T]: does time enter a sequence at this row?"""
        return self._border(self.reverse)

    def last_rows(self) -> Tensor:
        """[T]: does time leave a sequence at this row?"""
        return self._border(not self.reverse)

    def _border(self, upper: bool) -> Tensor:
        rows = torch.arange(self.length, device=self.device)
        if self.cu_seqlens is None or self.owner is None:
            return rows == (self.length - 1 if upper else 0)
        return rows == (self.cu_seqlens[1:][self.owner] - 1 if upper else self.cu_seqlens[:-1][self.owner])

    @staticmethod
    def spread(rows: Tensor, like: Tensor) -> Tensor:
        """[T] as [1, T, 1, ...], to be used beside `like`."""
        return rows.view([1, -1, *[1] * (like.ndim - 2)])

    def of_each_row(self, state: Tensor) -> Tensor:
        """States [N, ...] as [B or 1, T or 1, ...], each row with the state of its sequence."""
        return state[:, None] if self.owner is None else state[self.owner][None]

    def at_first_rows(self, rows: Tensor) -> Tensor:
        """[N, ...]: what `rows` [B, T, ...] holds where time enters each sequence."""
        return self._at(rows, self.reverse)

    def at_last_rows(self, rows: Tensor) -> Tensor:
        """[N, ...]: what `rows` [B, T, ...] holds where time leaves each sequence."""
        return self._at(rows, not self.reverse)

    def _at(self, rows: Tensor, upper: bool) -> Tensor:
        if self.cu_seqlens is None:
            return rows[:, -1 if upper else 0]
        index = self.cu_seqlens[1:] - 1 if upper else self.cu_seqlens[:-1]
        # an empty sequence has no such row: `unless_empty` replaces what is read here
        return rows[0, index.clamp(0, self.length - 1)]

    def unless_empty(self, state: Tensor, otherwise: Tensor) -> Tensor:
        """`state` [N, ...], or `otherwise` for sequences of length zero."""
        if self.cu_seqlens is None:
            return state
        empty = (self.cu_seqlens[1:] == self.cu_seqlens[:-1]).view([-1, *[1] * (state.ndim - 1)])
        return torch.where(empty, otherwise, state)
