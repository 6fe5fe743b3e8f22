"""The numbers of a record as a page writes them. How a metric or a control is called, and what it means, the record says
itself (`metrics`, `controls`): one that it does not describe goes by its name, and nothing is measured against it.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple, TypeVar

from gradleak.report.record import Control, Metric, Numbers, Result
from gradleak.report.words import IDENTIFIED, OUTCOMES, SHOWN, TERMS

T = TypeVar("T")
DASH, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
SIGNS = {"higher": +1, "lower": -1, "unknown": 0}
RANK = "identification_rank"


class ScoreGroup(NamedTuple):
    """The columns of one metric: the attack, each control, the gap. The last row holds the means."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    has_gap: bool


class Glance(NamedTuple):
    """A table of all attacks: heads, and whether what stands beneath is a number; one row per attack; (word, meaning) of its heads."""

    heads: list[tuple[str, bool]]
    rows: list[list[str]]
    has_scores: bool
    terms: list[tuple[str, str]]


@dataclass(frozen=True)
class Legend:
    """How a record says that its metrics and controls are to be written."""

    metrics: Mapping[str, Metric]
    controls: Mapping[str, Control]

    def metric(self, name: str) -> Metric:
        """The metric, or what little can be said of one that the record does not describe."""
        undescribed: Metric = {"label": name, "unit": "", "better": "unknown", "decimals": 4}
        return self.metrics.get(name, undescribed)

    def title(self, name: str) -> str:
        """The metric's label, and its unit."""
        metric = self.metric(name)
        return f"{metric['label']} ({metric['unit']})" if metric["unit"] else metric["label"]

    def label(self, name: str) -> str:
        """Of the truth, the reconstruction, or a control."""
        return SHOWN.get(name) or (self.controls[name]["label"] if name in self.controls else name)

    def is_blind(self, control: str) -> bool:
        """Whether the record says that this control has seen neither observation nor truth."""
        return control in self.controls and self.controls[control]["blind"]

    def series(self, names: Iterable[str]) -> list[str]:
        """Truth and reconstruction first, then the controls as the record describes them, then the others."""
        return ordered(names, [*SHOWN, *self.controls])

    def terms(self, row: Result) -> list[tuple[str, str]]:
        """(word, what it means) of all that stands under this row's samples."""
        scored, controls = self.measured(row), self.series(row["controls"])
        told = [(self.metric(name)["label"], self.metric(name).get("meaning", "")) for name in scored]
        told += [
            (self.label(name), self.controls[name].get("meaning", "")) for name in controls if name in self.controls
        ]
        if "invented" in row.get("shown", {}):
            told.append((SHOWN["invented"], TERMS[SHOWN["invented"]]))
        if any(row.get("proven", [])):
            told.append(("Proven", TERMS["Proven"]))
        if "decoys" in row:
            told.append((f"Identified among {row['decoys'] + 1}", IDENTIFIED))
        return [(word, meaning) for word, meaning in told if meaning]

    def repeats(self, row: Result) -> tuple[list[str], list[list[str]]]:
        """(heads, a row for each seed) of an attack that ran under several; nothing of others."""
        repeats, names = row.get("repeats", []), self.measured(row)
        if not repeats:
            return [], []
        counts = any("recovered" in one for one in repeats)
        names = [name for name in names if name in repeats[0]["scores"]]
        heads = ["Seed", *(["Recovered", "In part or whole"] if counts else []), *map(self.title, names), "Residual"]
        return heads, [
            [
                str(one["seed"]),
                *([str(one.get("recovered", DASH)), str(one.get("partly", DASH))] if counts else []),
                *(self.score(name, one["scores"].get(name)) for name in names),
                number(one["residual"], ".3g"),
            ]
            for one in repeats
        ]

    def measured(self, row: Result) -> list[str]:
        """The metrics of a row, the most important first: that is the one that its `leads` are measured by."""
        return ordered((name for name, values in row["scores"].items() if values), self.metrics)

    def score(self, name: str, value: float | None) -> str:
        """One value of the metric."""
        return number(value, f".{self.metric(name)['decimals']}f")

    def caption(self, name: str, value: float | None) -> str:
        """One value with its label and its unit."""
        metric = self.metric(name)
        return f"{metric['label']} {self.score(name, value)} {metric['unit']}".rstrip()

    def mean(self, name: str, values: Numbers) -> str:
        """The mean of the values that are there, and of how many where some are missing."""
        there = present(values)
        share = "" if len(there) in (0, len(values)) else f" ({len(there)} of {len(values)})"
        return number(mean(there), f".{max(1, self.metric(name)['decimals'])}f") + share

    def reach(self, name: str, row: Result) -> str:
        """The interval of a mean, to stand behind it; nothing where the row has none."""
        if name not in row.get("intervals", {}):
            return ""
        first = self.measured(row)[0]
        form = f".{max(1, self.metric(first if name == 'leads' else name)['decimals'] - 1)}f"
        low, high = (number(end, form) for end in row["intervals"][name])
        return f"\N{NO-BREAK SPACE}[{low}, {high}]"

    def gap(self, name: str, value: float | None, least: int = 0) -> str:
        """A difference, with its sign."""
        return number(value, f"+.{max(least, self.metric(name)['decimals'])}f")

    def gaps(self, name: str, row: Result) -> Numbers:
        """By how much the attack is ahead of the best blind control, per sample: the row's own leads where it has them.

        Empty where that cannot be said. A control without a number may have been the best one: then None.
        """
        sign, own = SIGNS[self.metric(name)["better"]], row["scores"].get(name, [])
        if not sign:
            return []
        if row.get("leads") and self.measured(row)[:1] == [name]:
            return row["leads"]
        blind = [scores[name] for key, scores in row["controls"].items() if self.is_blind(key) and scores.get(name)]
        gaps: list[float | None] = []
        for value, *others in zip_longest(own, *blind) if blind else ():
            known = present([value, *others])
            gaps.append(
                sign * known[0] - max(sign * other for other in known[1:]) if len(known) > len(others) else None
            )
        return gaps

    def best_blind(self, name: str, row: Result) -> float | None:
        """The best blind control of every sample, on average: what the mean gap is measured from."""
        sign = SIGNS[self.metric(name)["better"]]
        pairs = list(zip(row["scores"].get(name, []), self.gaps(name, row), strict=False))
        return whole_mean([v - sign * gap if v is not None and gap is not None else None for v, gap in pairs])

    def group(self, name: str, row: Result) -> ScoreGroup:
        """One metric, per sample and on average, beside the controls that have it."""
        controls = [key for key in self.series(row["controls"]) if row["controls"][key].get(name)]
        columns, gaps = [row["scores"][name], *(row["controls"][key][name] for key in controls)], self.gaps(name, row)
        rows = [
            [self.score(name, at(column, i)) for column in columns] + ([self.gap(name, at(gaps, i))] if gaps else [])
            for i in range(max(map(len, columns)))
        ]
        means = [self.mean(name, column) for column in columns]
        means[0] += self.reach(name, row)
        gap = self.gap(name, whole_mean(gaps), 1) + (self.reach("leads", row) if gaps == row.get("leads") else "")
        rows.append([*means, gap] if gaps else means)
        heads = ["Attack", *map(self.label, controls), *(["Gap"] if gaps else [])]
        return ScoreGroup(self.title(name), heads, rows, bool(gaps))


def glance(ran: Sequence[Result], legend: Legend, level: str) -> Glance:
    """All attacks that ran in one table: what came of each, means, the best blind control, the cost."""
    names = list(dict.fromkeys(name for row in ran for name in legend.measured(row) if name != RANK))
    words: dict[str, list[str]] = {"Outcome": [OUTCOMES.get(o := row.get("outcome", DASH), o) for row in ran]}
    if any("recovered" in row or "proven" in row for row in ran):
        words["Recovered"] = [_recovered(row, level) for row in ran]
    if any("count" in row for row in ran):
        words["Number of samples"] = [_count(row) for row in ran]
    numbers: dict[str, list[str]] = {}
    for name in names:
        numbers[legend.title(name)] = [
            legend.mean(name, row["scores"].get(name, [])) + legend.reach(name, row) for row in ran
        ]
        if name == names[0] and any(legend.gaps(name, row) for row in ran):
            numbers["Best blind control"] = [legend.score(name, legend.best_blind(name, row)) for row in ran]
            numbers["Gap"] = [
                legend.gap(name, whole_mean(legend.gaps(name, row)), 1) + legend.reach("leads", row) for row in ran
            ]
    if any(row["scores"].get(RANK) for row in ran):
        ranks = [row["scores"].get(RANK, []) for row in ran]
        numbers["Identified"] = [f"{sum(r == 1 for r in own)} of {len(own)}" if own else DASH for own in ranks]
    numbers["Residual"] = [number(row["residual"], ".3g") for row in ran]
    numbers["Seconds"] = [number(row["seconds"], ",.2f") for row in ran]
    flags = {"Flags": [_flag_count(row) for row in ran]}
    columns = [(head, kind is numbers, cells) for kind in (words, numbers, flags) for head, cells in kind.items()]
    rows = [list(row) for row in zip(*(cells for _, _, cells in columns), strict=True)]
    terms = [(head, TERMS[head]) for head, _, _ in columns if head in TERMS]
    return Glance([(head, is_number) for head, is_number, _ in columns], rows, bool(names), terms)


def _recovered(row: Result, level: str) -> str:
    recovered, partly = row.get("recovered", []), row.get("partly", [])
    said = []
    if recovered:
        parts = sum(part and not whole for whole, part in zip(recovered, partly, strict=False))
        said = ["void"] if level == "void" else [f"{sum(recovered)} of {len(recovered)}"]
        said += [f"{parts} in part"] if parts and level != "void" else []
    said += [f"{sum(row['proven'])} proven"] if any(row.get("proven", [])) else []
    return ", ".join(said) or DASH


def _count(row: Result) -> str:
    if "count" not in row:
        return DASH
    true = f" (true {row['count']['true']})" if "true" in row["count"] else ""
    return f"{row['count']['recovered']}{true}"


def _flag_count(row: Result) -> str:
    levels = Counter(flag["level"] for flag in row["flags"])
    return ", ".join(f"{levels[level]} {level}" for level in ("error", "warning", "info") if levels[level]) or "none"


def ordered(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The names in the order of `known`, then the unknown ones as they come."""
    names = list(names)
    first = [name for name in known if name in names]
    return first + [name for name in names if name not in first]


def at(values: Sequence[T], index: int) -> T | None:
    """The value, or None where the list has ended."""
    return values[index] if index < len(values) else None


def number(value: float | None, form: str) -> str:
    """A number with a minus sign that is one; a dash where there is none."""
    return DASH if value is None or not math.isfinite(value) else format(value, form).replace("-", MINUS)


def present(values: Iterable[float | None]) -> list[float]:
    """Those that are numbers."""
    return [value for value in values if value is not None and math.isfinite(value)]


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return sum(values) / len(values) if values else None


def whole_mean(values: Numbers) -> float | None:
    """The mean, None where one of them is missing: a mean over the others could be the better one."""
    return mean(present(values)) if len(present(values)) == len(values) else None


def heads(table: Sequence[Mapping[str, Any]]) -> list[tuple[str, bool]]:
    """The columns of a study's table in the order in which they turn up, and whether all they hold is numbers."""
    columns = {key: [row.get(key) for row in table] for row in table for key in row}
    return [(key, all(value is None or type(value) in (int, float) for value in columns[key])) for key in columns]


def beside(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with intervals written beside their means: x, x_low and x_high become x, "0.93 [0.81, 0.99]"."""
    ends = {f"{key}_{end}" for row in table for key in row for end in ("low", "high") if f"{key}_low" in row}
    return [
        {
            key: interval(value, row.get(f"{key}_low"), row.get(f"{key}_high")) if f"{key}_low" in row else value
            for key, value in row.items()
            if key not in ends
        }
        for row in table
    ]


def interval(mean: Any, low: Any, high: Any) -> Any:
    """A mean and its interval in one; the mean alone where there is none."""
    if mean is None or low is None or high is None:
        return mean
    return f"{mean:.4g}\N{NO-BREAK SPACE}[{low:.4g},\N{NO-BREAK SPACE}{high:.4g}]"
