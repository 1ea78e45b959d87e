"""Sequences with the rows of their initial states in front: a causal convolution of these has no borders to mind."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Extended:
    """The extended rows of x [B, T, D] in the order of time: [B, M, D].

    Not packed: the S = W - 1 rows of the initial state and then the T rows of x, M = S + T. Packed: the same of every
    sequence, one after the other, M = N S + T; `source` [M] is the row of cat(x, states) that each comes from, the
    indices [T], [N, S] and [N, S] say where the rows of x, of the initial and of the final states are among them.
    Nothing here reads cu_seqlens back to the host.
    """

    length: int
    sequences: int
    state_rows: int
    reverse: bool
    source: Tensor | None = None
    input_rows: Tensor | None = None
    initial_rows: Tensor | None = None
    final_rows: Tensor | None = None

    @staticmethod
    def of(x: Tensor, width: int, cu_seqlens: Tensor | None, reverse: bool) -> Extended:
        batch, length, S = x.shape[0], x.shape[1], width - 1
        if cu_seqlens is None:
            return Extended(length, batch, S, reverse)
        cu_seqlens = cu_seqlens.long()
        sequences = cu_seqlens.shape[0] - 1
        starts = cu_seqlens + S * torch.arange(sequences + 1, device=x.device)
        rows = torch.arange(length + sequences * S, device=x.device)
        owner = torch.searchsorted(starts[1:].contiguous(), rows, right=True)
        # time in x, negative in the state
        time = rows - starts[owner] - S
        of_x = (cu_seqlens[1:][owner] - 1 - time) if reverse else (cu_seqlens[:-1][owner] + time)
        inputs = torch.arange(length, device=x.device)
        owner_of_input = torch.searchsorted(cu_seqlens[1:].contiguous(), inputs, right=True)
        time_of_input = inputs - cu_seqlens[owner_of_input]
        if reverse:
            time_of_input = cu_seqlens[1:][owner_of_input] - 1 - inputs
        state = torch.arange(S, device=x.device)
        return Extended(
            length,
            sequences,
            S,
            reverse,
            source=torch.where(time < 0, length + (owner + 1) * S + time, of_x),
            input_rows=starts[owner_of_input] + S + time_of_input,
            initial_rows=starts[:-1, None] + state,
            final_rows=starts[1:, None] - S + state,
        )

    def extend(self, rows: Tensor, states: Tensor | None = None) -> Tensor:
        """[B, M, D] of rows [B, T, D] and states [N, S, D], or zeros in their place."""
        if states is None:
            states = rows.new_zeros(self.sequences, self.state_rows, rows.shape[2])
        if self.source is None:
            return torch.cat([states, rows.flip(1) if self.reverse else rows], 1)
        return torch.cat([rows[0], states.flatten(0, 1)])[self.source][None]

    def outputs(self, z: Tensor) -> Tensor:
        """[B, T, D]: of z [B, M - S, D], whose row i is computed from extended rows i to i + S, those that end in x."""
        if self.input_rows is not None:
            return z[:, self.input_rows - self.state_rows]
        return z.flip(1) if self.reverse else z

    def inputs(self, extended: Tensor) -> Tensor:
        """[B, T, D], a copy: what `extended` [B, M, D] holds in the places of the rows of x."""
        if self.input_rows is not None:
            return extended[:, self.input_rows]
        rows = extended[:, self.state_rows :]
        return rows.flip(1) if self.reverse else _copy(rows)

    def initial(self, extended: Tensor) -> Tensor:
        """[N, S, D], a copy: what it holds in the places of the initial states."""
        rows = self.initial_rows
        return _copy(extended[:, : self.state_rows]) if rows is None else extended[0, rows]

    def final(self, extended: Tensor) -> Tensor:
        """[N, S, D], a copy: what it holds in the last S rows of every sequence."""
        return _copy(extended[:, self.length :]) if self.final_rows is None else extended[0, self.final_rows]

    def at_final(self, states: Tensor) -> Tensor:
        """[B, M, D]: states [N, S, D] in the last S rows of every sequence, zeros elsewhere."""
        if self.final_rows is None:
            return torch.cat([states.new_zeros(self.sequences, self.length, states.shape[2]), states], 1)
        rows = self.length + self.sequences * self.state_rows
        zeros = states.new_zeros(1, rows, states.shape[2])
        return zeros.index_copy(1, self.final_rows.flatten(), states.flatten(0, 1)[None])


def _copy(rows: Tensor) -> Tensor:
    return rows.clone(memory_format=torch.contiguous_format)
