"""Products of rows with the decay between them, over the rows of a chunk, and their gradients.

    products(x, y)[i, j] = Σ_κ x[i, κ] y[j, κ] exp(Σ g[t, κ] over j < t ≤ i)      for j ≤ i, else 0

`before` stops the sum at i − 1 and has nothing on the diagonal: what row i reads before its own decay. A read of the
state that enters the chunk decays by the rows up to i, a write reaches the state that leaves it by the rows after j.

Logarithms are only ever added, never subtracted: a sum of numbers that are all at most 0 has a small relative error, is
-inf where one of them is, and its exponential is at most 1. The difference of two running sums loses all digits after
a hard decay, and is nan after -inf. Tensors are [G, C, ...]: G chunks of C rows, C a power of two.
"""

from __future__ import annotations

import torch
from torch import Tensor

# with any sum of others at most 0, still a decay of exactly 0; and, other than -inf, 0 times it is 0
NOTHING = {torch.float32: -200.0, torch.float64: -1000.0}


def decays(g: Tensor | None, like: Tensor) -> Undecayed:
    """g [G, C, J]: logarithms of the decays, one a row or one a row and key; None: none."""
    if g is None:
        return Undecayed(like)
    return PerHead(g) if g.shape[-1] == 1 else PerKey(g)


def triangle(like: Tensor, diagonal: int) -> Tensor:
    """[C, C]: 1 on that diagonal and below, else 0."""
    C = like.shape[1]
    return torch.ones(C, C, dtype=like.dtype, device=like.device).tril_(diagonal)


def after(x: Tensor) -> Tensor:
    """[G, C, ...]: the sum of the rows before each row."""
    sums = torch.cumsum(x, 1)
    return torch.cat([torch.zeros_like(sums[:, :1]), sums[:, :-1]], 1)


class Undecayed:
    """Nothing decays: reads, writes and the state are as they are."""

    total: Tensor | None = None

    def __init__(self, like: Tensor) -> None:
        self.like = like

    def read(self, x: Tensor, before: bool = False) -> Tensor:
        return x

    def read_backward(self, dread: Tensor, x: Tensor, before: bool = False) -> Tensor:
        return dread

    def write(self, x: Tensor) -> Tensor:
        return x

    def write_backward(self, dwrite: Tensor, x: Tensor) -> Tensor:
        return dwrite

    def keep_backward(self, dleaving: Tensor, entering: Tensor) -> None:
        """Takes the gradient through total · entering, the states [G, K, V] that the chunks keep."""

    def products(self, x: Tensor, y: Tensor, before: bool = False, diagonal: int = 0) -> Tensor:
        """Without those above that diagonal."""
        return torch.bmm(x, y.transpose(1, 2)).tril_(diagonal)

    def products_backward(
        self, d: Tensor, found: Tensor, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor, before: bool = False,
        diagonal: int = 0,
    ) -> None:  # fmt: skip
        """Adds to dx and dy; d, the gradient of the products found, is overwritten."""
        d = d.tril_(diagonal)
        dx.baddbmm_(d, y)
        dy.baddbmm_(d.transpose(1, 2), x)

    def gradient(self) -> Tensor | None:
        """That of g, from all the backward calls."""
        return None


class PerHead(Undecayed):
    """One decay a row: those between rows are a matrix, the exponential of a product with triangles of ones."""

    total: Tensor

    def __init__(self, g: Tensor) -> None:
        g = g.clamp(min=NOTHING[g.dtype])
        G, C, _ = g.shape
        self.lower, self.below = triangle(g, 0), triangle(g, -1)
        # entry (i, j): the sum of g[t] over j < t ≤ i, which is 0 above the diagonal; exp of -inf there would be slow
        self.between = torch.bmm(self.lower.expand(G, C, C), g * self.below).exp_().mul_(self.lower)
        self.prefix = torch.cumsum(g, 1).exp_()
        self.suffix, self.total = self.between[:, -1, :, None], self.prefix[:, -1:]
        # gradients with respect to the logarithms of these
        self.dprefix, self.dbefore, self.dsuffix = (torch.zeros_like(g) for _ in range(3))
        self.dtotal = torch.zeros_like(g[:, :1])
        self.dbetween: Tensor | None = None

    def _read(self, before: bool) -> Tensor:
        return torch.cat([torch.ones_like(self.total), self.prefix[:, :-1]], 1) if before else self.prefix

    def _between(self, before: bool) -> Tensor:
        return torch.cat([torch.zeros_like(self.between[:, :1]), self.between[:, :-1]], 1) if before else self.between

    def read(self, x: Tensor, before: bool = False) -> Tensor:
        return x * self._read(before)

    def read_backward(self, dread: Tensor, x: Tensor, before: bool = False) -> Tensor:
        dx = dread * self._read(before)
        (self.dbefore if before else self.dprefix).add_((dx * x).sum(-1, keepdim=True))
        return dx

    def write(self, x: Tensor) -> Tensor:
        return x * self.suffix

    def write_backward(self, dwrite: Tensor, x: Tensor) -> Tensor:
        dx = dwrite * self.suffix
        self.dsuffix += (dx * x).sum(-1, keepdim=True)
        return dx

    def keep_backward(self, dleaving: Tensor, entering: Tensor) -> None:
        self.dtotal.addcmul_((dleaving * entering).flatten(1).sum(1)[:, None, None], self.total)

    def products(self, x: Tensor, y: Tensor, before: bool = False, diagonal: int = 0) -> Tensor:
        found = torch.bmm(x, y.transpose(1, 2)).mul_(self._between(before))
        if diagonal:
            found.diagonal(dim1=1, dim2=2).zero_()
        return found

    def products_backward(
        self, d: Tensor, found: Tensor, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor, before: bool = False,
        diagonal: int = 0,
    ) -> None:  # fmt: skip
        along = d * found
        if before:
            along = torch.cat([along[:, 1:], torch.zeros_like(along[:, :1])], 1)
        self.dbetween = along if self.dbetween is None else self.dbetween.add_(along)
        d = d.mul_(self._between(before))
        if diagonal:
            d.diagonal(dim1=1, dim2=2).zero_()
        dx.baddbmm_(d, y)
        dy.baddbmm_(d.transpose(1, 2), x)

    def gradient(self) -> Tensor:
        # g[t] is in the entries (i, j) with j < t ≤ i, in the reads from t on and the writes before t
        reads = self.dprefix + torch.cat([self.dbefore[:, 1:], torch.zeros_like(self.dtotal)], 1)
        if self.dbetween is not None:
            reads = reads + torch.matmul(self.dbetween, self.below.t())
        reads = (reads * self.lower).sum(1)[..., None]
        return reads + after(self.dsuffix) + self.dtotal


class PerKey(Undecayed):
    """One decay a row and key: halves of halves of a chunk, each pair by way of the row between them.

    For blocks of s rows, lower before upper, rows of the upper read by the sum P of their block up to them, rows of
    the lower write by the sum Q of their block after them; so the products of every pair of blocks are one matrix
    product. Twice as large blocks have P and Q by adding the other half's total.
    """

    total: Tensor

    def __init__(self, g: Tensor) -> None:
        self.g, C = g, g.shape[1]
        self.levels: list[tuple[Tensor, Tensor, Tensor]] = []
        P, R, Q, s = g.clone(), torch.zeros_like(g), torch.zeros_like(g), 1
        while s < C:
            (P0, P1), (_, R1), (Q0, _) = (halves(x, s) for x in (P, R, Q))
            self.levels.append((P1.exp(), R1.exp(), Q0.exp()))
            first, second = P0[:, :, -1:].clone(), P1[:, :, -1:].clone()
            P1 += first
            R1 += first
            Q0 += second
            s *= 2
        self.prefix, self.before, self.suffix = P.exp_(), R.exp_(), Q.exp_()
        self.total = self.prefix[:, -1, :, None]
        self.dprefix, self.dbefore, self.dsuffix = (torch.zeros_like(g) for _ in range(3))
        self.dtotal = torch.zeros_like(g[:, 0])
        self.dlevels = [tuple(torch.zeros_like(x) for x in level) for level in self.levels]

    def read(self, x: Tensor, before: bool = False) -> Tensor:
        return x * (self.before if before else self.prefix)

    def read_backward(self, dread: Tensor, x: Tensor, before: bool = False) -> Tensor:
        dx = dread * (self.before if before else self.prefix)
        (self.dbefore if before else self.dprefix).addcmul_(dx, x)
        return dx

    def write(self, x: Tensor) -> Tensor:
        return x * self.suffix

    def write_backward(self, dwrite: Tensor, x: Tensor) -> Tensor:
        dx = dwrite * self.suffix
        self.dsuffix.addcmul_(dx, x)
        return dx

    def keep_backward(self, dleaving: Tensor, entering: Tensor) -> None:
        self.dtotal += (dleaving * entering).sum(-1) * self.total[..., 0]

    def products(self, x: Tensor, y: Tensor, before: bool = False, diagonal: int = 0) -> Tensor:
        G, C, _ = x.shape
        found, s = x.new_zeros(G, C, C), 1
        if not before and diagonal == 0:
            found.diagonal(dim1=1, dim2=2).copy_((x * y).sum(-1))
        for P, R, Q in self.levels:
            upper, lower = halves(x, s)[1] * (R if before else P), halves(y, s)[0] * Q
            corners(found, s).copy_(upper @ lower.transpose(-1, -2))
            s *= 2
        return found

    def products_backward(
        self, d: Tensor, found: Tensor, x: Tensor, y: Tensor, dx: Tensor, dy: Tensor, before: bool = False,
        diagonal: int = 0,
    ) -> None:  # fmt: skip
        s = 1
        if not before and diagonal == 0:
            along = d.diagonal(dim1=1, dim2=2)[..., None]
            dx.addcmul_(along, y)
            dy.addcmul_(along, x)
        for (P, R, Q), (dP, dR, dQ) in zip(self.levels, self.dlevels):
            read, dread = (R, dR) if before else (P, dP)
            x1, y0, corner = halves(x, s)[1], halves(y, s)[0], corners(d, s)
            dx1 = corner @ (y0 * Q) * read
            dy0 = corner.transpose(-1, -2) @ (x1 * read) * Q
            halves(dx, s)[1].add_(dx1)
            halves(dy, s)[0].add_(dy0)
            dread.addcmul_(dx1, x1)
            dQ.addcmul_(dy0, y0)
            s *= 2

    def gradient(self) -> Tensor:
        dP, dR, dQ, s = self.dprefix.clone(), self.dbefore.clone(), self.dsuffix.clone(), self.g.shape[1]
        dP[:, -1] += self.dtotal
        for level in reversed(self.dlevels):
            s //= 2
            (P0, P1), (_, R1), (Q0, _) = (halves(x, s) for x in (dP, dR, dQ))
            P0[:, :, -1] += P1.sum(2) + R1.sum(2)
            P1[:, :, -1] += Q0.sum(2)
            for whole, part in zip((P1, R1, Q0), level):
                whole += part
        return dP


def halves(x: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """[G, C, K] as the lower and the upper blocks [G, C / 2s, s, K] of s rows: views."""
    both = x.view(x.shape[0], -1, 2, s, x.shape[-1])
    return both[:, :, 0], both[:, :, 1]


def corners(x: Tensor, s: int, upper: int = 1, lower: int = 0) -> Tensor:
    """Of [G, C, C] the blocks [G, C / 2s, s, s] where upper rows meet lower columns: a view."""
    n = x.shape[1] // (2 * s)
    blocks = x.view(x.shape[0], n, 2, s, n, 2, s).diagonal(dim1=1, dim2=4)
    return blocks[:, upper, :, lower].permute(0, 3, 1, 2)


def inverse(A: Tensor) -> Tensor:
    """(I − A)⁻¹ of strictly lower A [G, C, C], in its place, from blocks of two rows up.

    [X 0; −B Z]⁻¹ = [X' 0; Z' B X'  Z'], where X' and Z' are the inverses of X and Z.
    """
    A.diagonal(dim1=1, dim2=2).add_(1)
    s = 2
    while s < A.shape[1]:
        corner = corners(A, s)
        corner.copy_(corners(A, s, 1, 1) @ (corner @ corners(A, s, 0, 0)))
        s *= 2
    return A
