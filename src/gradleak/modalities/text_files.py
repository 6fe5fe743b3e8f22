"""Texts of a file: one a line (.txt), one JSON object a line (.jsonl), or a table with a header (.csv)."""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gradleak.errors import BadInput, shortened

COLUMNS = ("text", "sentence")
LABELS = ("label", "labels")
ENDINGS = (".txt", ".jsonl", ".csv")
LARGEST = 2**30  # bytes
MOST_CLASSES = 1_000_000


def is_text_file(source: str | Path) -> bool:
    """Whether this is such a file."""
    return Path(source).suffix.lower() in ENDINGS and Path(source).is_file()


def read_text_file(path: Path) -> tuple[list[str], list[int], int, bool]:
    """(texts, labels, classes, whether the file says the labels); columns are called text or sentence, and label or labels. Empty lines
    of .txt files count for nothing. Raises BadInput for what is neither, or damaged."""
    if path.stat().st_size > LARGEST:
        raise BadInput(f"{path} is too large for a file of texts: give a folder of parquet files.")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix.lower() == ".txt":
                texts = [line.strip() for line in file if line.strip()]
                if not texts:
                    raise BadInput(f"{path} holds no texts.")
                return texts, [0] * len(texts), 2, False
            table: Iterable[Any] = csv.DictReader(file) if path.suffix.lower() == ".csv" else map(json.loads, file)
            return columns([*table], path)
    except (ValueError, csv.Error, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as texts: {shortened(str(error))}.") from error


def columns(rows: list[Any], path: Path) -> tuple[list[str], list[int], int, bool]:
    """The texts and labels of rows that are mappings."""
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise BadInput(f"{path} holds no rows with a text.")
    text, label = (next((name for name in names if name in rows[0]), None) for names in (COLUMNS, LABELS))
    if text is None:
        raise BadInput(f"{path} holds no texts: its columns are {shortened(', '.join(map(str, rows[0])))}.")
    texts = [row.get(text) for row in rows]
    if label is None:
        return texts, [0] * len(texts), 2, False
    try:
        labels = [int(row[label]) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"The labels of {path} have missing entries, or none that are whole numbers.") from error
    if not all(0 <= number < MOST_CLASSES for number in labels):
        raise BadInput(f"The labels of {path} are no class indices: they count from 0.")
    return texts, labels, max(*labels, 1) + 1, True
