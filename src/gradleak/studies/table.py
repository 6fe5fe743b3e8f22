"""From finished cells to a table: one row per setting, means over samples and seeds with intervals, published figures beside."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gradleak.studies.statistics import summary
from gradleak.studies.study import Cell, Done, Row, Study


@dataclass(frozen=True)
class Table:
    """rows: of the cells that finished; failed: the others', with the reason as `note`; samples: one row per private sample and
    seed, with its setting; notes: what was not as asked; cost: CPU seconds, and those of parts, per row."""

    rows: list[Row]
    failed: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    cost: list[Row] = field(default_factory=list)

    def where(self, **values: Any) -> list[Row]:
        """The rows with these values."""
        return [row for row in self.rows if matches(row, values)]

    def sampled(self, column: str, **values: Any) -> list[Any]:
        """One column of the samples with these values."""
        return [row[column] for row in self.samples if matches(row, values) and row.get(column) is not None]

    def spent(self, column: str = "cpu_seconds", **values: Any) -> float:
        """Mean CPU seconds of the rows with these values."""
        found: list[float] = [row[column] for row in self.cost if matches(row, values) and row.get(column) is not None]
        return sum(found) / max(len(found), 1)

    @property
    def all(self) -> list[Row]:
        """Every row, with every column that one of them has."""
        return rectangular([*self.rows, *self.failed])


def matches(row: Row, values: Mapping[str, Any]) -> bool:
    """Whether the row has these values; a function says itself whether a value will do."""
    return all(v(row.get(k)) if callable(v) else row.get(k) == v for k, v in values.items())


def tabled(study: Study[Any], plan: Sequence[Cell[Any]], finished: Mapping[str, Done]) -> Table:
    """The cells of a plan that are finished, in the order of the plan."""
    groups: dict[tuple[Any, ...], tuple[Row, list[Done]]] = {}
    samples = list[Row]()
    for cell in plan:
        if (done := finished.get(cell.id)) is not None:
            whole = columns(cell.setting)
            row = {name: value for name, value in whole.items() if name not in study.over}
            groups.setdefault(tuple(row.values()), (row, []))[1].append(done)
            samples += [{**whole, "seed": cell.seed, **sample} for sample in done.samples]
    rows, failed, cost, notes = list[Row](), list[Row](), list[Row](), dict[str, None]()
    for row, cells in groups.values():
        good = [done for done in cells if not done.failed]
        lost = [done for done in cells if done.failed]
        note = {"note": reasons(lost, len(cells))} if lost else {}
        if good:
            rows.append({**row, **pooled([done.facts for done in good]), **averaged(good, study.unlisted), **note})
            published(study, rows[-1])
            cost.append({**row, "cells": len(good), **costs(good)})
        else:
            failed.append({**row, **note})
        notes |= dict.fromkeys(note for done in good for note in done.notes)
    return Table(rows, failed, rectangular(samples), tuple(notes), rectangular(cost))


def columns(setting: Any) -> Row:
    """A setting as columns: those that it names itself, or its fields."""
    if hasattr(setting, "columns"):
        return dict(setting.columns())
    return {f.name: word(getattr(setting, f.name)) for f in dataclasses.fields(setting) if f.repr}


def word(value: Any) -> Any:
    """A value of a setting, as a table shows it."""
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def pooled(facts: Sequence[Row]) -> Row:
    """Facts of one seed as they are; of several, means of numbers with intervals."""
    if len(facts) == 1:
        return dict(facts[0])
    merged: Row = {}
    for name in dict.fromkeys(key for fact in facts for key in fact):
        values = [fact.get(name) for fact in facts]
        if all(value == values[0] for value in values):
            merged[name] = values[0]
        elif all(isinstance(value, int | float | None) for value in values):
            merged |= summary(name, values)
        else:
            merged[name] = "; ".join(dict.fromkeys(str(value) for value in values))
    return merged


def averaged(cells: Sequence[Done], unlisted: Sequence[str]) -> Row:
    """Means over all samples of these cells; columns of text have none."""
    samples = [sample for done in cells for sample in done.samples]
    row: Row = {"samples": len(samples)} if samples else {}
    for name in dict.fromkeys(key for sample in samples for key in sample):
        values = [sample.get(name) for sample in samples]
        if name not in unlisted and all(isinstance(value, int | float | None) for value in values):
            row |= summary(name, values)
    return row


def published(study: Study[Any], row: Row) -> None:
    """Put what was published about such a row beside it."""
    for figure in study.published:
        if matches(row, figure.where) and figure.column in row:
            row |= {f"{figure.column}_published": figure.value, "citation": figure.citation}


def reasons(lost: Sequence[Done], count: int) -> str:
    """Why cells failed, as a sentence."""
    said = " ".join(dict.fromkeys(done.note for done in lost))
    return said if len(lost) == count else f"{len(lost)} of {count} cells failed: {said}"


def costs(cells: Sequence[Done]) -> Row:
    """Mean CPU seconds of a cell, and of its parts."""
    parts = [{"cpu_seconds": done.cpu_seconds, **done.cost} for done in cells]
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: round(sum(part.get(name, 0.0) for part in parts) / len(parts), 3) for name in names}


def rectangular(rows: Sequence[Row]) -> list[Row]:
    """The rows with every column that one of them has, None where there is nothing."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    return [{name: row.get(name) for name in names} for row in rows]


def as_csv(rows: Sequence[Row]) -> bytes:
    """Rows as CSV."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: Sequence[Row]) -> bytes:
    """Rows as parquet."""
    import pyarrow as pa
    from pyarrow import parquet

    names = list(rows[0]) if rows else []
    made = {name: column([row[name] for row in rows]) for name in names}
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(made), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def column(values: Sequence[Any]) -> Sequence[Any]:
    """One column of one type: text where kinds are mixed."""
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) <= 1 or kinds == {int, float}:
        return [float(v) if kinds == {int, float} and v is not None else v for v in values]
    return [None if value is None else str(value) for value in values]
