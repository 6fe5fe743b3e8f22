"""The risk of sharing, in a word for whoever has to decide. It follows from the verdict: what `--fail-on recovered` stops is HIGH, what
`--fail-on partly` stops is MEDIUM at least. "Not found" is no low risk: LOW takes a proof that covers what nobody has tried."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from gradleak.report.gate import whole
from gradleak.report.membership import Membership
from gradleak.report.record import Level, Record, Result

MANY = 0.1  # of the members, told at 1 % false alarms: ten times what guessing finds
LITTLE = 0.05  # the probability of naming the true sample among candidates that a proof may leave to any attack
ORDER = ("HIGH", "MEDIUM", "CANNOT SAY", "LOW")  # the worst of several is told


class Risk(NamedTuple):
    """The label, and why it is this one, as the end of a sentence."""

    label: Literal["HIGH", "MEDIUM", "LOW", "CANNOT SAY"]
    why: str


BY_LEVEL: dict[Level, Risk] = {
    "recovered": Risk("HIGH", "private samples came back whole, or are proven"),
    "partial": Risk("MEDIUM", "parts of the private data came back, and no whole sample"),
    "members": Risk("MEDIUM", "members are told from others better than by chance"),
    "nothing": Risk("CANNOT SAY", "nothing was found, and another attack may find more"),
    "absent": Risk("LOW", "what was shared does not hold the private samples"),
    "unscored": Risk("CANNOT SAY", "nothing was compared with the private data"),
    "void": Risk("CANNOT SAY", "a check failed"),
}
MANY_MEMBERS = Risk("HIGH", f"at least {100 * MANY:.0f} in 100 members are told at 1 % false alarms")
PROVEN_MEMBERS = Risk("HIGH", "members are proven")
BOUNDED = Risk(
    "LOW", f"no attack can name a private sample with a probability above {100 * LITTLE:.0f} %, which is proven"
)


def risk(record: Record) -> Risk | None:
    """Of all observations and of membership; None of a record that audits nothing."""
    names = dict.fromkeys(str(row["observation"].get("name", "")) for row in record["results"])
    found = [risk_of(record, name) for name in names]
    if "membership" in record:
        found.append(of_members(record["membership"]))
    return min(found, key=lambda one: ORDER.index(one.label), default=None)


def risk_of(record: Record, name: str) -> Risk:
    """Of one observation, without membership."""
    levels = {one.get("observation", name): one["level"] for one in record.get("verdicts", [])}
    rows = [row for row in record["results"] if str(row["observation"].get("name", "")) == name]
    return of_attacks(levels.get(name, record["verdict"]["level"]), rows)


def of_attacks(level: Level, rows: Sequence[Result]) -> Risk:
    """Of the attacks on one observation, by their verdict; one whole sample of many is enough for HIGH."""
    if whole(rows, level):
        return BY_LEVEL["recovered"]
    return BOUNDED if level == "nothing" and bounded(rows) else BY_LEVEL[level]


def of_members(found: Membership) -> Risk:
    """Of the members that are told from fresh samples; the lower end of the interval counts."""
    if found["certificate"] is not None and found["certificate"]["proven"]:
        return PROVEN_MEMBERS
    if found["verdict"] == "members":
        best = found["scores"].get(found["best"])
        if best is not None and any(rate["resolved"] and rate["low"] >= MANY for rate in best["rates"][:1]):
            return MANY_MEMBERS
    return BY_LEVEL[found["verdict"]]


def bounded(rows: Sequence[Result]) -> bool:
    """Whether differential privacy leaves any attack next to nothing, and no attack has gone beyond."""
    flags = [flag for row in rows for flag in row["flags"]]
    bounds = [flag["most"] for flag in flags if flag["name"] == "privacy_bound" and "most" in flag]
    return bool(bounds) and max(bounds) <= LITTLE and all(flag["name"] != "above_bound" for flag in flags)
