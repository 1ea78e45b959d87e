"""A recurrence over time as a loop, and its gradient as another: what the naive backends of matrix states share.

    S[t], y[t] = step(S[t-1], *row[t], *parameters)

`step` and the gradient of one step are the op's own; here are the sequences in time, packed or not. Everything is
computed in the state dtype. The gradient's loop keeps the state of every CHUNK-th row and makes the others again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.packing import Packing

CHUNK = 64

# (state, *row, *parameters) -> (state, y)
Step = Callable[..., tuple[Tensor, Tensor]]
# (dstate, dy, state before, *row, *parameters) -> (dstate before, gradients of the row, gradients of the parameters)
StepBackward = Callable[..., tuple[Tensor, Sequence[Tensor | None], Sequence[Tensor | None]]]


class Loop:
    """Rows [B, T, ...] (None where an optional one is missing), initial [N, ...] states, parameters of any shape."""

    def __init__(
        self,
        step: Step,
        rows: Sequence[Tensor | None],
        initial: Tensor,
        packing: Packing,
        parameters: Sequence[Tensor | None] = (),
    ) -> None:
        self.step, self.rows, self.initial, self.packing = step, rows, initial, packing
        self.parameters = [None if p is None else p.to(initial.dtype) for p in parameters]
        self.initial_of, self.first = packing.of_each_row(initial), packing.first_rows()
        self.owners = None
        if packing.owner is not None:
            sequences = torch.arange(packing.sequences, device=initial.device)
            self.owners = (packing.owner[:, None] == sequences).view(-1, packing.sequences, *[1] * (initial.ndim - 1))

    def row(self, t: int) -> list[Tensor | None]:
        return [None if row is None else row[:, t].to(self.initial.dtype) for row in self.rows]

    def enter(self, state: Tensor, t: int) -> Tensor:
        """The state before row t: the initial one where a sequence begins."""
        return state if self.owners is None else torch.where(self.first[t], self.initial_of[:, t], state)

    def forward(self) -> tuple[Tensor, Tensor]:
        """y [B, T, ...] and the final states [N, ...], both in the state dtype."""
        state, final, ys = self.initial_of[:, 0], self.initial, []
        for t in range(self.packing.length):
            state, y = self.step(self.enter(state, t), *self.row(t), *self.parameters)
            ys.append(y)
            if self.owners is not None:
                final = torch.where(self.owners[t], state, final)
        return torch.stack(ys, 1), (state if self.owners is None else final).clone()

    def backward(
        self, step_backward: StepBackward, dy: Tensor, dfinal: Tensor | None
    ) -> tuple[list[Tensor | None], Tensor, list[Tensor | None]]:
        """Gradients of rows, initial states and parameters, in the state dtype."""
        length, dtype = self.packing.length, self.initial.dtype
        dfinal = torch.zeros_like(self.initial) if dfinal is None else dfinal
        dfinal_of, last = self.packing.of_each_row(dfinal), self.packing.last_rows()
        state = self.initial_of[:, 0]
        kept = [state]
        for t in range(length - 1):
            state, _ = self.step(self.enter(state, t), *self.row(t), *self.parameters)
            if t % CHUNK == CHUNK - 1:
                kept.append(state)
        dstate, dinitial = dfinal_of[:, -1], dfinal
        drows: list[Sequence[Tensor | None]] = []
        totals: list[Tensor | None] = [None] * len(self.parameters)
        for start in reversed(range(0, length, CHUNK)):
            before, end = [self.enter(kept[start // CHUNK], start)], min(start + CHUNK, length)
            for t in range(start, end - 1):
                before.append(self.enter(self.step(before[-1], *self.row(t), *self.parameters)[0], t + 1))
            for t in reversed(range(start, end)):
                if self.owners is not None:
                    dstate = torch.where(last[t], dfinal_of[:, t], dstate)
                given = dstate, dy[:, t].to(dtype), before[t - start]
                dstate, drow, dparameters = step_backward(*given, *self.row(t), *self.parameters)
                drows.append(drow)
                totals = [_sum(total, one) for total, one in zip(totals, dparameters)]
                if self.owners is not None:
                    dinitial = torch.where(self.owners[t], dstate, dinitial)
        gradients = [None if row[0] is None else torch.stack(row[::-1], 1) for row in zip(*drows)]
        return gradients, (dstate if self.owners is None else dinitial).clone(), totals


def wanted(
    gradients: Sequence[Tensor | None], like: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients in the dtypes of their inputs; None where they are not needed or there is no input."""
    return tuple(
        g.to(t.dtype) if needed and g is not None and t is not None else None
        for g, t, needed in zip(gradients, like, needs)
    )


def _sum(total: Tensor | None, one: Tensor | None) -> Tensor | None:
    return one if total is None or one is None else total + one


def differentiable(
    forward: Callable[..., tuple[Tensor | None, ...]], outputs: int, *args: Tensor | None, **options: object
) -> tuple[Tensor | None, ...]:
    """An op's backward pass that can itself be differentiated: autograd's through the loop.

    args: the gradients of the outputs, the inputs, cu_seqlens. forward: the naive backend's.
    """
    gradients, inputs, cu_seqlens = args[:outputs], args[outputs:-1], args[-1]
    with torch.enable_grad():
        # views, so that an input that nothing depends on has a place in the graph too
        differs = [t is not None and t.is_floating_point() for t in inputs]
        tensors = [
            t if t is None or not d else t.view_as(t) if t.requires_grad else t.detach().requires_grad_()
            for t, d in zip(inputs, differs)
        ]
        found = forward(*tensors, cu_seqlens, **options)
        pairs = [(out, g) for out, g in zip(found, gradients) if out is not None and g is not None]
        leaves = [t for t in tensors if t is not None and t.is_floating_point()]
        some = torch.autograd.grad(
            [out for out, _ in pairs], leaves, [g for _, g in pairs], create_graph=True, allow_unused=True
        )
    queue = list(some)
    return tuple(queue.pop(0) if d else None for d in differs)
