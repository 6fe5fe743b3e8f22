"""A loss curve as pixels: what an SVG needs to draw an attack's objective against the iteration."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from gradleak.report.numbers import MINUS

MOST_POINTS = 400  # of a curve; a trace may have one point per step
LEFT, TOP, WIDTH, HEIGHT = 64, 8, 560, 180  # of a curve's axes, in pixels


class Tick(NamedTuple):
    at: float  # pixels
    text: str


class Curve(NamedTuple):
    """A loss curve in pixels: one string of "x,y" points for each unbroken piece."""

    pieces: list[str]
    across: list[Tick]
    up: list[Tick]
    is_log: bool
    every: int  # only every so many points are drawn


def curve(trace: Sequence[tuple[int, float | None]]) -> Curve | None:
    """The objective against the iteration; the line breaks at a missing value and where a restart begins again.

    None for fewer than two values.
    """
    clean = [(i, v if v is not None and (v == 0 or 1e-300 < abs(v) < 1e300) else None) for i, v in trace]
    values = [v for _, v in clean if v is not None]
    if len(values) < 2:
        return None
    is_log = min(values) > 0
    every = math.ceil(len(clean) / MOST_POINTS)
    left, right = _limits([float(i) for i, _ in clean])
    low, high = _limits([math.log10(v) for v in values], tiny=1e-12, most=1.0) if is_log else _limits(values)

    def x(iteration: float) -> float:
        return LEFT + WIDTH * (iteration - left) / (right - left)

    def y(value: float) -> float:
        return TOP + HEIGHT * (high - (math.log10(value) if is_log else value)) / (high - low)

    pieces: list[list[str]] = [[]]
    before = -math.inf
    for i, v in clean[:-1:every] + clean[-1:]:
        if v is None or i <= before:
            pieces.append([])
        if v is not None:
            pieces[-1].append(f"{x(i):.1f},{y(v):.1f}")
        before = i
    across = [Tick(round(x(i), 1), f"{i:,.0f}") for i in _round_numbers(left, right) if i == round(i)]
    decades = [10.0**e for e in range(math.ceil(low), math.floor(high) + 1)] if is_log else []
    if len(decades) > 1:
        up = [Tick(round(y(v), 1), f"{v:g}") for v in decades[:: math.ceil(len(decades) / 6)]]
    else:
        ends = (10.0**low, 10.0**high) if is_log else (low, high)
        up = [Tick(round(y(v), 1), f"{v:.4g}".replace("-", MINUS)) for v in _round_numbers(*ends)]
    return Curve([" ".join(piece) for piece in pieces if piece], across, up, is_log, every)


def _limits(values: list[float], tiny: float = 0.0, most: float = math.inf) -> tuple[float, float]:
    """The smallest and the largest value, moved apart where they are (nearly) the same, at `most` so far.

    tiny: a difference that is none, whatever the values.
    """
    low, high = min(values), max(values)
    differ = high - low > max(tiny, 1e-12 * max(abs(low), abs(high)))
    room = 0.0 if differ else min(abs(low) / 10, most) if abs(low) > tiny else 1.0
    return low - room, high + room


def _round_numbers(low: float, high: float) -> list[float]:
    """About five multiples of 1, 2 or 5 times a power of ten from low to high."""
    least = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(least))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9))
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
