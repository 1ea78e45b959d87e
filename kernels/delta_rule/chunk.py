"""The delta rule and its generalisation in chunks of rows: matrix products inside a chunk, a loop over chunks.

    u[t] = β[t] (w[t] ± S[t-1]ᵀ a[t]),   S[t] = diag(d[t]) S[t-1] + b[t] u[t]ᵀ (+ k[t] v[t]ᵀ),   y[t] = S[t]ᵀ q[t]

where a[t] reads the state after the decay of its own row, or with `before` before it. The delta rule is a = b = k,
w = v and the minus. With the products of rows inside a chunk (`decays`), A those of a and b below the diagonal and M
those of q and b,

    (I ∓ β A) u = β (w ± ã S₀),   y = q̃ S₀ + M u,   S = c S₀ + b̃ᵀ u

for the state S₀ that enters the chunk, the rows ã, q̃ that read it, the rows b̃ that reach the state that leaves, and
what is left c. docs/derivations/delta_rule.md has the steps, and the gradient's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.delta_rule.decays import decays, inverse


def keep(state: Tensor, total: Tensor | None, out: Tensor) -> Tensor:
    """What is left of a state after a chunk."""
    return out.copy_(state) if total is None else torch.mul(state, total, out=out)


def keep_backward(dentering: Tensor, total: Tensor | None, dleaving: Tensor) -> None:
    """Adds the gradient of what was kept to that of the state which entered."""
    if total is None:
        dentering.add_(dleaving)
    else:
        dentering.addcmul_(dleaving, total)


class Segment:
    """A few chunks of M sequences and heads, one chunk after the other in [G, C, ...], G = n M.

    q, a, b [G, C, K]; w [G, C, V], which is overwritten, or None for zeros; g [G, C, J]; beta [G, C, 1], and with it
    the minus, or None for 1 and the plus; k, v: the second thing that is written, if any, which is then also read.
    """

    def __init__(
        self,
        sequences: int,
        q: Tensor,
        a: Tensor,
        b: Tensor,
        w: Tensor | None,
        g: Tensor | None,
        beta: Tensor | None = None,
        k: Tensor | None = None,
        v: Tensor | None = None,
        before: bool = False,
    ) -> None:
        self.M, self.n, self.before = sequences, len(q) // sequences, before
        self.q, self.a, self.b, self.k, self.v = q, a, b, k, v
        self.decay = decay = decays(g, q)
        self.A = decay.products(a, b, before, -1)
        self.sign = 1 if beta is None else -1
        self.inverse = inverse(self.A.clone() if beta is None else self.A * -beta)
        self.T = self.inverse if beta is None else self.inverse * beta.transpose(1, 2)
        self.reads, self.writes = decay.read(a, before), decay.write(b)
        if k is not None and v is not None:
            self.B, self.second = decay.products(a, k, before, -1), decay.write(k)
            w = torch.bmm(self.B, v)
        assert w is not None
        self.w = w

    def each(self, x: Tensor) -> Sequence[Tensor]:
        """[G, ...] as n times [M, ...]."""
        return x.unflatten(0, (self.n, self.M)).unbind()

    def totals(self) -> Sequence[Tensor | None]:
        return [None] * self.n if self.decay.total is None else self.each(self.decay.total)

    def run(self, state: Tensor) -> Tensor:
        """The state [M, K, V] after the last chunk; what enters each chunk and u are kept."""
        C, K, V = self.q.shape[1], *state.shape[1:]
        states, u = state.new_empty(self.n + 1, *state.shape), state.new_empty(self.n, self.M, C, V)
        states[0] = state
        added = None
        if self.k is not None and self.v is not None:
            added = self.each(torch.bmm(self.second.transpose(1, 2), self.v))
        writes, totals = self.writes.transpose(1, 2), self.totals()
        for i, (w, reads, T, write) in enumerate(zip(*map(self.each, (self.w, self.reads, self.T, writes)))):
            torch.bmm(T, w.baddbmm_(reads, states[i], alpha=self.sign), out=u[i])
            keep(states[i], totals[i], out=states[i + 1])
            if added is not None:
                states[i + 1] += added[i]
            states[i + 1].baddbmm_(write, u[i])
        self.entering, self.u = states[:-1].view(-1, K, V), u.view(-1, C, V)
        return states[-1]

    def outputs(self) -> Tensor:
        """y [G, C, V]"""
        y = torch.bmm(self.decay.read(self.q), self.entering).baddbmm_(self.decay.products(self.q, self.b), self.u)
        if self.k is not None and self.v is not None:
            y.baddbmm_(self.decay.products(self.q, self.k), self.v)
        return y

    def backward(self, dy: Tensor, dstate: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """From the gradients of y and of the leaving state: that of the entering state, and those of all rows."""
        decay, reads_q, u, before = self.decay, self.decay.read(self.q), self.u, self.before
        M = decay.products(self.q, self.b)
        dq = decay.read_backward(torch.bmm(dy, self.entering.transpose(1, 2)), self.q)
        du_inside, dentering = torch.bmm(M.transpose(1, 2), dy), torch.bmm(reads_q.transpose(1, 2), dy)
        # the gradients of the states that leave the chunks, and last that of the one which enters the first
        states, dw = torch.cat([dentering, dstate]).view(self.n + 1, *dstate.shape), torch.empty_like(u)
        steps = zip(*map(self.each, (du_inside, self.reads.transpose(1, 2), self.writes, self.T.transpose(1, 2), dw)))
        totals = self.totals()
        for i, (du, reads, write, T, dw_out) in reversed(list(enumerate(steps))):
            torch.bmm(T, du.baddbmm_(write, states[i + 1]), out=dw_out)
            keep_backward(states[i], totals[i], states[i + 1])
            states[i].baddbmm_(reads, dw_out, alpha=self.sign)
        dleaving = states[1:].view(self.entering.shape)
        decay.keep_backward(dleaving, self.entering)
        db = decay.write_backward(torch.bmm(u, dleaving.transpose(1, 2)), self.b)
        da = decay.read_backward(self._signed(dw, self.entering), self.a, before)
        decay.products_backward(torch.bmm(dy, u.transpose(1, 2)), M, self.q, self.b, dq, db)
        decay.products_backward(self._signed(dw, u), self.A, self.a, self.b, da, db, before, -1)
        gradients: dict[str, Any] = {"q": dq, "a": da, "b": db, "w": dw}
        if self.k is not None and self.v is not None:
            gradients |= self._second_backward(dy, dw, dleaving, dq, da)
        if self.sign < 0:
            # of beta: the product of what it scaled and the gradient of what came of that
            error, dscaled = self.w.baddbmm_(self.A, u, alpha=-1), torch.bmm(self.inverse.transpose(1, 2), du_inside)
            gradients["beta"] = dscaled.mul_(error).sum(-1, keepdim=True)
        return states[0], {**gradients, "g": decay.gradient()}

    def _signed(self, x: Tensor, y: Tensor) -> Tensor:
        """± x yᵀ"""
        return torch.baddbmm(x.new_zeros(1, 1, 1), x, y.transpose(1, 2), beta=0, alpha=self.sign)

    def _second_backward(self, dy: Tensor, dw: Tensor, dleaving: Tensor, dq: Tensor, da: Tensor) -> dict[str, Any]:
        """Gradients of k and v; dq and da get their share."""
        assert self.k is not None
        assert self.v is not None
        decay, q, k, v = self.decay, self.q, self.k, self.v
        N, vT = decay.products(q, k), v.transpose(1, 2)
        dv = torch.bmm(N.transpose(1, 2), dy).baddbmm_(self.second, dleaving)
        dv.baddbmm_(self.B.transpose(1, 2), dw)
        dk = decay.write_backward(torch.bmm(v, dleaving.transpose(1, 2)), k)
        decay.products_backward(torch.bmm(dy, vT), N, q, k, dq, dk)
        decay.products_backward(torch.bmm(dw, vT), self.B, self.a, k, da, dk, self.before, -1)
        return {"k": dk, "v": dv}
