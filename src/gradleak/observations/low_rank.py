"""Matrices of low rank under the rounding of weights: which rank stands above it, and the factors of what was there before it."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

EDGE = 1.25  # times the largest norm of a row and that of a column, by which noise ends (Bandeira and van Handel 2016, arXiv:1408.6185)
ROUNDINGS = 2.0  # roundings after each other leave the square root of their number
MOST, BESIDE = 128, 32  # the largest rank that is told of large layers, and how many directions beside are looked at
WORK, TURNS = 5e9, 20  # operations of a turn of the weighted fit, at most; turns


@dataclass(frozen=True)
class LowRank:
    """The change of a layer's weight as (out, in): left (out, k) with orthonormal columns times right (k, in), float64.

    noise  deviation of a number of `right`, out of the rounding of the weights
    step   how much larger the last of its singular values is than the next
    """

    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)
    noise: float
    step: float

    @property
    def low(self) -> bool:
        """Whether so low a rank says something."""
        return 2 * len(self.right) <= min(len(self.left), self.right.shape[1])


def apart(after: Tensor, precision: str) -> Tensor:
    """The distance of two neighbouring numbers of the format, there."""
    kind = torch.finfo(getattr(torch, precision))
    return kind.eps * torch.exp2(after.abs().clamp_min(kind.tiny).log2().floor())


def rounding_errors(after: Tensor, change: Tensor, precision: str) -> Tensor:
    """The deviation of each number of a change of weights: what rounding the weights afterwards left, and float32 a sum of products."""
    square = change.square()
    sizes = square.mean(1, keepdim=True) * square.mean(0) / square.mean().clamp_min(1e-300)  # of the terms of a sum
    return torch.hypot(apart(after, precision) / 12**0.5, sizes.sqrt() * torch.finfo(torch.float32).eps)


def low_rank(change: Tensor, errors: Tensor) -> LowRank | None:
    """A change (out, in) as a matrix of the rank that stands above its errors; None where more is left than rounding.

    A layer of few rows or columns has a low rank anyway.
    """
    rows, columns = change.shape
    U, S, V = leading(change, min(rows, columns, MOST + BESIDE))
    once, total = float(errors.square().mean().sqrt()), float(change.square().sum())
    edge = EDGE * float(errors.norm(dim=1).max() + errors.norm(dim=0).max()) / once
    noise, k, before = ROUNDINGS * once, 0, -1
    while k != before:  # less is left of one rounding, and where a base in the same format was rounded to itself
        before, k = k, int((edge * noise < S).sum())
        rest = (max(total - float(S[:k].square().sum()), 0.0) / max((rows - k) * (columns - k), 1)) ** 0.5
        noise = min(noise, rest) if 2 * k <= min(rows, columns) else noise
    if rest > ROUNDINGS * once or (k > MOST and min(rows, columns) > 2 * k):
        return None
    left, right = U[:, :k], S[:k, None] * V[:k]
    if change.numel() * k**2 <= WORK and k:
        left, right, noise = weighted(change, errors, left, right)
    return LowRank(left, right, noise, float(S[k - 1] / S[k]) if 0 < k < len(S) and S[k] > 0 else math.inf)


def leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular values and vectors; of large matrices by random projection and two turns of the power method (Halko et al.
    2011, arXiv:0909.4061, algorithm 4.4)."""
    if min(matrix.shape) <= 4 * count:
        U, S, V = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :count], S[:count], V[:count]
    Q = torch.randn(matrix.shape[1], count, dtype=matrix.dtype, generator=torch.Generator().manual_seed(0)).to(matrix)
    for _ in range(3):
        Q = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ Q)[0])[0]
    U, S, V = torch.linalg.svd(matrix @ Q, full_matrices=False)
    return U, S, V @ Q.T


def weighted(change: Tensor, errors: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, float]:
    """left (out, k), right (k, in), which explain the change best in units of its errors, and the deviation of a number of `right`.

    Small weights are rounded to finer steps than large ones, and so tell more. Alternating least squares, with the momentum of Nesterov
    (1983).
    """
    weight, before, momentum = errors.pow(-2), right, 0.0
    for turn in range(TURNS):
        ahead, before, momentum = right + momentum * (right - before), right, turn / (turn + 3)
        left = solved(change, weight, ahead)[0]
        right = solved(change.T, weight.T, left.T)[0].T
    left = torch.linalg.qr(solved(change, weight, right)[0])[0]
    right, variance = solved(change.T, weight.T, left.T)
    return left, right.T, float(variance.mean().sqrt())


def solved(d: Tensor, weight: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """min over left (rows, k) of sum weight (d - left right)^2, and the variance of its numbers (rows, k)."""
    k = len(right)
    normal = (weight @ (right[:, None] * right).flatten(0, 1).T).view(-1, k, k)
    covariance = torch.linalg.inv(normal)
    return ((weight * d) @ right.T)[:, None].matmul(covariance)[:, 0], covariance.diagonal(dim1=1, dim2=2)
