"""Samples of a small batch one by one, as corners of what non-negative features leave (`label_equations.py` solves for all together).

Sees      `Equations`: batch [dW, db] = D^T H = U S V^T, H = K V^T, D = softmax(H [W, b]^T) - Y
Recovers  features and labels of samples with many features that are 0, as ReLUs leave them; and starts for the other samples
Solves    Each row k of K has V k >= 0 and a 1 behind its features: a polytope of batch - 1 dimensions, whose corners Qhull lists. A sample
          with as many zeros as dimensions is a corner. Two conditions tell it from other corners: with d = softmax(k head) - e_y,
              (1 - U U^T) d = 0,    k . S^-1 U^T d = 1,
          and k . S^-1 U^T d' = 0 of any other sample's d'. So each sample that is found takes away a dimension, and the next needs a zero less
Misses    samples with few zeros: of these, corners and mixtures of corners that fit the conditions best, and each other, are starts
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gradleak.attacks.label_equations.equations import Equations

EXACT = 1e-4  # misfit of a corner that is a sample
CLOSE = 1e-3  # of one with two zeros more than it needs, which rounding moves
APART = 2e-2  # how far the conditions between two samples may be off
LARGEST = 10.0  # sum of a sample's features, in units of the mean features' sum
FACETS = 128  # features that bound the polytope: those that come nearest to 0
MIXED, KEPT = 6000, 1000  # corners and mixtures of three that are looked at in a round; those that fit best
SWEEPS = 5  # of Gibbs sampling


@dataclass(frozen=True)
class Samples:
    """K (n, r), labels (n,) and the two sides of the conditions: left = K S^-1 (n, r), right = D U (n, r). misfit (n,) of each alone."""

    K: Tensor
    labels: Tensor
    left: Tensor
    right: Tensor
    misfit: Tensor

    @classmethod
    def of(cls, equations: Equations, targets: Tensor, K: Tensor, labels: Tensor | None = None) -> Self:
        """With these labels, or those that fit best."""
        U, left = equations.U, K / equations.S
        P, turned = (K @ equations.head).softmax(1), left @ U.T
        outside = torch.eye(len(U), dtype=K.dtype) - U @ U.T
        beside = torch.cdist(P @ outside, targets @ outside)  # (n, classes)
        misfit = torch.hypot(beside, (P * turned).sum(1)[:, None] - turned @ targets.T - 1)
        labels = misfit.argmin(1) if labels is None else labels
        return cls(K, labels, left, (P - targets[labels]) @ U, misfit.gather(1, labels[:, None])[:, 0])

    def __getitem__(self, rows: Tensor | slice) -> Self:
        return type(self)(self.K[rows], self.labels[rows], self.left[rows], self.right[rows], self.misfit[rows])

    def clash(self, other: Self) -> Tensor:
        """(n, m): how far the conditions between a sample of these and one of the others are off, squared."""
        return (self.left @ other.right.T).square() + (self.right @ other.left.T).square()


def corners(equations: Equations, known: Samples) -> Tensor | None:
    """K (n, r) of the polytope that the known samples leave; None if nothing is left of it that rounding lets see."""
    from scipy.optimize import linprog
    from scipy.spatial import HalfspaceIntersection, QhullError

    Vt, r = equations.Vt, len(equations.S)
    fixed = torch.cat([Vt[None, :, -1], known.right / equations.S])  # times k: 1, then 0
    if len(fixed) >= r:
        return None
    one = torch.zeros(len(fixed), dtype=Vt.dtype)
    one[0] = 1
    centre, free = torch.linalg.pinv(fixed) @ one, torch.linalg.svd(fixed)[2][len(fixed) :].T  # (r,), (r, dimensions)
    mean = equations.mean @ Vt[:, :-1]
    limits = torch.cat([Vt[:, :-1].T, -Vt[:, :-1].sum(1)[None]])  # (features + 1, r)
    offset = limits @ centre
    offset[-1] += LARGEST * mean.abs().sum()
    limits = limits @ free
    length = limits.norm(dim=1)
    distance = torch.where(
        length > 1e-9 * length.max(), (limits @ (free.T @ equations.mean) + offset) / length, torch.inf
    )
    distance[-1] = -torch.inf  # the bound on the sum stays
    near = distance.argsort()[: min(FACETS, int(distance.isfinite().sum())) + 1]
    near = near[distance[near] < torch.inf]
    A, b = (limits / length[:, None])[near], (offset / length)[near]
    ball = torch.cat([-A, torch.ones(len(A), 1)], 1)  # the largest that fits: its centre is inside
    wanted = [0.0] * A.shape[1] + [-1.0]
    inner = linprog(wanted, A_ub=ball.numpy(), b_ub=b.numpy(), bounds=[(None, None)] * A.shape[1] + [(0, None)])
    if inner.x is None or inner.x[-1] < 1e-9:
        return None
    if A.shape[1] == 1:
        ends = -b / A[:, 0]
        found = torch.stack([ends[A[:, 0] > 0].amax(), ends[A[:, 0] < 0].amin()])[:, None]
    else:
        half_spaces = torch.cat([-A, -b[:, None]], 1)
        try:
            found = torch.from_numpy(HalfspaceIntersection(half_spaces.numpy(), inner.x[:-1]).intersections)
        except QhullError:  # too flat
            return None
    listed: Tensor = centre + found[found.isfinite().all(1)] @ free.T
    return listed


def exact_samples(equations: Equations, targets: Tensor) -> tuple[Samples, Tensor | None]:
    """The samples that are corners, and the last corners (n, r) that were listed."""
    r, classes = len(equations.S), len(targets)
    known = Samples.of(equations, targets, equations.mean.new_zeros(0, r))
    exact = EXACT if r < classes - 1 else 0.0  # else one condition is all there is, and some other corner meets it
    small = 1e-3 * (equations.mean @ equations.Vt[:, :-1]).abs().mean()
    listed = None
    while (more := corners(equations, known)) is not None:
        listed, before = more, len(known.K)
        fits = Samples.of(equations, targets, more)
        zeros = (more @ equations.Vt[:, :-1] < small).sum(1)
        good = (fits.misfit < exact) | ((fits.misfit < CLOSE) & (zeros >= r - 1 - before + 2))
        for i in good.nonzero()[:, 0][fits.misfit[good].argsort()]:
            if len(known.K) < r and bool((known.clash(fits[i[None]]) < APART**2).all()):
                known = Samples.of(equations, targets, torch.cat([known.K, more[i[None]]]))
        if len(known.K) == before:
            break
    return known, listed


def mixtures(equations: Equations, targets: Tensor, listed: Tensor, generator: torch.Generator) -> Samples:
    """Corners and mixtures of three, drawn anew; those that fit best."""
    some = listed[torch.randint(len(listed), (MIXED, 3), generator=generator)]
    shares = -torch.rand(MIXED, 3, 1, generator=generator, dtype=listed.dtype).log()
    shares[: MIXED // 2, 1:] = 0
    found = Samples.of(equations, targets, (some * shares / shares.sum(1, keepdim=True)).sum(1))
    return found[found.misfit.argsort()[:KEPT]]


def sets(pool: Samples, pairs: Tensor, known: Samples, free: int, count: int, generator: torch.Generator) -> Tensor:
    """(count, free): rows of the pool that go together, and with the known; by Gibbs sampling at a falling temperature.

    pairs: pool.clash(pool).
    """
    alone = pool.misfit.square() + known.clash(pool).sum(0)
    chosen = torch.randint(len(pool.K), (count, free), generator=generator)
    for sweep in range(SWEEPS):
        for i in range(free):
            others = pairs[torch.cat([chosen[:, :i], chosen[:, i + 1 :]], 1)].sum(1)  # (count, pool)
            noise = -(-torch.rand(others.shape, generator=generator, dtype=others.dtype).log()).log()
            chosen[:, i] = (noise - (alone + others) / 0.4**sweep).argmax(1)
    return chosen
