"""Whether what a record says lies above a bar, as the exit code of a job."""

import re
from collections.abc import Sequence

from gradleak.errors import BadInput, shortened
from gradleak.report.record import Level, Record, Result

FINE, LEAK, NO_VERDICT = 0, 1, 3  # 2 is bad input
WORDS = ("recovered", "partly")
RATE = re.compile(r"TPR>(0?\.[0-9]+|0|1)")


def check_bar(bar: str | None, *, members: bool) -> None:
    """BadInput for what is no bar, and for one of membership where none is asked for."""
    if bar is None or bar in WORDS:
        return
    if not RATE.fullmatch(bar):
        raise BadInput(f"--fail-on {shortened(bar)!r} is no bar: recovered, partly or TPR>0.05.")
    if not members:
        raise BadInput(f"--fail-on {bar} is about membership: give --members and --non-members.")


def exit_code(record: Record, bar: str | None) -> int:
    """0 below the bar and where there is none, 1 above it, 3 where nothing could run or nothing can be said.

    recovered: a private sample came back as a whole, or is proven, be it as a member. partly: also in part. TPR>x: a larger share than x
    of the members is told from fresh samples at 1 % false alarms. "Nothing recovered" passes, and proves nothing; void and unscored
    numbers pass no bar. What is proven stands, whatever is void.
    """
    results, level, found = record["results"], record["verdict"]["level"], record.get("membership")
    if bar is None:
        return FINE
    if found is None and not any(row.get("ran", row["residual"] is not None) for row in results):
        return NO_VERDICT
    proof = None if found is None else found["certificate"]
    if rate := RATE.fullmatch(bar):
        told = found is not None and bool(found["best"]) and found["verdict"] != "void"
        share = found["scores"][found["best"]]["rates"][0]["true"] if found is not None and told else None
        proven = 0.0 if proof is None or found is None else proof["proven"] / found["members"]
        if max(proven, share or 0.0) > float(rate[1]):
            return LEAK
        return FINE if told else NO_VERDICT
    if (
        whole(results, level)
        or (proof is not None and proof["proven"])
        or (bar == "partly" and level in ("recovered", "partial"))
    ):
        return LEAK
    return NO_VERDICT if level in ("void", "unscored") else FINE


def whole(results: Sequence[Result], level: Level) -> bool:
    """Whether a private sample came back as a whole, or is proven; level: of the verdict, which may void what is scored."""
    return any(any(row.get("proven", [])) or (level != "void" and any(row.get("recovered", []))) for row in results)
