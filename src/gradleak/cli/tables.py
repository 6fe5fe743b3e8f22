"""The rows of an answer: all of them in table.csv, the first in the record and its page."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradleak.report.record import Record

MOST_SHOWN = 500  # rows of a page


def keep_table(rows: Sequence[Mapping[str, Any]], written: Record, out: Path) -> None:
    """Write table.csv, a column per name that one of the rows has, and put the first rows into the record."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    out.mkdir(parents=True, exist_ok=True)
    with (out / "table.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    written["table"] = rows[:MOST_SHOWN]
    if len(rows) > MOST_SHOWN:
        written["verdict"]["sentence"] += (
            f" (The first {MOST_SHOWN} of {len(rows):,} rows are shown; table.csv has all.)"
        )
