"""The bias of attention that forgets: what log decays add up to between a key and a query.

Sums from the first row on, in float64: what lies between two rows is the difference of two sums, which may be a
thousand times larger. (On MPS, which has no float64, in float32.) A decay of zero, whose logarithm is -inf, is no
part of the sums: a query does not see the keys before the last such row. NaN or inf is NaN, and a row's own: whoever
sees its key has it from there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.transforms import has_values


@dataclass(frozen=True)
class Sums:
    """sums [B, S, H]; last [B, S, H] int64: the last row up to this one where the decay is zero, 0 where none is.

    last is None where there is surely none.
    """

    sums: Tensor
    last: Tensor | None

    @staticmethod
    def of(log_decay: Tensor) -> Sums:
        zero = log_decay.isneginf()
        wide = log_decay if log_decay.device.type == "mps" else log_decay.double()
        # beside its own row, it would reach the sequences that are packed behind
        unknown = ~(log_decay < torch.inf)
        sums = wide.masked_fill(zero | unknown, 0).cumsum(1).masked_fill(unknown, torch.nan)
        if log_decay.device.type == "cpu" and has_values(log_decay) and not zero.any():
            return Sums(sums, None)
        rows = torch.arange(log_decay.shape[1], device=log_decay.device)[:, None]
        return Sums(sums, torch.where(zero, rows, 0).cummax(1).values)

    def at(self, rows: Tensor) -> Sums:
        """Those of other rows [B or 1, T]."""
        batch, _, heads = self.sums.shape
        index = rows[..., None].expand(batch, -1, heads)
        return Sums(self.sums.gather(1, index), None if self.last is None else self.last.gather(1, index))

    def part(self, batch: slice, rows: slice) -> Sums:
        return Sums(self.sums[batch, rows], None if self.last is None else self.last[batch, rows])


def bias(of: Sums, to: Sums, first: int, hidden: float, dtype: torch.dtype) -> Tensor:
    """[B, H, queries, keys]: what lies between keys, the first of them row `first`, and the rows of queries.

    hidden: the value where a decay of zero does.
    """
    # keys side by side, as the kernels want them
    of_queries, to_keys = (x.sums.transpose(1, 2).contiguous() for x in (of, to))
    between = (of_queries[..., None] - to_keys[..., None, :]).to(dtype)
    if of.last is None:
        return between
    keys = torch.arange(first, first + to.sums.shape[1], device=between.device)
    return between.masked_fill(of.last.transpose(1, 2)[..., None] > keys, hidden)
