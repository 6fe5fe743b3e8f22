"""The verdict in one sentence for everybody: how many of how many came back, and how certain that is for samples like these."""

from collections import Counter
from collections.abc import Sequence

from gradleak.audit.intervals import share
from gradleak.report.record import Level, Result

WHO = "to an attacker who sees only what was shared"
HALF = 0.5  # of a release: what leaves more of it unexplained explains little


def of_scored(level: Level, row: Result, labels: str) -> str:
    """Of an attack that was compared with the truth. labels: `labels_read`."""
    whole, parts, total, noun = sum(row.get("recovered", [])), in_part(row), samples(row), kind(row)
    if level in ("recovered", "partial"):
        told = (
            f"{whole} of {total} private {noun} came back"
            if whole
            else f"{parts} of {total} private {noun} came back in part"
        )
        more = f", {parts} more in part," if whole and parts else ""
        return f"{told}{more} {WHO}{certainty(whole or parts, total, noun)}."
    if level == "absent":
        return f"None of {total} private {noun} came back, and what was shared does not hold them."
    return (
        f"None of {total} private {noun} came back with the attacks that were tried{certainty(0, total, noun)}.{labels}"
    )


def of_proof(level: Level, row: Result) -> str:
    """Of samples that are proven; level: of the verdict."""
    count, total = sum(row.get("proven", [])), len(row.get("proven", []))
    told = f"{count} of {total} private {kind(row)} came back {WHO}, proven without the secret{certainty(count, total, kind(row))}."
    return f"A check failed, and no score on this page can be relied on. {told}" if level == "void" else told


def of_unscored(best: Result | None) -> str:
    """Where nothing was compared with the truth; best: what explains most of the release, if anything does."""
    if best is None or best["residual"] is None:
        return "What leaked cannot be said: nothing that came out was compared with the private data."
    if best["residual"] > HALF:
        return "What leaked cannot be said: nothing that came out explains much of what was shared, and nothing was compared with the private data."
    part = 100 * (1 - best["residual"] ** 2)
    return (
        f"Something came out that explains {'more than 99' if part > 99 else f'{part:.0f}'} % of what was shared. Look at it: if it is in "
        "your data, it has leaked. Nobody has compared it with them here."
    )


def certainty(hits: int, total: int, noun: str) -> str:
    """What so many samples say of others like them."""
    if total < 2:
        return "; one sample does not tell how often that happens"
    low, high = (100 * end for end in share(hits, total))
    return f"; of {noun} like these it would be {low:.0f} to {high:.0f} in 100 (95 % interval)"


def labels_read(rows: Sequence[Result]) -> str:
    """How many labels came out that were not given, in the best of the attacks; a leak of its own."""
    found: list[tuple[int, int]] = [
        ((Counter(labels["recovered"]) & Counter(labels["true"])).total(), len(labels["true"]))
        for row in rows
        if (labels := row.get("labels")) and "true" in labels and "labels" not in row["observation"].get("revealed", [])
    ]
    right, total = max(found, default=(0, 0))
    return f" Their labels are another matter: {right} of {total} were read." if right else ""


def kind(row: Result) -> str:
    """What the samples are called."""
    return str(row["observation"].get("data", "samples"))


def samples(row: Result) -> int:
    """How many private samples there are."""
    return max(len(row.get("recovered", [])), *(map(len, row["scores"].values())))


def in_part(row: Result) -> int:
    """How many came back in part, and not whole."""
    return sum(part and not whole for whole, part in zip(row.get("recovered", []), row.get("partly", []), strict=False))
