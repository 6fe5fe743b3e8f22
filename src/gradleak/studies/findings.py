"""What a study tells: a sentence and figures. And how sentences about data and sizes begin."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gradleak.studies.study import Size

if TYPE_CHECKING:  # processes that compute cells draw nothing
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Findings:
    """sentence: what the table says, in words; plots: {title: figure}."""

    sentence: str
    plots: "dict[str, Figure]" = field(default_factory=dict)


def opening(data: str, size: Size, notes: Iterable[str] = ()) -> str:
    """The first words of a sentence: the data and the size, unless it is paper size, and whatever is not as asked."""
    reservations = "; ".join(dict.fromkeys(note for note in notes if note))
    if size == "paper" and not reservations:
        return ""
    return f"{name_of(data)} data, {size} size{f' ({reservations})' if reservations else ''}: "


def name_of(data: str) -> str:
    """A data set in a word: the last part of a folder."""
    return Path(data).name


def stands_in(used: str, data: str) -> str:
    """A note that another data set was taken, or nothing."""
    return f"{name_of(used)} in place of {name_of(data)} data" if used != data else ""


def shortage(what: str, wanted: int, there: int) -> str:
    """A note that there are fewer pictures, texts, ... than asked for, or nothing."""
    return f"{there:,} {what} in place of {wanted:,}" if there < wanted else ""
