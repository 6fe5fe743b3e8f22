"""Records of older versions in the words of today."""

from pathlib import Path
from typing import Any, TypedDict

from gradleak.errors import checked

OLD = "gradleak/record/1"
WRITTEN = ("label", "unit", "better", "decimals")
METRICS = {  # schema 1 left it to the report how these are written
    "psnr_db": ("PSNR", "dB", "higher", 2),
    "ssim": ("SSIM", "", "higher", 3),
    "lpips": ("LPIPS", "", "lower", 3),
    "mse": ("MSE", "", "lower", 5),
    "rouge1": ("ROUGE-1", "", "higher", 3),
    "rouge2": ("ROUGE-2", "", "higher", 3),
    "rouge_l": ("ROUGE-L", "", "higher", 3),
    "exact_match": ("Word for word", "", "higher", 0),
    "position_accuracy": ("Right places", "", "higher", 3),
    "identification_rank": ("Rank", "", "lower", 0),
}
CONTROLS = {  # (label, blind)
    "mean_image": ("Mean image", True),
    "nearest_public": ("Nearest public", False),
    "frequent_words": ("Frequent words", True),
    "wrong_observation": ("Wrong observation", True),
}


class OldRow(TypedDict):
    """What is read of a result."""

    observation: dict[str, Any]
    status: str


class OldCommand(TypedDict):
    """What is read of a command."""

    name: str
    arguments: dict[str, Any]


class OldRecord(TypedDict):
    """What is read of a record here; the rest is checked as schema 2 has it."""

    command: OldCommand
    threat_model: list[dict[str, Any]]
    results: list[OldRow]


def modern(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """A record of schema 1 as schema 2 has it.

    Pictures and texts are `shown`. Observations had no names: they go by their kind, and the threat model is that of the first.
    Raises BadInput where the record has another shape.
    """
    checked(record, OldRecord, f"{path} is not a valid {OLD!r}")
    results = [_row(row) for row in record["results"]]
    first = {"observation": results[0]["observation"]["name"]} if results else {}
    arguments = dict(record["command"]["arguments"])
    command = {**record["command"], "inputs": arguments.pop("inputs", {}), "arguments": arguments}
    argv = arguments.get("argv")
    if command["name"] == "reproduce" and isinstance(argv, list):
        arguments["name"] = "".join(map(str, argv[1:2]))
    return {
        **record,
        "schema": "gradleak/record/2",
        "command": command,
        "threat_model": [{**fact, **first} for fact in record["threat_model"]],
        "results": results,
        "metrics": {name: dict(zip(WRITTEN, how, strict=True)) for name, how in METRICS.items()},
        "controls": {name: {"label": label, "blind": blind} for name, (label, blind) in CONTROLS.items()},
    }


def _row(row: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in row.items() if key not in ("pictures", "texts")}
    kept["observation"] = {**row["observation"], "name": str(row["observation"].get("kind", ""))}
    kept["ran"] = not row["status"].startswith("Not run: ")
    if row.get("pictures"):
        kept |= {"media": "image/png", "shown": row["pictures"]}
    elif row.get("texts"):
        kept |= {"media": "text/plain", "shown": row["texts"]}
    return kept
