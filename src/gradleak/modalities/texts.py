"""Texts to attack, and public ones: sentences of our own, Hugging Face parquet folders, or data sets on the hub."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradleak.errors import BadInput
from gradleak.modalities.pictures import IN_WHEELS, UNLABELLED, hugging_face_labels, hugging_face_splits
from gradleak.modalities.text_files import COLUMNS, is_text_file, read_text_file

SUBJECTS = (
    "the old film",
    "her second novel",
    "a quiet song",
    "this long play",
    "the final chapter",
    "our small garden",
)
VERBS = ("moved", "bored", "surprised", "pleased", "worried")
OBJECTS = ("nearly everyone", "the whole crowd", "two young critics", "my patient friends")
ENDS = ("from start to end", "without much effort", "on a cold evening", "in a way that lasts")


@dataclass(frozen=True, eq=False)
class Texts:
    """Labelled texts and where they came from."""

    texts: tuple[str, ...]
    labels: Tensor  # (n,) int64
    classes: int
    source: str
    split: str
    labelled: bool = True  # whether the source says the labels, which are zeros otherwise
    names: tuple[str, ...] = ()  # of the classes, where the source has them


def load_texts(
    source: str | Path, split: str = "test", *, indices: Sequence[int] | None = None, limit: int | None = None
) -> Texts:
    """Rows of one split of "embedded", of a folder of parquet files, or of a data set on the hub, or of a file of texts, which has no
    splits; its labels, or zeros.

    Raises BadInput when the source, the split or a row does not exist, or when there is no column of text.
    """
    names: tuple[str, ...] = ()
    if is_text_file(source):
        texts, labels, classes, labelled = read_text_file(Path(source))
    elif source == "embedded":
        (texts, labels, classes), labelled = _embedded(split), True
    else:
        texts, labels, names, labelled = _hugging_face(source, split)
        classes = max(len(names), 2)
    chosen = list(range(len(texts))) if indices is None else list(indices)
    if outside := [i for i in chosen if not 0 <= i < len(texts)]:
        raise BadInput(f"Row {outside[0]} does not exist: split {split!r} of {source} has rows 0 to {len(texts) - 1}.")
    chosen = chosen[:limit]
    if not chosen:
        raise BadInput(f"No rows were selected from split {split!r} of {source}: give at least one index.")
    taken = torch.tensor([int(labels[i]) for i in chosen])
    lines = [texts[i] for i in chosen]
    for i, line in zip(chosen, lines, strict=True):
        if not isinstance(line, str):
            raise BadInput(f"Row {i} of {source} holds a {type(line).__name__}, and no text.")
    return Texts(tuple(lines), taken, classes, str(source), split, labelled, names if labelled else ())


def test_split(source: str | Path) -> str:
    """The split of unseen texts that a source has: test, else validation."""
    if source == "embedded":
        return "test"
    splits = hugging_face_splits(source)
    held_out = next((name for name in ("test", "validation") if name in splits), None)
    if held_out is None:
        raise BadInput(f"{source} has neither a test nor a validation split: it has {', '.join(splits)}.")
    return held_out


def holds_texts(source: str | Path) -> bool:
    """Whether a folder or data set has a column of text. What comes in wheels holds pictures too, and counts as these."""
    if source in IN_WHEELS:
        return False
    return any(name in table.column_names for table in hugging_face_splits(source).values() for name in COLUMNS)


def _embedded(split: str) -> tuple[list[str], list[int], int]:
    """Sentences put together here: every fifth is "test", the others "train". The label says whether the verb is kind."""
    every = [
        (f"{subject} {verb} {what} {end} .", int(verb in ("moved", "pleased")))
        for end in ENDS
        for what in OBJECTS
        for verb in VERBS
        for subject in SUBJECTS
    ]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
    if split not in ("train", "test"):
        raise BadInput(f"embedded has no split {split!r}; it has 'train', 'test'.")
    part = [every[i] for n, i in enumerate(order) if (n % 5 == 0) == (split == "test")]
    return [text for text, _ in part], [label for _, label in part], 2


def _hugging_face(source: str | Path, split: str) -> tuple[Any, Any, tuple[str, ...], bool]:
    splits = hugging_face_splits(source)
    if split not in splits:
        raise BadInput(f"{source} has no split {split!r}; it has {', '.join(map(repr, splits))}.")
    table = splits[split]
    column = next((name for name in COLUMNS if name in table.column_names), None)
    if column is None:
        raise BadInput(f"{source} holds no texts: its columns are {', '.join(table.column_names)}.")
    labels, classes = hugging_face_labels(table, source)
    return table[column], labels, classes, classes != UNLABELLED
