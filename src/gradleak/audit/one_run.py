"""How private was a training at most? A lower bound on its epsilon out of one run, from canaries that were included by the flips of a coin.

An auditor who sees what was released guesses of `guesses` of m canaries whether each was included, says nothing of the others, and is
right in `right` cases. Under (epsilon, delta)-DP with respect to adding or removing one canary that is rarely more often than

    right ~ Binomial(guesses, e^eps / (1 + e^eps)), up to delta          (Steinke, Nasr and Jagielski 2023, arXiv:2305.08846, theorem 5.2)

and under f-DP no more often than the recursion of Mahloujifar, Melis and Chaudhuri (2024, arXiv:2410.22235, algorithm 3) allows. Whatever
epsilon would make what was seen less likely than 5 % is refuted: the true one is at least as large, with 95 % confidence. That is no
estimate of epsilon: an auditor who does not find a difference has not shown that there is none.

Three bounds, each sharper than the one before and under more assumptions:

    unconditional  Steinke et al.: nothing is assumed of the training
    gaussian       the recursion, of trainings whose trade-off is that of a Gaussian mechanism, as that of DP-SGD is nearly after many
                   steps (Dong, Roth and Su 2019, arXiv:1905.02383, theorem 3.5)
    independent    Gaussian too, of canaries that do not change each other's scores: all are guessed (`signed_ranks.py`)

The number of guesses has to be fixed before anybody looks; a quarter of the canaries unless it is given.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from gradleak.audit import signed_ranks
from gradleak.audit.gaussian_privacy import NORMAL, bisected, check_delta, epsilon_of
from gradleak.errors import BadInput

LEVEL = 0.05
LARGEST_EPSILON = 100.0
LARGEST_MU = 40.0
HALVINGS = 14  # of that, where each takes draws: mu to .0025, from below
FEWEST = 8  # canaries: if all of five guesses are right, nothing can be refuted at 95 % yet, for 2^-4 > 5 %
Inverse = Callable[[float], float]  # of an event's probability in one world: the least that it has in the other


@dataclass(frozen=True)
class Bound:
    """Epsilon is at least so much at this delta with 95 % confidence, by each of the three forms; mu is that of the Gaussian trade-offs.

    m, guesses, right  of the first two; of the third all m are guessed, and `right_of_all` of them are right
    """

    m: int
    guesses: int
    right: int
    right_of_all: int
    delta: float
    unconditional: float
    gaussian: float
    gaussian_mu: float
    independent: float
    independent_mu: float


def one_run(scores: Sequence[float], included: Sequence[bool], *, delta: float, guesses: int | None = None) -> Bound:
    """The bounds from the score of each canary (higher: rather included) and its coin.

    Raises BadInput for fewer than eight canaries, for scores that are no numbers, and for a number of guesses or a delta that makes no
    sense.
    """
    check_delta(delta)
    m = len(scores)
    if m != len(included) or m < FEWEST:
        raise BadInput(
            f"A bound needs {FEWEST} canaries or more, each with a score and a coin, not {m} and {len(included)}."
        )
    if not all(map(math.isfinite, scores)):
        raise BadInput("The score of a canary is NaN or infinite: nothing can be guessed by it.")
    guesses = max(m // 4, min(m, FEWEST)) if guesses is None else guesses
    if not 1 <= guesses <= m:
        raise BadInput(f"Of {m} canaries 1 to {m} can be guessed, not {guesses}.")
    right, right_of_all = (right_guesses(scores, included, g) for g in (guesses, m))
    mu, mu_of_all = mu_refuted(m, guesses, right), independent_mu_refuted(scores, included)
    return Bound(
        m=m,
        guesses=guesses,
        right=right,
        right_of_all=right_of_all,
        delta=delta,
        unconditional=epsilon_refuted(m, guesses, right, delta),
        gaussian=epsilon_of(mu, delta),
        gaussian_mu=mu,
        independent=epsilon_of(mu_of_all, delta),
        independent_mu=mu_of_all,
    )


def p_value(m: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """How likely so many right guesses are at most under (epsilon, delta)-DP: P[B >= v] + 2 m delta max_i P[v > B >= v - i] / i, with B
    binomial."""
    from scipy.stats import binom

    chance = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(right - 1, guesses, chance))
    probabilities: Any = binom.pmf(range(right - 1, -1, -1), guesses, chance) if right else []
    beyond, most = 0.0, 0.0
    for i, probability in enumerate(probabilities, 1):
        beyond += float(probability)
        most = max(most, beyond / i)
    return min(1.0, tail + 2 * m * delta * most)


def epsilon_refuted(m: int, guesses: int, right: int, delta: float, level: float = LEVEL) -> float:
    """The largest epsilon that is refuted at this level; 0 where none is."""
    return bisected(lambda epsilon: p_value(m, guesses, right, epsilon, delta) < level, 0.0, LARGEST_EPSILON)


def refutes(inverse: Inverse, m: int, guesses: int, right: int, level: float = LEVEL) -> bool:
    """Whether so many right guesses refute that trade-off at this level.

    r and h are the probabilities, as shares of all guesses, that at least i are right, of a right and of a wrong one: in the world where
    the canary's coin fell the other way, what was right is wrong, and the trade-off limits how much less likely that may be.
    """
    r, h = level * right / m, level * (guesses - right) / m
    for i in range(right - 1, -1, -1):
        other = max(h, inverse(r))
        r += i / (guesses - i) * (other - h)
        h = other
        if r + h > guesses / m:
            return True
    return False


def gaussian_inverse(mu: float) -> Inverse:
    """Phi(Phi^-1(p) - mu)."""
    return lambda p: NORMAL.cdf(NORMAL.inv_cdf(p) - mu) if 0 < p < 1 else max(0.0, min(p, 1.0))


@cache
def mu_refuted(m: int, guesses: int, right: int, level: float = LEVEL) -> float:
    """The largest mu of a Gaussian trade-off that is refuted."""
    return bisected(lambda mu: refutes(gaussian_inverse(mu), m, guesses, right, level), 0.0, LARGEST_MU)


def independent_mu_refuted(scores: Sequence[float], included: Sequence[bool], level: float = LEVEL) -> float:
    """The largest mu of a Gaussian trade-off that is refuted, where canaries do not change each other's scores."""
    m = len(scores)
    first = [0, *(right_guesses(scores, included, g) for g in signed_ranks.ends(m))]
    right = [more - less for less, more in pairwise(first)]
    return bisected(lambda mu: signed_ranks.p_value(m, right, mu) < level, 0.0, LARGEST_MU, HALVINGS)


def ranked(scores: Sequence[float], guesses: int) -> tuple[list[int], list[int]]:
    """(guessed as included, guessed as left out): the upper half of the guesses takes the highest scores, the lower half the lowest; of an
    odd number one more is taken for included."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return order[: guesses - guesses // 2], order[len(order) - guesses // 2 :]


def right_guesses(scores: Sequence[float], included: Sequence[bool], guesses: int) -> int:
    """How many of so many guesses are right."""
    top, bottom = ranked(scores, guesses)
    return sum(included[i] for i in top) + sum(not included[i] for i in bottom)
