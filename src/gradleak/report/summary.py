"""A record in the forms that other programs read: a short JSON, Markdown for a job's page or a model card, JUnit's XML, and
SARIF 2.1.0 (OASIS 2020) for code scanning. None of them holds private data: no picture, no text, no label."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

from gradleak.report.numbers import Legend, mean, present
from gradleak.report.record import Record, Result, Verdict, finite
from gradleak.report.risk import risk, risk_of
from gradleak.report.scores import as_csv
from gradleak.report.words import LEVELS

FILES = ("summary.json", "summary.md", "junit.xml", "results.sarif", "samples.csv")
MEMBERSHIP = ("members", "fresh", "best", "scores", "certificate", "verdict", "sentence")
SARIF = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def save(record: Record, folder: Path) -> None:
    """Write all forms beside the record."""
    short = summary(record)
    (folder / "summary.json").write_text(json.dumps(short, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / "summary.md").write_text(markdown(short), encoding="utf-8")
    (folder / "junit.xml").write_bytes(junit(short))
    (folder / "samples.csv").write_text(as_csv(record), encoding="utf-8")
    (folder / "results.sarif").write_text(json.dumps(sarif(short), indent=1) + "\n", encoding="utf-8")


def summary(record: Record) -> dict[str, Any]:
    """The verdict, membership, and one row per attack with counts and means."""
    legend, found = Legend(record.get("metrics", {}), record.get("controls", {})), record.get("membership")
    whole, void = risk(record), voided(record)
    told = {
        "gradleak": record["gradleak"],
        "input": str(record["command"]["arguments"].get("observation") or record["command"]["name"]),
        "verdict": {**record["verdict"], "title": LEVELS[record["verdict"]["level"]]},
        "risk": None if whole is None else whole._asdict(),
        "observations": [
            {**verdict, "risk": risk_of(record, verdict.get("observation", ""))._asdict()}
            for verdict in record.get("verdicts", [])
        ],
        "membership": {key: value for key, value in (found or {}).items() if key in MEMBERSHIP} or None,
        "attacks": [attack(row, legend, void.get(observed(row), ())) for row in record["results"]],
    }
    return cast(dict[str, Any], finite(told))


def in_words(verdict: Verdict) -> str:
    """A verdict for a terminal: its sentences, and what was not tried."""
    lines = [verdict.get("headline", ""), verdict["sentence"]]
    if untried := verdict.get("untried"):
        lines.append(f"Not tried: {', '.join(untried)}.")
    return "\n".join(line for line in lines if line)


def observed(row: Result) -> str:
    """The name of the observation that a row is about."""
    return str(row["observation"].get("name", ""))


def voided(record: Record) -> dict[str, list[str]]:
    """{observation: errors} where the verdict is void: then every row is, also of attacks that did nothing wrong."""
    verdicts = {verdict.get("observation", ""): verdict for verdict in record.get("verdicts", [])}
    void: dict[str, list[str]] = {}
    for row in record["results"]:
        if verdicts.get(observed(row), record["verdict"])["level"] == "void" and row.get(
            "ran", row["residual"] is not None
        ):
            void.setdefault(observed(row), []).extend(errors_of(row))
    return {name: list(dict.fromkeys(errors)) for name, errors in void.items()}


def errors_of(row: Result) -> list[str]:
    """What is wrong with its numbers."""
    return [flag["sentence"] for flag in row["flags"] if flag["level"] == "error"]


def attack(row: Result, legend: Legend, void: Sequence[str] = ()) -> dict[str, Any]:
    """One attack: what came of it, and nothing of what came out; of a void one, only what is proven. void: errors of the rows beside it."""
    ran = row.get("ran", row["residual"] is not None)
    metric = next(iter(legend.measured(row)), "")
    errors = list(dict.fromkeys((*errors_of(row), *void))) if ran else errors_of(row)
    told: dict[str, Any] = {
        key: row.get(key, []) for key in (("proven",) if errors else ("recovered", "partly", "proven"))
    }
    counts: dict[str, Any] = {key: sum(values) for key, values in told.items() if key in row}
    return {
        "attack": row["attack"],
        "observation": observed(row),
        "ran": ran,
        "status": row["status"],
        **counts,
        "samples": max(map(len, told.values())) or None,
        "scores": {name: mean(present(row["scores"][name])) for name in legend.measured(row)},
        "lead": mean(present(legend.gaps(metric, row))) if metric else None,
        "residual": row["residual"],
        "seconds": row["seconds"],
        "errors": errors,
    }


def leaked(row: Mapping[str, Any]) -> str:
    """ "recovered", "partial" or "nothing" of an attack; what is void counts only where it is proven."""
    if row.get("proven", 0):
        return "recovered"
    return "recovered" if row.get("recovered", 0) else "partial" if row.get("partly", 0) else "nothing"


def markdown(short: Mapping[str, Any]) -> str:
    """A section for a job's page or a model card."""
    verdict = short["verdict"]
    lines = [
        "## Privacy audit by gradleak",
        "",
        f"**{verdict['title']}.** {one_line(verdict.get('headline', ''))}".rstrip(),
        "",
    ]
    lines += [one_line(verdict["sentence"]), ""]
    if short["risk"] is not None:
        lines += [f"Risk of sharing it: **{short['risk']['label']}** ({short['risk']['why']}).", ""]
    ran = [row for row in short["attacks"] if row["ran"]]
    if ran:
        lines += [
            "| attack | recovered | proven | lead over the best blind control | residual |",
            "|---|---|---|---|---|",
        ]
        lines += [f"| {' | '.join(cells(row))} |" for row in ran]
    if rest := [row["attack"] for row in short["attacks"] if not row["ran"]]:
        lines += ["", f"Not run: {', '.join(rest)}."]
    if untried := verdict.get("untried"):
        lines += ["", f"Not tried, although they read such a release: {', '.join(untried)}."]
    return "\n".join([*lines, "", f"gradleak {short['gradleak']}", ""])


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of the table of Markdown."""
    count = (
        "void" if row["errors"] else f"{row['recovered']} of {row['samples']}" if "recovered" in row else "not scored"
    )
    proven = str(row.get("proven") or "none")
    numbers = [
        f"{row['lead']:+.2f}" if row["lead"] is not None else "",
        f"{row['residual']:.2g}" if row["residual"] else "",
    ]
    return [row["attack"], count, proven, *numbers]


def one_line(text: str) -> str:
    """Text that no Markdown page takes for a table, a tag or a link of its own."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


def junit(short: Mapping[str, Any]) -> bytes:
    """One test case per attack: a failure is a leak, an error a void number, a skip an attack that did not run."""
    cases = []
    for row in short["attacks"]:
        case = ElementTree.Element(
            "testcase", name=row["attack"], classname=f"gradleak.{row['observation']}", time=f"{row['seconds']:.3f}"
        )
        kind = (
            "skipped" if not row["ran"] else "failure" if leaked(row) != "nothing" else "error" if row["errors"] else ""
        )
        if kind:
            message = " ".join(row["errors"]) if kind == "error" else row["status"]
            ElementTree.SubElement(case, kind, message=printable(message))
        cases.append((case, kind))
    suite = ElementTree.Element("testsuite", name="gradleak", tests=str(len(cases)))
    for kind, plural in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
        suite.set(plural, str(sum(own == kind for _, own in cases)))
    suite.extend(case for case, _ in cases)
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    page: bytes = ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)
    return page


def printable(text: str) -> str:
    """What XML can hold."""
    return "".join(c if c.isprintable() else "?" for c in text)


def sarif(short: Mapping[str, Any]) -> dict[str, Any]:
    """One result per attack that ran, at the file that was audited."""
    names: Sequence[str] = list(dict.fromkeys(row["attack"] for row in short["attacks"]))
    levels = {"recovered": ("fail", "error"), "partial": ("fail", "warning"), "nothing": ("open", "none")}
    place = {
        "physicalLocation": {"artifactLocation": {"uri": Path(short["input"]).as_posix()}, "region": {"startLine": 1}}
    }
    results = []
    for row in short["attacks"]:
        if row["ran"]:
            kind, level = levels[leaked(row)]
            text = " ".join([row["status"], *row["errors"]])
            results.append(
                {
                    "ruleId": row["attack"],
                    "ruleIndex": names.index(row["attack"]),
                    "kind": kind,
                    "level": level,
                    "message": {"text": text},
                    "locations": [place],
                }
            )
    rules = [{"id": name, "shortDescription": {"text": f"What {name} gets out of the release"}} for name in names]
    driver = {"name": "gradleak", "semanticVersion": short["gradleak"], "rules": rules}
    notes = [{"level": "note", "message": {"text": in_words(short["verdict"])}}]
    run = {
        "tool": {"driver": driver},
        "results": results,
        "invocations": [{"executionSuccessful": True, "toolExecutionNotifications": notes}],
    }
    return {"$schema": SARIF, "version": "2.1.0", "runs": [run]}
