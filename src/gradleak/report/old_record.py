"""Records of older versions in the words of today."""

from pathlib import Path
from typing import Any

from gradleak.errors import BadInput

OLD = "gradleak/record/1"


def modern(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """A record of schema 1 as schema 2 has it: pictures and texts are `shown`, and the command line is an argument."""
    try:
        results = [_row(row) for row in record["results"]]
        command = {**record["command"], "inputs": record["command"]["arguments"].get("inputs", {})}
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is not a valid {OLD!r}: {error} is missing or damaged.") from error
    return {**record, "schema": "gradleak/record/2", "results": results, "command": command}


def _row(row: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in row.items() if key not in ("pictures", "texts")}
    if row.get("pictures"):
        kept |= {"media": "image/png", "shown": row["pictures"]}
    elif row.get("texts"):
        kept |= {"media": "text/plain", "shown": row["texts"]}
    return kept
