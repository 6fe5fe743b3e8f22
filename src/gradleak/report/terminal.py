"""A record as a terminal shows it: a row for each attack that ran, the verdict last, where the eye is."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from gradleak.report.numbers import Legend, glance
from gradleak.report.record import Record, Result, Verdict
from gradleak.report.risk import risk
from gradleak.report.summary import in_words
from gradleak.report.words import LEVELS

WIDTH = 120  # columns, where no terminal says how many
NAME = 24  # columns of an attack's name that are not folded
LEFT_OUT = ("Flags",)  # columns that the page has besides


class Shown:
    """A record for `rich`: `console.print(Shown(record))`."""

    def __init__(self, record: Record) -> None:
        self.record = record

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from tables(self.record)
        yield Text("\n".join([*risk_line(self.record), verdict(self.record)]))


def tables(record: Record) -> Iterator[RenderableType]:
    """A table for each observation, and what did not run."""
    levels = {verdict.get("observation", ""): verdict["level"] for verdict in record.get("verdicts", [])}
    names = list(dict.fromkeys(str(row["observation"].get("name", "")) for row in record["results"]))
    legend = Legend(record.get("metrics", {}), record.get("controls", {}))
    for name in names:
        rows = [row for row in record["results"] if row["observation"].get("name", "") == name]
        ran = [row for row in rows if row.get("ran", row["residual"] is not None)]
        if ran:
            yield table(name if len(names) > 1 else "attack", ran, legend, levels.get(name, record["verdict"]["level"]))
        rest = [row for row in rows if row not in ran]
        if rest and ran:
            yield Text(f"Not run: {', '.join(row['attack'] for row in rest)}.")
        else:
            yield from (Text(f"{row['attack']}: {row['status']}") for row in rest)


def risk_line(record: Record) -> list[str]:
    """The risk, where something was audited."""
    found = risk(record)
    return [] if found is None else [f"Risk of sharing it: {found.label} ({found.why})."]


def verdict(record: Record) -> str:
    """Its title and its sentences, in one line; of several observations a line each."""
    several = record.get("verdicts", [])
    if len(several) > 1:
        return "\n".join(f"{one.get('observation', '')}: {line(one)}" for one in several)
    return line(record["verdict"])


def line(verdict: Verdict) -> str:
    """A verdict in one line."""
    return " ".join([f"{LEVELS[verdict['level']]}.", *in_words(verdict).splitlines()])


def table(title: str, ran: list[Result], legend: Legend, level: str) -> Table:
    """`glance`, with the attacks' names before it."""
    told = glance(ran, legend, level)
    made = Table(box=None, pad_edge=False, header_style="bold")
    whole = all(len(row["attack"]) <= NAME for row in ran)
    made.add_column(Text(title), overflow="fold", no_wrap=whole)
    kept = [number for number, (head, _) in enumerate(told.heads) if head not in LEFT_OUT]
    for number in kept:
        head, is_number = told.heads[number]
        words = max(map(len, head.split()))  # heads break between words alone
        short = not any(" " in text for text in (head, *(cells[number] for cells in told.rows)))
        about: Any = {"min_width": words, "no_wrap": short}
        made.add_column(Text(head), justify="right" if is_number else "left", overflow="fold", **about)
    for row, cells in zip(ran, told.rows, strict=True):
        made.add_row(Text(row["attack"]), *(Text(cells[number]) for number in kept))
    return made


def text(record: Record, width: int = WIDTH) -> str:
    """The same as plain text; the verdict is one line, however long."""
    console = Console(width=width, no_color=True, force_terminal=False, legacy_windows=False)
    with console.capture() as caught:
        console.print(*tables(record), sep="\n", crop=False)  # a long line loses nothing
    lines = [line.rstrip() for line in caught.get().splitlines() if line.strip()]
    return "\n".join([*lines, *risk_line(record), verdict(record)])
