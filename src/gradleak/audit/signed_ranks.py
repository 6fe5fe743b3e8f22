"""Which Gaussian trade-offs do the guesses of canaries refute that do not change each other's scores? All are guessed, and surer ones
count for more.

Whatever has a trade-off no lower than that of N(0, 1) and N(mu, 1) can be made of an observation of those (Dong, Roth and Su 2019,
arXiv:1905.02383, theorem 2.10). So the auditor knows of the coins no more than y_i ~ N(mu/2, 1) or N(-mu/2, 1), independent, would tell,
by which a guess is right with probability s(mu |y_i|) at most, s the logistic function. The guess that is the k-th surest has a weight
w_1 >= w_2 >= ..., fixed beforehand. Of two guesses the one that is rather right adds more to the sum of the weights of right guesses
where it has the larger weight: exchanged, the sum is stochastically smaller. At most it is therefore

    T(mu) = sum_k w_k 1[y_(k) > 0],    y ~ N(mu/2, 1), ordered by falling |y|                                       (1)

a signed-rank statistic, in place of the scores whatever they are. Weights in proportion to the log odds of a guess tell most (the test
of Neyman and Pearson): those of mu are the |y| in the middle of each part of the order. T is drawn, and mu is refuted where (1 + draws that
reach what was seen) / (1 + draws) is below the level, which is exact over the draws (Barnard 1963).
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

PARTS = 16  # of the order, each with one weight: more of them tell no more
DRAWS = 10_000  # the level of 5 % is met to .2 %
FARTHEST, POINTS = 9.0, 4_001  # of the table of |y|: beyond 9 deviations is no double

Floats = Any  # numpy.ndarray


def ends(m: int) -> list[int]:
    """How many of m guesses stand in the first, the first two, ... parts of the order."""
    parts = min(PARTS, m)
    return [round(m * part / parts) for part in range(1, parts + 1)]


def table(mu: float) -> tuple[Floats, Floats]:
    """(t, P[|y| > t]), the second falling."""
    from scipy.special import ndtr

    t = np.linspace(0, mu / 2 + FARTHEST, POINTS)
    return t, ndtr(mu / 2 - t) + ndtr(-mu / 2 - t)


@lru_cache(maxsize=1_024)
def totals(m: int, mu: float) -> tuple[Floats, Floats]:
    """(the weight of each part, draws of T). Exact also where m is large: drawn are the least |y| of each part, as order statistics are,
    and how many of those above it are right, which is binomial."""
    from scipy.special import expit, ndtr

    generator, last = np.random.default_rng(0), np.array(ends(m))
    sizes, (t, above) = np.diff(last, prepend=0), table(mu)
    weights = np.interp((last - sizes / 2) / m, above[::-1], t[::-1])
    gaps = generator.gamma(np.append(sizes, 1), size=(DRAWS, len(sizes) + 1)).cumsum(1)
    low = np.interp(gaps[:, :-1] / gaps[:, -1:], above[::-1], t[::-1])
    high = np.concatenate([np.full((DRAWS, 1), t[-1]), low[:, :-1]], 1)
    positive, negative = (ndtr(s * mu / 2 - low) - ndtr(s * mu / 2 - high) for s in (1, -1))
    chance = positive / np.maximum(positive + negative, np.finfo(float).tiny)
    right = generator.binomial(sizes - 1, chance) + (generator.random(low.shape) < expit(mu * low))
    return weights, right @ weights


def p_value(m: int, right: Sequence[int], mu: float) -> float:
    """How likely so many right guesses in each part, or others of as much weight, are at most under mu."""
    weights, drawn = totals(m, mu)
    reached = int((drawn >= np.asarray(right) @ weights * (1 - 1e-12)).sum())
    return (1 + reached) / (1 + len(drawn))
