"""What a reader in a hurry takes home of an observation: one level and one sentence, which no line of the page contradicts.

Errors void it. What is proven needs no secret. "Not found" is not "safe": only a release that does not hold the information is.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gradleak.audit import headline
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
ROUNDS = "rounds"  # flags that say which rounds were attacked jointly, and whether they share their data
VOID = "No number on this page can be relied on: a check failed."
PARTS = "Parts of the private data can be read off what was shared, without any attack."
NO_SECRET = "without the secret, nothing was scored"
INFORMATION = {
    "information_absent": " The information is absent from the release.",
    "information_partial": " The release holds part of the information; no attack found it.",
    "information_present": " The information is present in the release: no attack found it, another may.",
    "information_unknown": PROVES_NOTHING,
}


def verdict(results: Sequence[Result], metrics: Mapping[str, Any], untried: Sequence[str] = ()) -> Verdict:
    """`of_attacks`, and what the release tells with no attack at all: where it does, nothing is called safe."""
    judged = of_attacks(results, metrics, untried)
    flags = [flag for row in results for flag in row["flags"]]
    rounds = dict.fromkeys(flag["sentence"] for flag in flags if flag["name"].startswith(ROUNDS))
    judged = {**judged, "sentence": " ".join((judged["sentence"], *rounds))}
    told = dict.fromkeys(flag["sentence"] for flag in flags if flag["name"] == TOLD and flag["level"] == "warning")
    if not told:
        return judged
    if judged["level"] in ("recovered", "void", "partial"):
        return {**judged, "sentence": " ".join((*told, judged["sentence"]))}
    parts = " ".join((*told, judged["sentence"]))
    return {**judged, "level": "partial", "headline": PARTS, "sentence": parts}


def of_attacks(results: Sequence[Result], metrics: Mapping[str, Any], untried: Sequence[str] = ()) -> Verdict:
    """One sentence over all attacks on one observation.

    metrics: how each is written, `record["metrics"]`; the first is the one that leads are measured by. untried: attacks that
    read such an observation, and were not asked for.
    """
    found = told(results, metrics)
    return {**found, "untried": list(untried)} if untried else found


def told(results: Sequence[Result], metrics: Mapping[str, Any]) -> Verdict:
    """The same of the attacks that were asked for."""
    ran = [row for row in results if row.get("ran", row["residual"] is not None)]
    proven = max(ran, key=lambda row: sum(row.get("proven", [])), default=None)
    evidence = "" if proven is None else proof(proven)
    errors = {flag["name"]: flag["sentence"] for row in ran for flag in row["flags"] if flag["level"] == "error"}
    if errors:
        stands = f" What needs no secret stands: {evidence}" if evidence else ""
        first = headline.of_proof("void", proven) if evidence and proven is not None else VOID
        return {"level": "void", "headline": first, "sentence": f"{' '.join(errors.values())}{stands}"}
    scored = [row for row in ran if row["scores"]]
    if evidence and proven is not None and not scored:
        level: Level = "recovered" if all(proven["proven"]) else "partial"
        return {"level": level, "headline": headline.of_proof(level, proven), "sentence": evidence}
    if not ran:
        reasons = " ".join(f"{row['attack']}: {row['status']}" for row in results[:3])
        return {"level": "unscored", "headline": "No attack could run on this observation.", "sentence": reasons}
    if not scored:
        best, sentence = unscored(ran)
        return {"level": "unscored", "headline": headline.of_unscored(best), "sentence": sentence}
    return compared(scored, metrics, evidence)


def proof(row: Result) -> str:
    """How many samples an attack has proven, or nothing."""
    count, total = sum(row.get("proven", [])), len(row.get("proven", []))
    if not count:
        return ""
    return f"{count} of {total} private samples proven by {row['attack']}: nothing else explains what was released."


def unscored(ran: Sequence[Result]) -> tuple[Result | None, str]:
    """What explains most of the release, if anything does, and what can be said without the secret."""
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
    sentence += "".join(" " + f["sentence"] for f in best["flags"] if f["name"].startswith("information_"))
    return best if explaining else None, sentence


def compared(scored: Sequence[Result], metrics: Mapping[str, Any], evidence: str) -> Verdict:
    """What came back, next to what somebody guesses who has seen nothing."""

    def worth(row: Result) -> tuple[int, int, float]:
        return (
            sum(row.get("recovered", [])),
            sum(row.get("partly", [])),
            sum(value or 0 for value in row.get("leads", [])),
        )

    best = max(scored, key=worth)
    name, metric = next((name, metric) for name, metric in metrics.items() if name in best["scores"])
    total, count, parts = len(best["scores"][name]), sum(best.get("recovered", [])), sum(best.get("partly", []))
    names, labels = {flag["name"] for flag in best["flags"]}, headline.labels_read(scored)
    words = "".join(f" {flag['sentence']}" for flag in best["flags"] if flag["name"] == "bag")
    words += under_seeds(best)
    if count or parts:
        level: Level = "recovered" if count == total else "partial"
        among = f", identified among {best['decoys'] + 1}" if "decoys" in best else ""
        sentence = (
            f"The best attack is {best['attack']}: {figures(best, name, metric)}{among}.{words} {evidence}".rstrip()
        )
    else:
        level = "absent" if "information_absent" in names and not labels else "nothing"  # labels are private too
        extra = next((text for key, text in INFORMATION.items() if key in names), PROVES_NOTHING)
        sentence = f"The closest attack is {best['attack']}: {figures(best, name, metric)}.{words}{extra}"
    return {"level": level, "headline": headline.of_scored(level, best, labels), "sentence": sentence}


def figures(row: Result, name: str, metric: Mapping[str, Any]) -> str:
    """The mean of the first metric and of the leads by it, each with its interval."""
    leads, present = (
        [value for value in values if value is not None] for values in (row.get("leads", []), row["scores"][name])
    )
    unit = f" {metric['unit']}" if metric["unit"] else ""
    digits, ends = max(metric["decimals"] - 1, 1), row.get("intervals", {})
    mean, lead = (sum(values) / max(len(values), 1) for values in (present, leads))
    reach, ahead = (
        f" ({ends[key][0]:{sign}.{digits}f} to {ends[key][1]:{sign}.{digits}f})" if key in ends else ""
        for key, sign in ((name, ""), ("leads", "+"))
    )
    return (
        f"{metric['label']} {mean:.{digits}f}{unit}{reach} on average, {lead:+.{digits}f}{unit or ' ' + metric['label']}{ahead} against "
        "the best blind control"
    )


def under_seeds(row: Result) -> str:
    """In how many of several seeds the same came back."""
    repeats = row.get("repeats", [])
    if len(repeats) < 2:
        return ""
    counts = [repeat.get("recovered", 0) for repeat in repeats]
    if min(counts) == max(counts):
        return f" Under each of {len(repeats)} seeds {counts[0]} came back."
    return f" Under {len(repeats)} seeds {min(counts)} to {max(counts)} came back; the one that explains most is shown."


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict over several observations: the most serious one, and all sentences."""
    if len(verdicts) == 1:
        return verdicts[0]
    worst = min(verdicts, key=lambda one: SERIOUS.index(one["level"]))
    first, rest = (
        " ".join(f"{one.get('observation', '').capitalize()}: {one[key]}" for one in verdicts if one.get(key))
        for key in ("headline", "sentence")
    )
    return {"level": worst["level"], "headline": first, "sentence": rest}


def judged(record: Record, untried: Mapping[str, Sequence[str]]) -> None:
    """Write the verdicts of a record that may hold several observations; untried: {observation: attacks not asked for}."""
    names = list(dict.fromkeys(str(row["observation"]["name"]) for row in record["results"]))
    verdicts: list[Verdict] = []
    for name in names:
        rows = [row for row in record["results"] if row["observation"]["name"] == name]
        verdicts.append({**verdict(rows, record.get("metrics", {}), untried.get(name, ())), "observation": name})
    if verdicts:
        record["verdicts"], record["verdict"] = verdicts, overall(verdicts)
