"""How well a score tells members from others: the area under the ROC curve, and the true positives at few false alarms."""

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

from gradleak.report.membership import Rate

CURVE = 200  # points of a ROC curve, at most


def auc(members: Tensor, fresh: Tensor) -> float:
    """Share of pairs (member, fresh) in which the member has the larger score, ties counted by half."""
    above = (members[:, None] > fresh).double() + 0.5 * (members[:, None] == fresh).double()
    return float(above.mean())


def auc_interval(area: float, members: int, fresh: int, alpha: float = 0.05) -> tuple[float, float]:
    """The score interval of an area under the curve (Newcombe, Statistics in Medicine 25, 2006, part 2, method 5): all areas A with
    |area - A| <= z sqrt(V(A)). It fails with probability alpha, and has a width where the area is 1."""
    z = NormalDist().inv_cdf(1 - alpha / 2)

    def outside(A: float) -> bool:
        return abs(area - A) > z * math.sqrt(variance(A, members, fresh))

    def end(far: float) -> float:
        near = area
        for _ in range(60):  # bisection, to the last digit
            middle = (near + far) / 2
            near, far = (near, middle) if outside(middle) else (middle, far)
        return near

    return end(0.0), end(1.0)


def variance(A: float, m: int, n: int) -> float:
    """V(A) = A (1 - A) (1 + N (1 - A) / (2 - A) + N A / (1 + A)) / (m n), N = (m + n) / 2 - 1, of an area by m and n samples (Hanley and McNeil
    1982, with Newcombe's N)."""
    N = (m + n) / 2 - 1
    return A * (1 - A) * (1 + N * (1 - A) / (2 - A) + N * A / (1 + A)) / (m * n)


def rate(members: Tensor, fresh: Tensor, false: float, alpha: float = 0.05) -> Rate:
    """True positives at so many false alarms, with Clopper and Pearson's interval. The threshold is the least that no more than this share
    of the fresh samples exceeds; with less than 1 / false of them it is their largest score, which resolves no such rate."""
    from scipy.stats import binomtest

    alarms = int(false * len(fresh) + 1e-9)  # 0.01 * 300 is a little less than 3
    threshold = fresh.sort(descending=True).values[alarms]
    hits = int((members > threshold).sum())
    between = binomtest(hits, len(members)).proportion_ci(1 - alpha)
    seen = int((fresh > threshold).sum())
    most = float(binomtest(seen, len(fresh)).proportion_ci(1 - alpha).high)
    return {
        "false": false,
        "true": hits / len(members),
        "low": float(between.low),
        "high": float(between.high),
        "resolved": alarms > 0,
        "false_high": most,
    }


def roc(members: Tensor, fresh: Tensor) -> Sequence[tuple[float, float]]:
    """(false positives, true positives) as the threshold falls, from (0, .) to (1, 1)."""
    cuts = torch.tensor(sorted(set(fresh.tolist()), reverse=True), dtype=fresh.dtype)
    m, f = members.sort().values, fresh.sort().values
    above = [1 - torch.searchsorted(part, cuts, right=True).double() / len(part) for part in (f, m)]
    points = [*zip(above[0].tolist(), above[1].tolist(), strict=True), (1.0, 1.0)]
    if len(points) <= CURVE:
        return points
    # The left end, where few false alarms are, is kept as it is
    head, tail = points[: CURVE // 2], points[CURVE // 2 :]
    return [*head, *tail[:: -(-len(tail) // (CURVE // 2))], points[-1]]
