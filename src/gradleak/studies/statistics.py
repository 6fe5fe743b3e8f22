"""Intervals of 95 %: the bootstrap's for means, Clopper and Pearson's for shares."""

import math
from collections.abc import Sequence
from typing import Any

from gradleak.audit.intervals import share

RESAMPLES = 2_000


def mean_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The percentile bootstrap's interval of the mean; None below two values. The same values give the same interval."""
    if len(values) < 2:
        return None
    if min(values) == max(values):
        return float(values[0]), float(values[0])
    import numpy as np
    from scipy.stats import bootstrap

    drawn = bootstrap((np.asarray(values, float),), np.mean, n_resamples=RESAMPLES, method="percentile", rng=0)
    return float(drawn.confidence_interval.low), float(drawn.confidence_interval.high)


def summary(name: str, values: Sequence[Any]) -> dict[str, float | None]:
    """{name: mean, name_low, name_high} of one column of samples: shares of true and false, means of numbers."""
    known = [v for v in values if v is not None]
    if not known:
        return {name: None}
    mean = math.fsum(known) / len(known)
    if all(isinstance(v, bool) for v in known):
        low, high = share(sum(known), len(known))
    elif (interval := mean_interval(known)) is None:
        return {name: mean}
    else:
        low, high = interval
    return {name: mean, f"{name}_low": low, f"{name}_high": high}
