"""What a differentially private training leaves any attack: epsilon at a delta, and the most that an attack can have that succeeds with a
given probability without the sample.

The privacy loss of a step is L = log P(x)/Q(x) for what is released with the sample, P = (1-q) N(0, s^2) + q N(1, s^2), and without it,
Q = N(0, s^2). The loss of all steps is the sum. As in Doroshenko et al. (PoPETs 2022, arXiv:2207.04380, "connect the dots"), each piece of
the loss between two points of a grid is split onto these so that both P and Q keep their masses; that never makes the two easier to tell
apart than they seem here, so that everything below is an upper bound. Sums are by the fast Fourier transform; what lies beyond the grid is
counted as told.

An attack that is right with probability `blind` under Q is right under P with at most 1 - f(blind) = min over eps of e^eps blind + delta(eps)
(the trade-off function by its supporting lines; Dong, Roth and Su 2019, arXiv:1905.02383, proposition 2.12).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from gradleak.audit.gaussian_privacy import epsilon_of, success_at_most
from gradleak.observations.mechanism import Mechanism

POINTS = 2**18  # of the grid
TAIL = 1e-14  # probability of a sum beyond the grid
SPLITS = 4_096  # of an epsilon between a sample that goes and one that comes
LOWEST = -30.0  # losses below that change nothing: e^-30
ORDERS = np.logspace(-3, 2, 60)  # of the moments that say how far the grid reaches
Array = Any


@dataclass(frozen=True)
class Losses:
    """The privacy loss of all steps under P: its values on a grid, their masses, and the mass at infinity."""

    values: Array
    masses: Array
    infinite: float

    def deltas(self) -> Array:
        """delta at each value as epsilon: sum over larger losses of mass (1 - e^(eps - loss))."""
        tail = np.cumsum(self.masses[::-1])[::-1]
        under_q = np.cumsum((self.masses * np.exp(-self.values))[::-1])[::-1]
        found: Array = np.clip(tail - np.exp(np.minimum(self.values, 700)) * under_q, 0, None) + self.infinite
        return found


def epsilon(mechanism: Mechanism, delta: float | None = None, *, replacing: bool = False) -> float:
    """At the mechanism's delta or this one; infinite where no grid reaches it.

    Neighbours differ by one sample that is added or removed, whichever is worse; replacing: by one in the place of another.
    """
    delta = mechanism.delta if delta is None else delta
    if (mu := gaussian(mechanism)) is not None:
        return epsilon_of((1 + replacing) * mu, delta)
    both = composed(mechanism, True), composed(mechanism, False)
    if replacing:
        return replaced(*both, delta)
    found = 0.0
    for losses in both:
        below = (losses.deltas() <= delta) & (losses.values >= 0)
        found = max(found, float(losses.values[below][0]) if below.any() else math.inf)
    return found


def replaced(added: Losses, removed: Losses, delta: float) -> float:
    """Epsilon where one sample stands in the place of another: it is removed, then the other is added.

    P(S) <= e^a Q(S) + delta_1(a) and Q(S) <= e^b P'(S) + delta_2(b) make P(S) <= e^(a + b) P'(S) + delta_1(a) + e^a delta_2(b): the least
    a + b for which that is delta, a sum of trade-off functions as for groups (Dong, Roth and Su 2019, theorem 2.14).
    """
    first = np.linspace(0, min(float(added.values[-1]), 700.0), SPLITS)
    room = (delta - np.interp(first, added.values, added.deltas())) * np.exp(-first)
    second = np.interp(room, removed.deltas()[::-1], removed.values[::-1], left=math.inf)
    return max(0.0, float((first + second).min()))


def most(mechanism: Mechanism, blind: float, *, replacing: bool = False) -> float:
    """What any attack has at most that is right with probability `blind` where the sample was not used; replacing: where another was used in
    its place."""
    if (mu := gaussian(mechanism)) is not None:
        return success_at_most((1 + replacing) * mu, blind)
    for adding in (False, True) if replacing else (True,):
        losses = composed(mechanism, adding)
        blind = min(1.0, float((np.exp(np.minimum(losses.values, 700)) * blind + losses.deltas()).min()))
    return blind


def gaussian(mechanism: Mechanism) -> float | None:
    """mu, where every step has the sample: sqrt(steps) / noise multiplier. None where it is drawn."""
    if mechanism.sample_rate < 1 and mechanism.certain < mechanism.steps:
        return None
    return math.sqrt(mechanism.steps) / mechanism.noise_multiplier


def most_of_epsilon(epsilon: float, delta: float, blind: float) -> float:
    """The same from epsilon and delta alone: min(1, e^eps blind + delta, 1 - e^-eps (1 - blind - delta))."""
    return min(1.0, math.exp(min(epsilon, 700)) * blind + delta, 1 - math.exp(-epsilon) * (1 - blind - delta))


@cache
def composed(mechanism: Mechanism, adding: bool) -> Losses:
    """The losses of all steps; adding: of P against Q, else of Q against P."""
    s, drawn = mechanism.noise_multiplier, mechanism.steps - mechanism.certain
    steps = [(q, n) for q, n in ((mechanism.sample_rate, drawn), (1.0, mechanism.certain)) if n]
    low, high = reach(s, steps, adding)
    width = (high - low) / (POINTS - 1)
    spectrum, infinite = np.ones(POINTS // 2 + 1, dtype=complex), 0.0
    for q, n in steps:
        masses, beyond, first = one_step(s, q, width, adding)
        spectrum = spectrum * np.fft.rfft(wrapped(masses, first)) ** n
        infinite = 1 - (1 - infinite) * math.exp(n * math.log1p(-beyond))
    start = round(low / width)
    masses = np.clip(np.roll(np.fft.irfft(spectrum, POINTS), -(start % POINTS)), 0, None)
    values = (start + np.arange(POINTS)) * width
    kept = values >= LOWEST
    masses[np.argmax(kept)] += masses[~kept].sum()
    return Losses(values[kept], masses[kept], min(1.0, infinite + 2 * TAIL))


def wrapped(masses: Array, first: int) -> Array:
    """Masses at the places first, first + 1, ... of a circle of POINTS."""
    circle = np.zeros(POINTS)
    np.add.at(circle, (first + np.arange(len(masses))) % POINTS, masses)
    return circle


def one_step(s: float, q: float, width: float, adding: bool) -> tuple[Array, float, int]:
    """(masses on the grid, mass beyond it, number of the first grid point) of one step's loss under P (adding) or Q."""
    from scipy.special import ndtr

    far = 9.0 * s  # 1e-18 beyond
    ends = sorted(loss(np.array([-far, 1 + far]), s, q) * (1 if adding else -1))
    first, last = math.floor(ends[0] / width), math.ceil(ends[1] / width)
    grid = np.arange(first, last + 1) * width
    sign = 1 if adding else -1
    x = sign * place(sign * grid, s, q)
    # How much lies above each point, under what the loss is measured by and under the other.
    without = ndtr(-x / s)
    with_sample = (1 - q) * without + q * ndtr(-(x - sign) / s)
    numerator, other = (with_sample, without) if adding else (without, with_sample)
    a, b = (np.clip(-np.diff(above), 0, None) for above in (numerator, other))
    upper = np.clip((a - b * np.exp(np.minimum(grid[:-1], 700))) / -math.expm1(-width), 0, a)
    masses = np.zeros(len(grid))
    masses[1:] += upper
    masses[:-1] += a - upper
    masses[0] += 1 - numerator[0]
    return masses, float(numerator[-1]), first


def loss(x: Array, s: float, q: float) -> Array:
    """log P(x)/Q(x) = log(1 - q + q e^((2x - 1) / 2s^2)), rising in x."""
    found: Array = np.logaddexp(math.log1p(-q) if q < 1 else -math.inf, math.log(q) + (2 * x - 1) / (2 * s * s))
    return found


def place(values: Array, s: float, q: float) -> Array:
    """The x of a loss; -infinite below log(1 - q), which no x has."""
    if q == 1:
        found: Array = values * s * s + 0.5
        return found
    with np.errstate(invalid="ignore", divide="ignore"):
        log = np.where(values > 700, values, np.log(np.expm1(np.minimum(values, 700)) + q))
    return np.where(np.isnan(log), -math.inf, s * s * (log - math.log(q)) + 0.5)


def reach(s: float, steps: list[tuple[float, int]], adding: bool) -> tuple[float, float]:
    """From where to where the sum of the losses lies but for TAIL on either side, by Chernoff's inequality."""
    far = 12.0 * s + 1 + ORDERS[-1]  # a moment of order k looks k further
    x = np.linspace(-far, far, 40_001)
    log_q = -x * x / (2 * s * s)

    def moments(sign: int) -> Callable[[float], float]:
        def total(order: float) -> float:
            found = 0.0
            for q, n in steps:
                values = loss(x, s, q)
                weight = log_q + (values if adding else 0)
                weight = weight - np.logaddexp.reduce(weight)
                found += n * float(np.logaddexp.reduce(weight + sign * order * (values if adding else -values)))
            return found

        return total

    up, down = moments(1), moments(-1)
    high = min((up(order) - math.log(TAIL)) / order for order in ORDERS)
    low = -min((down(order) - math.log(TAIL)) / order for order in ORDERS)
    return low - 1e-3, high + 1e-3
