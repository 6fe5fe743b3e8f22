"""The report: one HTML page, a pure function of the record.

The page is one file without scripts or outside resources, and its content security policy forbids both. Every string
of the record is untrusted (a recovered text may be a web page): Jinja2 escapes all of them. A picture that is not an
embedded PNG is left out, and a note stands in its place, so that one bad picture does not cost the reader the rest.

It knows no kind of data and no kind of release. A record may hold several observations: each has a part of its own, with its
verdict, its threat model and its attacks.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import count
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from gradleak.report.curve import curve
from gradleak.report.membership import drawn
from gradleak.report.numbers import DASH, RANK, Legend, at, beside, glance, heads, number, present
from gradleak.report.record import Record, Result, Verdict
from gradleak.report.redaction import is_private
from gradleak.report.risk import risk, risk_of
from gradleak.report.samples import Sample, labels, safe, sample
from gradleak.report.words import CHANGING, EVIDENCE, LEVELS, MEMBER_TERMS, OUTCOMES, SHOWN, WHAT_TO_DO, WITH_MEMBERS

MOST_SAMPLES, FEW = 8, 2  # that are seen at the top without a click; that are shown large
NOT_RUN = re.compile("Not (run|tried): ")


def render(record: Record) -> str:
    """The report as one self-contained HTML page. The same record gives the same page, and is not changed.

    Numbers that are null (or not finite, in a record that was never written) are shown as an en dash.
    """
    names, numbers = _names(record), count(1)
    page = _template().render(
        record=record,
        levels=LEVELS,
        risk=risk(record),
        parts=[_part(record, name, len(names) > 1, numbers) for name in names],
        table=beside(record.get("table", [])),
        advice=WHAT_TO_DO | (WITH_MEMBERS if "membership" in record else {}),
        arguments=_given(record),
        is_private=is_private(record),
        costs=record.get("costs", []),
        has_intervals=any(key.endswith("_low") for row in record.get("table", []) for key in row),
        member_terms=list(MEMBER_TERMS.items()),
        membership=None if (found := record.get("membership")) is None else drawn(found, safe),
        plots=[
            (plot["title"], safe(plot["image"]), plot.get("words", plot["title"])) for plot in record.get("plots", [])
        ],
    )
    return page.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate in a recovered text cannot be saved


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"plain": plain, "describe": describe}
    environment.filters |= {"heads": heads, "percent": percent}
    return environment.from_string(resources.files(__package__).joinpath("report.html.jinja").read_text("utf-8"))


def plain(value: Any) -> str:
    """Any JSON value as a reader expects it: nested ones as JSON, missing numbers as an en dash."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return DASH
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str | int):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def percent(share: float) -> str:
    """A share in per cent."""
    return f"{100 * share:.3g} %"


def describe(value: Mapping[str, Any] | None) -> str:
    """A choice that travels as data: {"kind": "Prune", "share": 0.9} becomes "Prune (share 0.9)"."""
    if not value:
        return "none"
    rest = ", ".join(f"{key} {plain(entry)}" for key, entry in value.items() if key != "kind")
    kind = plain(value.get("kind", ""))
    return f"{kind} ({rest})" if kind and rest else kind or rest


def _given(record: Record) -> dict[str, Any]:
    """The arguments that were given: what is null or off was not."""
    arguments = dict(record["command"]["arguments"], seed=record["seed"])
    return {
        name: value
        for name, value in arguments.items()
        if value is not None and value is not False and value not in ([], ())
    }


def _names(record: Record) -> list[str]:
    """The observations, in the order of their results; one without a name where there are none."""
    names = [str(row["observation"].get("name", "")) for row in record["results"]]
    names += [entry["observation"] for entry in record.get("verdicts", []) if "observation" in entry]
    names += [fact["observation"] for fact in record["threat_model"] if "observation" in fact]
    return list(dict.fromkeys(names)) or [""]


def _part(record: Record, name: str, is_one_of_several: bool, numbers: Iterator[int]) -> dict[str, Any]:
    """What the template needs to draw one observation. A fact of the threat model that names none is about all of them."""
    verdict: Verdict | None = record["verdict"]
    if is_one_of_several:
        verdict = next((entry for entry in record.get("verdicts", []) if entry.get("observation") == name), None)
    level = "unscored" if verdict is None else verdict["level"]
    legend = Legend(record.get("metrics", {}), record.get("controls", {}))
    rows = [row for row in record["results"] if str(row["observation"].get("name", "")) == name]
    ran = [row for row in rows if _did_run(row)]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if not _did_run(row):
            reasons.setdefault(NOT_RUN.sub("", row["status"], count=1), []).append(row["attack"])
    best = _strongest(ran, legend, level)
    sections = [_section(row, next(numbers), legend, level) for row in ran]
    about = {
        key: value
        for key, value in (rows[0]["observation"] if rows else {}).items()
        if key != "name" and isinstance(value, str | int | float)
    }
    return {
        "name": name,
        "verdict": verdict,
        "risk": risk_of(record, name) if rows else None,
        "is_void": level == "void",
        "about": describe(about) if about else "",
        "threat_model": [row for row in record["threat_model"] if row.get("observation", name) == name],
        "sections": sections,
        "evidence": None if best is None else _evidence(sections[best], level, legend),
        "glance": glance(ran, legend, level) if ran else None,
        "not_run": [(", ".join(names), reason) for reason, names in reasons.items()],
        "not_run_count": len(rows) - len(ran),
        "untried": [
            name
            for name in ([] if verdict is None else verdict.get("untried", []))
            if name not in {row["attack"] for row in rows}
        ],
        "remedies": [] if level not in CHANGING else record.get("remedies", {}).get(name, []),
        "has_intervals": any(row.get("intervals") for row in ran),
        "empty": "membership" not in record,
        "flags": [] if ran else list({flag["name"]: flag for row in rows for flag in row["flags"]}.values()),
    }


def _did_run(row: Result) -> bool:
    return row.get("ran", not NOT_RUN.match(row["status"]))


def _strongest(ran: Sequence[Result], legend: Legend, level: str) -> int | None:
    """Which attack is to be seen first: the one that the verdict speaks of. What is void is no evidence, unless proven."""

    def worth(k: int) -> tuple[float, ...]:
        row = ran[k]
        metric = next(iter(legend.measured(row)), "")
        lead = sum(present(legend.gaps(metric, row)))
        residual = math.inf if row["residual"] is None else row["residual"]
        proven, compared = sum(row.get("proven", [])), bool(row["scores"])
        scored = (compared, sum(row.get("recovered", [])), sum(row.get("partly", [])), lead)
        return (proven, *scored) if level == "void" else (*scored, proven, -residual)

    seen = [k for k, row in enumerate(ran) if row.get("shown", {}).get("reconstruction")]
    seen = [k for k in seen if any(ran[k].get("proven", []))] if level == "void" else seen
    return max(seen, key=worth, default=None)


def _evidence(section: dict[str, Any], level: str, legend: Legend) -> dict[str, Any]:
    """The best attack's samples, of many of them the best first; its own part of the page then leaves them out."""
    row, samples = section["result"], section["samples"]
    section["is_evidence"] = True
    leads = legend.gaps(next(iter(legend.measured(row)), ""), row)

    def worth(sample: Sample) -> tuple[float, ...]:
        said = [at(row.get(key, []), sample.number - 1) or False for key in ("proven", "recovered", "partly")]
        return (*said, at(leads, sample.number - 1) or 0.0)

    best = samples if len(samples) <= MOST_SAMPLES else sorted(samples, key=worth, reverse=True)[:MOST_SAMPLES]
    rest = [sample for sample in samples if sample not in best]
    return {
        "title": EVIDENCE[level].format(row["attack"]),
        "section": section,
        "best": best,
        "rest": rest,
        "big": len(best) <= FEW,
        "terms": legend.terms(row),
    }


def _section(row: Result, place: int, legend: Legend, level: str) -> dict[str, Any]:
    """What the template needs to draw one attack."""
    shown, is_text = row.get("shown", {}), row.get("media") != "image/png"
    series = legend.series(shown)
    samples = [sample(row, i, series, level, legend) for i in range(max(map(len, shown.values()), default=0))]
    given = "labels" in row["observation"].get("revealed", [])
    oracles = [key for key in legend.series(row["controls"]) if key in legend.controls and not legend.is_blind(key)]
    return {
        "number": place,
        "result": row,
        "is_text": is_text,
        "is_evidence": False,
        "kind": ("Text" if is_text else "Image") if samples else "Sample",
        "series": series,
        "columns": [legend.label(name) for name in series],
        "own": [k for k, name in enumerate(series) if name in SHOWN],
        "guessed": [k for k, name in enumerate(series) if name not in SHOWN],
        "samples": samples,
        "labels": labels(row, given),
        "scores": [legend.group(name, row) for name in legend.measured(row)],
        "repeats": legend.repeats(row),
        "oracles": [legend.label(key) for key in oracles],
        "has_rank": bool(row["scores"].get(RANK)),
        "curve": curve(row.get("trace", [])),
        "facts": {
            "Outcome": OUTCOMES.get(row.get("outcome", ""), row.get("outcome", DASH)),
            "Residual": number(row["residual"], ".3g"),
            "Seconds": number(row["seconds"], ",.2f"),
            "Iterations": f"{row['iterations']:,}",
            "Defense": describe(row["defense"]),
        },
    }
