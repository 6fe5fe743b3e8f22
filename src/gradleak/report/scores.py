"""The scores of a record as one flat table: a row for each attack and private sample, controls beside them. No private data."""

import csv
import io
from typing import Any

from gradleak.report.record import Record, Result

FIRST = ("observation", "attack", "ran", "status", "sample")


def samples(record: Record) -> list[dict[str, Any]]:
    """The rows; one without a sample for an attack that was not scored. Scores of a control are called metric (control)."""
    return [row for result in record["results"] for row in of_result(result)]


def of_result(result: Result) -> list[dict[str, Any]]:
    """The rows of one attack."""
    about = {
        "observation": str(result["observation"].get("name", "")),
        "attack": result["attack"],
        "ran": result.get("ran", result["residual"] is not None),
        "status": result["status"],
    }
    columns: dict[str, Any] = {key: result.get(key, []) for key in ("recovered", "partly", "proven")}
    columns |= {**result["scores"], "lead": result.get("leads", [])}
    for control, scores in result["controls"].items():
        columns |= {f"{metric} ({control})": values for metric, values in scores.items()}
    count = max(map(len, columns.values()))
    tail = {"residual": result["residual"], "seconds": result["seconds"]}
    each = [
        {name: values[i] for name, values in columns.items() if i < len(values)} | {"sample": i} for i in range(count)
    ]
    return [{**about, **one, **tail} for one in each or [{}]]


def as_csv(record: Record) -> str:
    """The table as CSV; what begins like a formula is quoted, for the sake of spreadsheets."""
    rows = samples(record)
    names = list(dict.fromkeys([*FIRST, *(name for row in rows for name in row)]))
    file = io.StringIO()
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"'{v}" if isinstance(v, str) and v[:1] in "=+-@" else v for name, v in row.items()})
    return file.getvalue()
