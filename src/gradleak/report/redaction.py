"""A record without private data: scores, counts and hashes stay; pictures, texts, labels and the places of files do not."""

import hashlib
import re
from pathlib import PurePath
from typing import Any

from gradleak.report.record import Record, Result

REMOVED = "(removed: it names private data)"
NAMING = ("embeddings", "labels", "labels_told")  # flags of these names say private words and labels


def is_private(record: Record) -> bool:
    """Whether a page of this record shows private data."""
    if record.get("redacted", False):
        return False
    exposed = any("shown" in one for one in record.get("membership", {}).get("exposed", []))
    return exposed or any(row.get("shown") and row.get("media") for row in record["results"])


def redacted(record: Record) -> Record:
    """A copy of the record that may be handed on."""
    results = [without_data(row) for row in record["results"]]
    said = {flag["sentence"] for row in record["results"] for flag in row["flags"] if flag["name"] in NAMING}
    command = {
        **record["command"],
        "arguments": {k: without_place(v) for k, v in record["command"]["arguments"].items()},
    }
    command["inputs"] = {PurePath(path).name: digest for path, digest in record["command"].get("inputs", {}).items()}
    copy: Any = {
        **record,
        "command": command,
        "results": results,
        "redacted": True,
        "verdict": unsaid(record["verdict"], said),
    }
    if "membership" in record:
        exposed = [{k: v for k, v in one.items() if k != "shown"} for one in record["membership"]["exposed"]]
        copy["membership"] = {**record["membership"], "exposed": exposed}
    if "verdicts" in record:
        copy["verdicts"] = [unsaid(verdict, said) for verdict in record["verdicts"]]
    whole: Record = copy
    return whole


def without_data(row: Result) -> Result:
    """The row with hashes in place of what came out, and of the truth."""
    copy: Any = {key: value for key, value in row.items() if key not in ("labels", "shown", "media")}
    if "shown" in row:
        hashes = {name: [hashed(value) for value in values] for name, values in row["shown"].items()}
        copy |= {"shown": hashes, "media": "text/plain"}
    copy["flags"] = [{**flag, "sentence": REMOVED} if flag["name"] in NAMING else flag for flag in row["flags"]]
    cleaned: Result = copy
    return cleaned


def hashed(value: str) -> str:
    """A short SHA-256, which tells only whoever has the data which of them it was."""
    if re.fullmatch(r"SHA-256 [0-9a-f]{16}", value):  # of a record that is redacted already
        return value
    return f"SHA-256 {hashlib.sha256(value.encode('utf-8', 'replace')).hexdigest()[:16]}"


def unsaid(verdict: Any, said: set[str]) -> Any:
    """The verdict without the sentences that name private words."""
    sentences = {key: verdict[key] for key in ("headline", "sentence") if key in verdict}
    for one in said:
        sentences = {key: text.replace(one, REMOVED) for key, text in sentences.items()}
    return {**verdict, **sentences}


def without_place(value: Any) -> Any:
    """The last part of a path alone."""
    return PurePath(value).name if isinstance(value, str) and "/" in value else value
