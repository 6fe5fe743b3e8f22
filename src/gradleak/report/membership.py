"""What a record holds of membership, and the ROC curves as pixels."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

WIDTH, HEIGHT, LEFT, TOP = 320, 320, 56, 8  # of the axes, in pixels


class Rate(TypedDict):
    """True positives (`true`, within `low` and `high`) at a rate of false alarms; `resolved`: whether there are fresh samples enough to see
    such a rate; `false_high`: what the false alarms may be at most."""

    false: float
    true: float
    low: float
    high: float
    resolved: bool
    false_high: float


class Score(TypedDict):
    """One score: its area under the curve, true positives at few false alarms, the curve."""

    auc: float
    low: float
    high: float
    rates: Sequence[Rate]
    roc: Sequence[tuple[float, float]]


class Exposed(TypedDict):
    """A member; row: its index in its source; above: so many of the fresh samples have a score as high; p: of the certificate."""

    row: int
    score: float | None
    above: int | None
    p: float | None
    shown: NotRequired[str]


class Certificate(TypedDict):
    """proven: members below the false-alarm rate `level`; alarms: fresh samples below it; expected: false alarms among the members, at most."""

    level: float
    proven: int
    alarms: int
    expected: float


class Apart(TypedDict):
    """How well members and fresh samples are told apart without the model."""

    auc: float
    low: float
    high: float


class Membership(TypedDict):
    """Which of the owner's samples an attacker tells from fresh ones. best: the score that tells most, or ""; level: of the
    intervals, which hold for all scores at once; not_run: {score: reason}."""

    members: int
    fresh: int
    reference: int
    best: str
    level: float
    scores: Mapping[str, Score]
    not_run: Mapping[str, str]
    certificate: Certificate | None
    apart: Apart | None
    exposed: Sequence[Exposed]
    media: Literal["image/png", "text/plain"]
    flags: Sequence[Mapping[str, Any]]
    verdict: Literal["members", "nothing", "unscored", "void"]
    sentence: str


class Line(NamedTuple):
    """One score's curve: "x,y" points."""

    name: str
    points: str
    best: bool


class Roc(NamedTuple):
    """Curves and the chance line in pixels; ticks are (pixel, text), the same on both axes but for the direction."""

    lines: list[Line]
    chance: str
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]


def drawn(found: Membership, safe: Callable[[str | None], str | None]) -> dict[str, Any]:
    """What the template needs; safe: a picture that may stand in a page, or None."""
    is_text = found["media"] != "image/png"
    exposed = [
        {**row, "shown": None if is_text else safe(row.get("shown")), "text": row.get("shown") if is_text else None}
        for row in found["exposed"]
    ]
    order = sorted(found["scores"], key=lambda name: -found["scores"][name]["auc"])
    best = found["best"] if found["best"] in found["scores"] else next(iter(order), "")
    return {**found, "best": best, "exposed": exposed, "order": order, "roc": roc(found)}


def roc(found: Membership) -> Roc | None:
    """Both axes logarithmic, from below one false alarm to 1; None where nothing was scored."""
    if not found["scores"]:
        return None
    least = math.log10(0.5 / max(found["fresh"], 1))

    def x(rate: float) -> float:
        return round(LEFT + WIDTH * (1 - max(math.log10(max(rate, 1e-12)), least) / least), 1)

    def y(rate: float) -> float:
        return round(TOP + HEIGHT * max(math.log10(max(rate, 1e-12)), least) / least, 1)

    lines = [
        Line(name, " ".join(f"{x(f)},{y(t)}" for f, t in score["roc"]), name == found["best"])
        for name, score in found["scores"].items()
    ]
    ticks = [10.0**k for k in range(math.ceil(least), 1)]
    chance = f"{x(0)},{y(0)} {x(1)},{y(1)}"
    return Roc(
        sorted(lines, key=lambda line: line.best),
        chance,
        [(x(t), f"{t:g}") for t in ticks],
        [(y(t), f"{t:g}") for t in ticks],
    )
