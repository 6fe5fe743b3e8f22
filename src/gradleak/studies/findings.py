"""What a recipe has found so far: it yields one of these after every piece of work, so that nothing finished is lost."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure

from gradleak.attacks.search.descend import OnStep
from gradleak.report.record import Plot

Size = Literal["smoke", "small", "paper"]  # seconds, to see that it runs; minutes to hours; as published
Start = Callable[[str], OnStep]  # opens a progress bar of that name
Row = dict[str, Any]


@dataclass(frozen=True)
class Findings:
    """table: flat rows, one per setting; sentence: what they say, in words."""

    table: list[Row]
    sentence: str
    plots: list[Plot] = field(default_factory=list)

    def after(self, opening: str) -> "Findings":
        """The same, its sentence behind an opening."""
        return replace(self, sentence=opening + self.sentence)


def opening(data: str, size: Size, *notes: str, used: str = "") -> str:
    """The first words of a sentence: the data and the size, unless it is paper size, and whatever is not as asked.

    used: the data set that was taken in place of `data`. notes: empty ones are left out.
    """
    swapped, reservations = used not in ("", data), "; ".join(dict.fromkeys(note for note in notes if note))
    if size == "paper" and not swapped and not reservations:
        return ""
    name = f"{name_of(used)} in place of {name_of(data)} data" if swapped else f"{name_of(data)} data"
    return f"{name}, {size} size{f' ({reservations})' if reservations else ''}: "


def name_of(data: str) -> str:
    """A data set in a word: the last part of a folder."""
    return Path(data).name


def shortage(what: str, wanted: int, there: int) -> str:
    """A note that there are fewer pictures, texts, ... than asked for, or nothing."""
    return f"{there:,} {what} in place of {wanted:,}" if there < wanted else ""


def rectangular(rows: Sequence[Row]) -> list[Row]:
    """The rows with every column that one of them has, None where there is nothing."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key) for key in columns} for row in rows]


def plot(title: str, figure: Figure) -> Plot:
    """A finished figure as a PNG data URI."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return {"title": title, "image": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()}


def interval(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean (Student's t); None below two values."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    deviation = (sum((v - mean) ** 2 for v in values) / (n - 1)) ** 0.5
    return float(t.ppf(0.975, n - 1) * deviation / n**0.5)
