"""Intervals of 95 % of what was counted and measured on a handful of samples."""

import math
from collections.abc import Sequence

LEVEL = 0.95
FEWEST = 3  # values whose mean has an interval: of two it is six times as wide as they are apart, and says nothing


def share(hits: int, trials: int) -> tuple[float, float]:
    """Clopper and Pearson's exact interval (Biometrika 26, 1934) of a share of which `hits` of `trials` were seen."""
    from scipy.special import betaincinv

    tail = (1 - LEVEL) / 2
    low = 0.0 if hits == 0 else float(betaincinv(hits, trials - hits + 1, tail))
    high = 1.0 if hits == trials else float(betaincinv(hits + 1, trials - hits, 1 - tail))
    return low, high


def mean(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's interval of a mean; None below `FEWEST` values."""
    if len(values) < FEWEST:
        return None
    from scipy.special import stdtrit

    middle = math.fsum(values) / len(values)
    spread = math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))
    reach = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * spread
    return middle - reach, middle + reach
