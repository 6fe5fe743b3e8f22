"""Run a study: plan the cells, compute those that are missing, keep each as it finishes, write what they say.

    table = run(STUDY, Path("results"), data="digits", workers=2)

Start it again, after Ctrl-C or a crash, with another seed or setting: what is finished is not computed again.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gradleak.errors import BadInput
from gradleak.report import html, record
from gradleak.studies import executors
from gradleak.studies.findings import Findings, opening
from gradleak.studies.plots import data_uri, in_words, pdf, png
from gradleak.studies.results import SCHEMA, Owner, Results, write
from gradleak.studies.revision import revision, whole
from gradleak.studies.study import Bench, Cell, Done, OnStep, Row, Size, Study, plan, tasks
from gradleak.studies.table import Table, as_csv, as_parquet, columns, rectangular, tabled

EVERY = 10.0  # seconds between two writings of the tables, at least
PAUSE = 20  # times the seconds that the last writing took, at least
IN_WHEELS = ("embedded", "digits")  # data sets that come with packages


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run of a study comes to. where: here, ray, or ray://host:port; workers: processes, if it is
    here; seeds: as many as the study has, from 0 on, unless they are given."""

    study: Study[Any]
    out: Path
    data: str = "embedded"
    size: Size = "small"
    seeds: Sequence[int] | None = None
    device: str = "cpu"
    where: str = "here"
    workers: int = 1
    threads: int = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        """Raises BadInput for what cannot be."""
        if self.where != "here" and self.where.partition(":")[0] != "ray":
            raise BadInput(f"--where is here, ray or ray://host:port, not {self.where!r}.")
        if self.workers < 1 or (self.workers > 1 and self.where != "here"):
            raise BadInput("--workers is a number of processes of this machine; Ray has its own.")
        if self.device != "cpu" and not self.study.anywhere:
            raise BadInput(f"{self.study.name} computes on the CPU only: leave --device out.")

    @property
    def bench(self) -> Bench:
        """What is equal for all cells."""
        return Bench(data=self.data, size=self.size, device=self.device)

    def results(self) -> Results:
        """The folder; BadInput where it is another study's."""
        return Results(self.out, Owner(schema=SCHEMA, study=self.study.name, data=self.data, size=self.size))

    def cells(self) -> list[Cell[Any]]:
        """All of them; BadInput for a study without one."""
        seeds = range(self.study.seeds(self.size)) if self.seeds is None else self.seeds
        if not (cells := plan(self.study, self.bench, seeds, revision, content_hash)):
            raise BadInput(f"The study {self.study.name} has no cells.")
        return cells

    def executed(
        self, cells: Sequence[Cell[Any]], missing: Iterable[str], on_step: OnStep | None = None
    ) -> Iterator[Done]:
        """The missing ones of all cells, as they finish."""
        work = tasks(self.study, cells, missing, self.bench, whole(), self.threads)
        if self.where != "here":
            return executors.on_ray(work, None if self.where == "ray" else self.where, self.gpus)
        return executors.processes(work, self.workers) if self.workers > 1 else executors.here(work, on_step)


def run(
    chosen: Plan,
    *,
    limit: int | None = None,
    retry: bool = False,
    command: record.Command | None = None,
    start: Callable[[str], OnStep] | None = None,
) -> Table:
    """Compute the missing cells, at most `limit` of them; with retry those again that failed.

    Raises BadInput for a folder of something else, a setting that cannot be, a worker with another gradleak; OSError for a full disk.
    """
    results, cells = chosen.results(), chosen.cells()
    finished = results.finished(cell.id for cell in cells)
    missing = [c.id for c in cells if c.id not in finished or (retry and finished[c.id].failed)]
    written = Writer(chosen, cells, command)
    bar = start(chosen.study.name) if start is not None else None
    inner = start("cell") if start is not None and chosen.where == "here" and chosen.workers == 1 else None
    try:
        for done in chosen.executed(cells, missing[:limit], inner):
            done.study = chosen.study.name
            results.keep(done)
            finished[done.id] = done
            if bar is not None:
                bar(len(finished), len(cells), done.cpu_seconds)
            written.now_and_then(finished)
    finally:
        table = written.all(finished)
    return table


class Writer:
    """Writes what finished cells say."""

    def __init__(self, chosen: Plan, cells: list[Cell[Any]], command: record.Command | None) -> None:
        """command: as the record tells it."""
        self.chosen, self.cells, self.next = chosen, cells, time.monotonic() + EVERY
        about: record.Command = command or {"name": "study", "arguments": {"name": chosen.study.name}}
        self.record = record.new_record(about, None if chosen.seeds is None else min(chosen.seeds), [])

    def now_and_then(self, finished: dict[str, Done]) -> None:
        """All, where it has not been written for a while."""
        if (began := time.monotonic()) > self.next:
            self.all(finished)
            ended = time.monotonic()
            self.next = ended + max(EVERY, PAUSE * (ended - began))

    def all(self, finished: dict[str, Done]) -> Table:
        """Tables, figures, record and report."""
        chosen, out, study = self.chosen, self.chosen.out, self.chosen.study
        table = tabled(study, self.cells, finished)
        told = findings(chosen, table)
        write(out / "table.csv", as_csv(table.all))
        write(out / "samples.csv", as_csv(table.samples))
        write(out / "samples.parquet", as_parquet(table.samples))
        write(out / "cells.csv", as_csv(listing(self.cells, finished)))
        images = {title: png(figure) for title, figure in told.plots.items()}
        for number, (title, figure) in enumerate(told.plots.items()):
            write(out / f"plot-{number}.png", images[title])
            write(out / f"plot-{number}.pdf", pdf(figure))
        self.record["table"], self.record["costs"] = table.all, table.cost
        self.record["plots"] = [
            {"title": title, "image": data_uri(images[title]), "words": in_words(title, figure)}
            for title, figure in told.plots.items()
        ]
        self.record["verdict"] = {"level": "unscored", "sentence": told.sentence}
        record.write(self.record, out / "record.json")
        write(out / "report.html", html.render(self.record).encode())
        return table


def findings(chosen: Plan, table: Table) -> Findings:
    """What the study tells of its table, behind what has to be said of any: data, size, cells that are missing or failed."""
    study = chosen.study
    told = study.tell(table) if study.tell is not None and table.rows else Findings("")
    if not table.rows and not table.failed:
        told = Findings("Nothing has been computed yet.")
    sentence = told.sentence
    if table.failed:
        said = dict.fromkeys(row["note"].rstrip(".") for row in table.failed)
        sentence += f" {len(table.failed)} rows could not be had: {'; '.join(said)}."
    return Findings(opening(chosen.data, chosen.size, table.notes) + sentence.strip(), told.plots)


def listing(cells: Sequence[Cell[Any]], finished: dict[str, Done]) -> list[Row]:
    """One row per cell: its file, setting and seed, whether it is finished, and what it cost."""
    rows = []
    for cell in cells:
        done = finished.get(cell.id)
        state = "missing" if done is None else "failed" if done.failed else "finished"
        row = {"cell": cell.id, **columns(cell.setting), "seed": cell.seed}
        row |= {"state": state, "seconds": None, "cpu_seconds": None, "note": ""}
        if done is not None:
            row |= {"seconds": round(done.seconds, 4), "cpu_seconds": round(done.cpu_seconds, 4), "note": done.note}
        rows.append(row)
    return rectangular(rows)


def estimate(chosen: Plan) -> tuple[list[Row], float]:
    """The cells as `listing` has them, and the CPU seconds that the missing ones will take. Where nothing is finished yet, the first
    cell is computed, with those beside it, and kept, to measure it."""
    results, cells = chosen.results(), chosen.cells()
    finished = results.finished(cell.id for cell in cells)
    if not finished:
        work = tasks(chosen.study, cells, [cell.id for cell in cells], chosen.bench, whole(), chosen.threads)
        for done in executors.here(work[:1]):
            done.study = chosen.study.name
            results.keep(done)
            finished[done.id] = done
    mean = sum(done.cpu_seconds for done in finished.values()) / len(finished)
    return listing(cells, finished), mean * (len(cells) - len(finished))


@cache
def content_hash(place: Path) -> str:
    """SHA-256 of a file, or of the files in a folder; of other data sets their name."""
    if str(place) in IN_WHEELS or not place.exists():
        return str(place)
    digest = hashlib.sha256()
    for file in [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file()):
        with file.open("rb") as opened:
            name = file.relative_to(place).as_posix()
            digest.update(f"{name}\0".encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
