"""What mu-Gaussian differential privacy (Dong, Roth and Su 2019, arXiv:1905.02383) says: its epsilon at a delta, and the most that any
attack can have.

A mechanism is mu-GDP if telling two neighbouring data sets apart by what it released is no easier than telling N(0, 1) from N(mu, 1).
One step of the Gaussian mechanism has mu = sensitivity / deviation; steps add up in squares.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

from gradleak.errors import BadInput

LARGEST_MU = 1e3
NORMAL = NormalDist()


def delta_of(mu: float, epsilon: float) -> float:
    """The delta of mu-GDP at this epsilon, of any sign: Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu) (Balle and Wang, ICML 2018,
    arXiv:1805.06530, theorem 8)."""
    from scipy.special import log_ndtr

    if mu == 0:
        return max(0.0, 1 - math.exp(min(epsilon, 0.0)))
    first = float(log_ndtr(mu / 2 - epsilon / mu))
    second = min(epsilon + float(log_ndtr(-mu / 2 - epsilon / mu)), first)  # above it by rounding alone
    return math.exp(first) * -math.expm1(second - first)


def epsilon_of(mu: float, delta: float) -> float:
    """The smallest epsilon >= 0 at which mu-GDP is (epsilon, delta)-DP; exact up to rounding."""
    check_delta(delta)
    if not 0 <= mu <= LARGEST_MU:
        raise BadInput(f"The mu of Gaussian differential privacy lies between 0 and {LARGEST_MU:g}, not at {mu:g}.")
    if delta_of(mu, 0.0) <= delta:
        return 0.0
    # Phi(mu/2 - eps/mu) alone is below delta at this one
    high = mu * (mu / 2 - NORMAL.inv_cdf(delta))
    return bisected(lambda epsilon: delta_of(mu, epsilon) > delta, 0.0, high)


def mu_of(epsilon: float, delta: float) -> float:
    """The largest mu whose mu-GDP is (epsilon, delta)-DP."""
    check_delta(delta)
    if not 0 <= epsilon < math.inf:
        raise BadInput(f"An epsilon is 0 or more, not {epsilon:g}.")
    return bisected(lambda mu: delta_of(mu, epsilon) <= delta, 0.0, LARGEST_MU)


def success_at_most(mu: float, blind: float) -> float:
    """1 - f(blind) = Phi(Phi^-1(blind) + mu): what any attack has at most that succeeds with probability `blind` without the sample."""
    if not 0 < blind < 1:
        return blind
    return NORMAL.cdf(NORMAL.inv_cdf(blind) + mu)


def check_delta(delta: float) -> None:
    """BadInput for what is no delta of approximate differential privacy."""
    if not 0 < delta < 1:
        raise BadInput(f"A delta lies between 0 and 1, both excluded, and not at {delta:g}: 1e-5 is usual.")


def bisected(holds: Callable[[float], bool], low: float, high: float, halvings: int = 60) -> float:
    """The end of the numbers from low on for which it holds, if it holds up to there and no further."""
    for _ in range(halvings):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
