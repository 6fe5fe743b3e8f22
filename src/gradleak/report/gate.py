"""Whether what a record says lies above a bar, as the exit code of a job."""

from typing import Literal

from gradleak.report.record import Record

Bar = Literal["recovered", "partly"]
FINE, LEAK, NO_VERDICT = 0, 1, 3  # 2 is bad input


def exit_code(record: Record, bar: Bar | None) -> int:
    """0 below the bar, 1 above it, 3 where nothing could run or, with a bar, nothing can be said.

    recovered: a private sample came back as a whole, or is proven. partly: also in part. "Nothing recovered" passes, and proves
    nothing; void and unscored numbers pass no bar. What is proven stands, whatever is void.
    """
    results, level = record["results"], record["verdict"]["level"]
    if not any(row.get("ran", row["residual"] is not None) for row in results):
        return NO_VERDICT
    if bar is None:
        return FINE
    whole = any(any(row.get("proven", [])) or (level != "void" and any(row.get("recovered", []))) for row in results)
    if whole or (bar == "partly" and level in ("recovered", "partial")):
        return LEAK
    return NO_VERDICT if level in ("void", "unscored") else FINE
