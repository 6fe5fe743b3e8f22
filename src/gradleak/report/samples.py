"""What came out of an attack, sample by sample: pictures and texts beside the truth, what is said of each, class labels."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from gradleak.report.numbers import Legend, at
from gradleak.report.record import Result

PICTURE = re.compile(r"data:image/png;base64,[A-Za-z0-9+/=]+")


class Cell(NamedTuple):
    """A picture (a safe URI, or None with a note in its place) or a text, the scores beneath it, and a picture in words."""

    uri: str | None
    text: str
    captions: list[str]
    words: str


class Sample(NamedTuple):
    """One private sample: truth, reconstruction and controls, and (level, words) for each thing to be said of it."""

    number: int
    label: str
    cells: list[Cell]
    marks: list[tuple[str, str]]


def sample(row: Result, index: int, series: Sequence[str], level: str, legend: Legend) -> Sample:
    """One of a row's; level: of the verdict, series: the columns."""
    label = at(row.get("labels", {}).get("true", []), index)
    said = marks(row, index, level)
    called = "" if label is None else f"class {label}"
    return Sample(index + 1, called, [cell(row, name, index, legend, said) for name in series], said)


def cell(row: Result, name: str, index: int, legend: Legend, said: Sequence[tuple[str, str]]) -> Cell:
    """One column of a sample; said: its marks, which belong to the reconstruction."""
    value = at(row.get("shown", {})[name], index)
    scores = row["scores"] if name == "reconstruction" else row["controls"].get(name, {})
    captions = [legend.caption(key, at(scores[key], index)) for key in legend.measured(row) if key in scores]
    if row.get("media") != "image/png":
        return Cell(None, value or "", captions[:1], "")
    uri = safe(value)
    note = "" if uri else "no picture" if value is None else "left out: not an embedded PNG"
    own = [words.lower() for _, words in said] if name == "reconstruction" else []
    captions = captions if name != "truth" else []
    return Cell(uri, note, captions, ", ".join([f"{legend.label(name)}, image {index + 1}", *own, *captions[:2]]))


def marks(row: Result, index: int, level: str) -> list[tuple[str, str]]:
    """(level, words): whether a sample is proven, and what the truth says of it. Where all is void, only a proof stands."""
    proven, recovered = at(row.get("proven", []), index), at(row.get("recovered", []), index)
    proof = [("recovered", "Proven")] if proven else []
    if recovered is None:
        return proof or ([("unscored", "Not proven")] if proven is False else [])
    if level == "void":
        return proof or [("void", "Void")]
    if recovered:
        return [*proof, ("recovered", "Recovered" if row.get("media") == "image/png" else "Recovered word for word")]
    return [
        *proof,
        ("partial", "Recognisable" if row.get("media") == "image/png" else "Recovered in part")
        if at(row.get("partly", []), index)
        else ("unscored", "Not recovered"),
    ]


def labels(row: Result, given: bool) -> str:
    """A sentence on the class labels, or nothing. "Class 0", since "recovered 0" would say that none was."""
    labels = row.get("labels")
    if not labels or not labels["recovered"]:
        return ""
    recovered = classes(labels["recovered"])
    if given:
        return f"The attacker was given {recovered}."
    if "true" not in labels:
        return f"Recovered {recovered}."
    right, total = (Counter(labels["recovered"]) & Counter(labels["true"])).total(), len(labels["true"])
    order = ", in whatever order" if total > 1 else ""
    return f"Recovered {recovered}; true {classes(labels['true'])}: {right} of {total} right{order}."


def classes(labels: Sequence[int | str]) -> str:
    return f"class{'es' if len(labels) > 1 else ''} {', '.join(map(str, labels))}"


def safe(uri: str | None) -> str | None:
    """The URI of an embedded PNG, or None: nothing else may stand in an image's source."""
    return uri if uri is not None and PICTURE.fullmatch(uri) else None
