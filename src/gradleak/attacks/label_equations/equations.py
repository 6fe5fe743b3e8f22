"""The last layer's equations, and least squares for the features of many labels side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

ROUNDING = 2e-7  # of float32, in units of the largest singular value
SURE = 0.0, 0.5, 0.8, 0.95, 0.99, 0.998  # predictions of its label that a sample begins with; 0: the mean features
STARTS = 12  # K side by side: one with each of these for all samples, then others at random
DRAWN, NEGATIVE = 1e-2, 1e-2  # weights of the distance from there, and of negative features


@dataclass(frozen=True)
class Equations:
    """U (classes, r), S (r,), V^T (r, features + 1), and head = V^T [W, b]^T (r, classes); r the batch. mean (r,): K of the mean features.
    nonnegative: whether features are known to be so."""

    U: Tensor
    S: Tensor
    Vt: Tensor
    head: Tensor
    mean: Tensor
    nonnegative: bool

    @classmethod
    def of(cls, dW: Tensor, db: Tensor, W: Tensor, b: Tensor, batch: int, nonnegative: bool) -> Self:
        """In float64; of the gradients of the mean over the batch."""
        U, S, Vt = torch.linalg.svd(batch * torch.cat([dW, db[:, None]], 1), full_matrices=False)
        U, S, Vt = U[:, :batch], S[:batch], Vt[:batch]
        features = torch.cat([db @ dW / db.square().sum(), db.new_ones(1)])  # of all alike
        return cls(U, S, Vt, Vt @ torch.cat([W, b[:, None]], 1).T, Vt @ features, nonnegative)

    def typical(self, sure: float) -> Tensor:
        """(classes, r): the mean features, moved towards each class until it is predicted with this probability."""
        last = self.Vt[:, -1]
        along = (self.head - self.head.mean(1, keepdim=True)).T  # (classes, r)
        along = along - torch.outer(along @ last, last) / last.square().sum()  # the 1 behind the features stays
        low, high = torch.zeros(len(along), 1, dtype=torch.float64), torch.ones(len(along), 1, dtype=torch.float64)
        high = high * 20 / along.square().sum(1, keepdim=True).mean()
        for _ in range(30):
            middle = (low + high) / 2
            reached = ((self.mean + middle * along) @ self.head).softmax(1).diagonal()[:, None] >= sure
            low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
        moved: Tensor = self.mean + low * along
        return moved

    def begin(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """K (n, r, r) for labels (n, r): near what is typical of them, in turns as surely as `SURE` says."""
        typical = torch.stack([self.typical(sure) for sure in SURE])  # (sure, classes, r)
        sure = torch.randint(len(SURE), labels.shape, generator=generator)
        turn = (torch.arange(len(labels)) % STARTS)[:, None].expand_as(sure)
        K = typical[torch.where(turn < len(SURE), turn, sure), labels]
        noise = torch.randn(K.shape, generator=generator, dtype=torch.float64)
        return K + 0.1 * float(self.mean.norm()) / math.sqrt(len(self.S)) * noise

    def solve(
        self,
        targets: Tensor,
        K: Tensor,
        *,
        steps: int,
        power: float = 1.0,
        drawn: float = 0.0,
        towards: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Least squares in K for each of these labels (n, r, classes), from K (n, r, r): the error (n,), and K.

        Residuals are weighed by the singular values to minus this power, and `drawn` weighs the distance from the K to begin with, or from `towards`.
        """
        n, r, _ = K.shape
        middle = K if towards is None else towards
        weights = (self.S.square() + (ROUNDING * self.S[0]) ** 2) ** (-power / 2)
        last, wanted, each = self.Vt[:, -1], self.U * (self.S * weights), torch.arange(r)
        outer = (self.Vt[:, None] * self.Vt[None]).reshape(r * r, -1).T  # (features + 1, r r)
        always = torch.outer(last, last) + drawn * torch.eye(r, dtype=K.dtype)

        def residuals(K: Tensor) -> tuple[Tensor, ...]:
            P = (K @ self.head).softmax(-1)
            D, scaled = P - targets, K * weights
            equations, ones = D.transpose(1, 2) @ scaled - wanted, K @ last - 1
            below = (K @ self.Vt).clamp_max(0) if self.nonnegative else K.new_zeros(n, 1, 1)
            penalty = NEGATIVE * below.square().sum((1, 2)) + drawn * (K - middle).square().sum((1, 2))
            error = equations.square().sum((1, 2)) + ones.square().sum(1) + penalty
            return error, P, D, scaled, equations, ones, below

        damping, now = K.new_full((n,), 1e-2), residuals(K)
        for _ in range(steps):
            _, P, D, scaled, equations, ones, below = now
            slope = P[..., None] * (self.head.T - (P @ self.head.T)[:, :, None])  # (n, r, classes, r): of P by K
            J = slope.transpose(1, 2)[:, :, None] * scaled.transpose(1, 2)[:, None, :, :, None]  # (n, classes, r, r, r)
            J[:, :, each, :, each] += D.transpose(1, 2) * weights[:, None, None, None]
            J = J.reshape(n, -1, r * r)
            gradient = (J.transpose(1, 2) @ equations.reshape(n, -1, 1)).reshape(n, r, r)
            gradient += ones[..., None] * last + drawn * (K - middle)
            normal = J.transpose(1, 2) @ J
            blocks = normal.view(n, r, r, r, r)[:, each, :, each]  # (r, n, r, r): of each sample with itself
            blocks = blocks + always
            if self.nonnegative:
                gradient += NEGATIVE * below @ self.Vt.T
                blocks = blocks + NEGATIVE * ((below < 0).to(K) @ outer).reshape(n, r, r, r).transpose(0, 1)
            normal.view(n, r, r, r, r)[:, each, :, each] = blocks
            normal += torch.diag_embed(damping[:, None] * normal.diagonal(dim1=1, dim2=2) + 1e-12)
            moved = K - torch.linalg.solve(normal, gradient.reshape(n, -1)).reshape(n, r, r)
            new = residuals(moved)
            better = new[0] < now[0]
            K = torch.where(better[:, None, None], moved, K)
            now = tuple(torch.where(better.view(-1, *[1] * (t.ndim - 1)), t, u) for t, u in zip(new, now, strict=True))
            damping = torch.where(better, damping / 5, 4 * damping).clamp(1e-10, 1e8)
        return now[0], K

    def labels(self, K: Tensor) -> Tensor:
        """The labels (n, r) that fit K (n, r, r): D = (U S K^-1)^T, and Y is nearest to what predictions leave of it."""
        D = torch.linalg.solve_ex(K.mT, (self.U * self.S).T.expand(len(K), -1, -1))[0]
        labels: Tensor = ((K @ self.head).softmax(-1) - D).nan_to_num().argmax(-1)
        return labels

    def tried(self, labels: Tensor, targets: Tensor, generator: torch.Generator) -> "Tried":
        """Labels (n, r) from what is typical of them, the best start of each. targets (classes, classes): row k is what class k is trained on."""
        rows = labels.repeat_interleave(STARTS, 0)
        K = first = self.begin(rows, generator)
        for k in range(3):
            K = self.solve(targets[rows], K, steps=8, power=0.5, drawn=DRAWN / 10**k, towards=first)[1]
        error, K = self.solve(targets[rows], K, steps=25)
        return Tried.best([Tried(rows, K, error)], len(labels))

    def features(self, K: Tensor) -> Tensor:
        """What K (r, r) says of each sample: (r, features)."""
        return (K @ self.Vt)[:, :-1]


@dataclass(frozen=True)
class Tried:
    """Labels (n, r), each with its K (n, r, r) and error (n,), in ascending order of the error; no labels twice, in whatever order."""

    labels: Tensor
    K: Tensor
    error: Tensor

    @classmethod
    def best(cls, tried: Sequence[Self], count: int) -> Self:
        """The `count` least errors of all."""
        labels, K, error = (torch.cat([getattr(t, part) for t in tried]) for part in ("labels", "K", "error"))
        first = dict[tuple[int, ...], int]()
        for i in error.argsort().tolist():
            first.setdefault(key(labels[i]), i)
        rows = torch.tensor(list(first.values())[:count])
        return cls(labels[rows], K[rows], error[rows])


def key(labels: Tensor) -> tuple[int, ...]:
    """Labels, in whatever order."""
    return tuple(sorted(labels.tolist()))
