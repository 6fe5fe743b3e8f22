"""Attribution: what training moved, written as a sum of the candidates' gradients. This is our own.

One inner product asks a sample alone, and sees mostly what all samples share. But the change of d numbers has room for all n
candidates at once: with g_i the gradient of candidate i half way from theta_0 to theta_T, summed over its targets, each of which weighs
the same in a batch,

    SGD    theta_0 - theta_T = sum_i c_i g_i               c_i = sum of the rates of the steps that used i            (1)
    Adam   theta_0 - theta_T = sum_i c_i g_i / sqrt(v)     v = running mean of the squared gradients, near            (2)
                                                           the mean of g_i^2 while the model moves little

Least squares gives every c_i: about the same for members, about zero for the others, whether or not their gradients are alike. Nobody
says who is a member. What is unknown of a training (its order, masks of dropout, members that are no candidates) is noise, and c_i has
a deviation, as in any regression. Between (1) and (2) decides which of them explains more.

Samples do not tell equally much: one that the model knew already hardly has a gradient, and c_i in units of its deviation is small whether
or not it is a member. So the score is the log likelihood ratio of the two groups

    members  c_i ~ N(b, s^2 d_i^2)        others  c_i ~ N(0, s^2 d_i^2)         d_i the deviation by (1) or (2)        (3)

which says about nothing of such a sample, and rules out one that would have shown. Expectation maximisation gives b, s and the share of
members (Efron, Statistical Science 23, 2008: the two groups of empirical Bayes).

Differs   influence functions (Koh and Liang, ICML 2017, arXiv:1703.04730; Suri et al., arXiv:2406.11544) weigh one sample's
          gradient by the inverse of the Hessian. This is the same with the Gram matrix of the candidates, themselves included
"""

import torch
from torch import Tensor

from gradleak.attacks.membership.evidence import Evidence
from gradleak.errors import NotObserved

RIDGE = 1e-3  # of the mean squared length of a gradient: duplicates among the candidates share what is theirs
LEAST = 1e-3  # of the mean of sqrt(v): below it, a number has hardly a gradient, and Adam's epsilon and rounding say how it moves
ROUNDS = 100  # of expectation maximisation
FEWEST = 0.02  # share of members, or of others, that is not ruled out


def attribution(seen: Evidence) -> Tensor:
    """(n,) log likelihood ratios, by the law that explains more. NotObserved where there are fewer numbers than candidates."""
    G, change = seen.gradients * seen.targets.to(seen.gradients)[:, None], seen.descent
    n, d = G.shape
    if d < 2 * n:
        raise NotObserved(f"{d} numbers that moved do not tell {n} candidates apart.")
    size = G.square().mean(0).sqrt()
    size = size + LEAST * size.mean()
    laws = [explained(G, change), explained(G / size, change)]
    c, deviation, _ = min(laws, key=lambda law: law[2])
    return two_groups(c, deviation, seen.reference)


def explained(G: Tensor, change: Tensor) -> tuple[Tensor, Tensor, float]:
    """(c (n,), its deviation up to a factor, ||change - sum_i c_i G_i|| / ||change||), by ridge regression on the rows of G (n, d)."""
    K = (G @ G.T).double()
    inverse = torch.linalg.inv(K + RIDGE * K.diagonal().mean() * torch.eye(len(K), dtype=K.dtype))
    c = inverse @ (G @ change).double()
    left = float((change - c.to(G) @ G).norm() / change.norm())
    return c, inverse.diagonal().sqrt(), left


def two_groups(c: Tensor, deviation: Tensor, others: Tensor) -> Tensor:
    """(n,) log likelihood ratio of (3) that a sample is a member; others: rows of some that are none."""
    z, unit = c / deviation, 1 / deviation  # both groups of deviation s: around b / d_i, and around 0
    member = (z > 0).double()
    member[others] = 0
    ratio = z
    for _ in range(ROUNDS):
        b = (member * z * unit).sum() / (member * unit.square()).sum()
        variance = (member * (z - b * unit).square() + (1 - member) * z.square()).mean()
        share = (member.sum() / (len(c) - len(others))).clamp(FEWEST, 1 - FEWEST)
        ratio = b * unit * (z - b * unit / 2) / variance.clamp_min(torch.finfo(z.dtype).tiny)
        member = torch.sigmoid(ratio + torch.logit(share))
        member[others] = 0
    return ratio
