"""What a reader in a hurry takes home of an observation: one level and one sentence, which no line of the page contradicts.

Errors void it. What is proven needs no secret. "Not found" is not "safe": only a release that does not hold the information is.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gradleak.report.record import Level, Record, Result, Verdict

PROVES_NOTHING = " That proves nothing: another attack may find more."
SERIOUS: tuple[Level, ...] = (
    "recovered",
    "void",
    "partial",
    "members",
    "nothing",
    "unscored",
    "absent",
)  # the worst of several is told
TOLD = "embeddings"  # a flag that says, as a warning, what a release tells of the private data with no attack at all
NO_SECRET = "without the secret, nothing was scored"
INFORMATION = {
    "information_partial": " The release holds part of the information; no attack found it.",
    "information_present": " The information is present in the release: no attack found it, another may.",
    "information_unknown": PROVES_NOTHING,
}


def verdict(results: Sequence[Result], metrics: Mapping[str, Any], untried: Sequence[str] = ()) -> Verdict:
    """`of_attacks`, and what the release tells with no attack at all: where it does, nothing is called safe."""
    judged = of_attacks(results, metrics, untried)
    flags = [flag for row in results for flag in row["flags"]]
    told = dict.fromkeys(flag["sentence"] for flag in flags if flag["name"] == TOLD and flag["level"] == "warning")
    if not told:
        return judged
    level = judged["level"] if judged["level"] in ("recovered", "void", "partial") else "partial"
    return {"level": level, "sentence": " ".join((*told, judged["sentence"]))}


def of_attacks(results: Sequence[Result], metrics: Mapping[str, Any], untried: Sequence[str] = ()) -> Verdict:
    """One sentence over all attacks on one observation.

    metrics: how each is written, `record["metrics"]`; the first is the one that leads are measured by. untried: attacks that
    read such an observation, and were not asked for.
    """
    ran = [row for row in results if row.get("ran", row["residual"] is not None)]
    proven = max(ran, key=lambda row: sum(row.get("proven", [])), default=None)
    evidence = "" if proven is None else proof(proven)
    errors = {flag["name"]: flag["sentence"] for row in ran for flag in row["flags"] if flag["level"] == "error"}
    if errors:
        stands = f" What needs no secret stands: {evidence}" if evidence else ""
        return {"level": "void", "sentence": f"No number here can be relied on. {' '.join(errors.values())}{stands}"}
    scored = [row for row in ran if row["scores"]]
    if evidence and proven is not None and not scored:
        level: Level = "recovered" if all(proven["proven"]) else "partial"
        return {"level": level, "sentence": evidence}
    rest = f" Not tried: {', '.join(untried)}." if untried else ""
    if not ran:
        reasons = " ".join(f"{row['attack']}: {row['status']}" for row in results[:3])
        return {"level": "unscored", "sentence": f"No attack could run on this observation. {reasons}{rest}".rstrip()}
    if not scored:
        return {"level": "unscored", "sentence": unscored(ran) + rest}
    return compared(scored, metrics, evidence, rest)


def proof(row: Result) -> str:
    """How many samples an attack has proven, or nothing."""
    count, total = sum(row.get("proven", [])), len(row.get("proven", []))
    if not count:
        return ""
    return f"{count} of {total} private samples proven by {row['attack']}: nothing else explains what was released."


def unscored(ran: Sequence[Result]) -> str:
    """What can be said without the secret."""
    explaining = [row for row in ran if row["residual"] is not None and math.isfinite(row["residual"])]
    best = min(explaining, key=lambda row: float(row["residual"] or 0), default=ran[0])
    counts = [row for row in ran if "count" in row]
    why = "nothing of the data themselves was scored" if any("true" in row["count"] for row in counts) else NO_SECRET
    if explaining and float(best["residual"] or 0) >= 1:
        sentence = f"No attack explains any of the observation (least relative residual {best['residual']:.2g}); {why}."
    elif explaining:
        sentence = f"{best['attack']} explains the observation best (relative residual {best['residual']:.2g}); {why}."
    else:
        sentence = f"{', '.join(row['attack'] for row in ran)} ran; {why}."
    sentence += "".join(f" {row['status']}" for row in counts)
    return sentence + "".join(" " + f["sentence"] for f in best["flags"] if f["name"].startswith("information_"))


def compared(scored: Sequence[Result], metrics: Mapping[str, Any], evidence: str, rest: str) -> Verdict:
    """What came back, next to what somebody guesses who has seen nothing."""

    def worth(row: Result) -> tuple[int, int, float]:
        return (
            sum(row.get("recovered", [])),
            sum(row.get("partly", [])),
            sum(value or 0 for value in row.get("leads", [])),
        )

    best = max(scored, key=worth)
    name, metric = next((name, metric) for name, metric in metrics.items() if name in best["scores"])
    leads = [value for value in best.get("leads", []) if value is not None]
    total, count, parts = len(best["scores"][name]), sum(best.get("recovered", [])), sum(best.get("partly", []))
    unit = f" {metric['unit']}" if metric["unit"] else f" {metric['label']}"
    lead = f"{sum(leads) / max(len(leads), 1):+.{max(metric['decimals'] - 1, 1)}f}{unit} against the best blind control"
    present = [value for value in best["scores"][name] if value is not None]
    mean = f"{metric['label']} {sum(present) / max(len(present), 1):.{max(metric['decimals'] - 1, 1)}f} on average"
    words = "".join(f" {flag['sentence']}" for flag in best["flags"] if flag["name"] == "bag")
    if count or parts:
        level: Level = "recovered" if count == total else "partial"
        what = (
            f"{count} of {total} private samples recovered"
            if count
            else f"Parts of {parts} of {total} private samples recovered"
        )
        among = f", identified among {best['decoys'] + 1}" if "decoys" in best else ""
        sentence = f"{what} by {best['attack']}: {mean}, {lead}{among}.{words}"
        return {"level": level, "sentence": f"{sentence} {evidence}".rstrip()}
    names = {flag["name"] for flag in best["flags"]}
    sentence = f"None of {total} private samples was recovered: the closest attack, {best['attack']}, is {lead}.{words}"
    if "information_absent" in names:
        return {"level": "absent", "sentence": f"{sentence} The information is absent from the release."}
    extra = next((text for key, text in INFORMATION.items() if key in names), PROVES_NOTHING)
    return {"level": "nothing", "sentence": f"{sentence}{extra}{rest}"}


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict over several observations: the most serious one, and all sentences."""
    if len(verdicts) == 1:
        return verdicts[0]
    worst = min(verdicts, key=lambda one: SERIOUS.index(one["level"]))
    sentences = " ".join(f"{one.get('observation', '').capitalize()}: {one['sentence']}" for one in verdicts)
    return {"level": worst["level"], "sentence": sentences}


def judged(record: Record, untried: Mapping[str, Sequence[str]]) -> None:
    """Write the verdicts of a record that may hold several observations; untried: {observation: attacks not asked for}."""
    names = list(dict.fromkeys(str(row["observation"]["name"]) for row in record["results"]))
    verdicts: list[Verdict] = []
    for name in names:
        rows = [row for row in record["results"] if row["observation"]["name"] == name]
        verdicts.append({**verdict(rows, record.get("metrics", {}), untried.get(name, ())), "observation": name})
    if verdicts:
        record["verdicts"], record["verdict"] = verdicts, overall(verdicts)
