"""What a study is: a question, settings, one cell, and what its table says.

A *cell* is one setting and one seed. It runs by itself, in any process, and its identity is a hash of everything that its result
depends on: start a study again, and only what is missing runs.
"""

import dataclasses
import hashlib
import math
import time
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import msgspec

from gradleak.errors import BadInput

S = TypeVar("S")
Size = Literal["smoke", "small", "paper"]  # seconds, to see that it runs; minutes to hours; as published
Row = dict[str, Any]
SIDE_BY_SIDE = 20  # cells
OnStep = Callable[[int, int, float], None]


def silent(step: int, steps: int, value: float) -> None:
    """Progress that nobody looks at."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where a cell runs: public and private data by name or folder, effort, device, seed, progress."""

    data: str = "embedded"
    size: Size = "small"
    device: str = "cpu"
    seed: int = 0
    on_step: OnStep = field(default=silent, compare=False, repr=False)


@dataclass(frozen=True)
class Result:
    """What a cell found.

    facts     columns of its row of the table
    samples   one row per private sample; the table has their means, with intervals
    pictures  {name: PNG}, kept beside it
    notes     what is not as asked, for the sentence: "12 unseen pictures in place of 50"
    cost      CPU seconds of parts, which differ from run to run and are therefore in no table
    """

    facts: Row = field(default_factory=dict)
    samples: list[Row] = field(default_factory=list)
    pictures: dict[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    cost: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """A published figure, to stand beside ours in the rows where these columns have these values."""

    where: Mapping[str, Any]
    column: str
    value: float
    citation: str


@dataclass(frozen=True, kw_only=True)
class Study(Generic[S]):
    """An experiment.

    question   what it asks, for a reader who knows no paper
    settings   (data, size) -> frozen dataclasses, one per cell and seed, in the order of the table
    cell       computes one
    together   settings with the same value are computed by one process, one after another: they share what is costly to prepare
    many       computes up to SIDE_BY_SIDE of those at once, or None
    over       fields of a setting that the table averages over
    unlisted   columns of samples that the table has no means of
    tell       what the finished rows say; it may be asked before all are there
    seeds      how many, unless another number is asked for
    beside     data sets that are used where they lie beside the given one
    depends    what else a setting's result depends on: functions and classes, files and folders
    anywhere   whether `Bench.device` may be other than the CPU
    """

    name: str
    question: str
    settings: Callable[[str, Size], Iterable[S]]
    cell: Callable[[S, Bench], Result]
    many: Callable[[Sequence[S], Bench], Iterable[Result]] | None = None
    together: Callable[[S], Hashable] | None = None
    over: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()
    tell: Callable[[Any], Any] | None = None
    published: tuple[Published, ...] = ()
    seeds: Callable[[Size], int] = lambda size: 1
    beside: tuple[str, ...] = ()
    depends: Callable[[S], tuple[Any, ...]] = lambda setting: ()
    anywhere: bool = False


@dataclass(frozen=True)
class Cell(Generic[S]):
    """One setting, one seed, and the hash of all that its result depends on."""

    id: str
    setting: S
    seed: int


@dataclass(frozen=True)
class Task:
    """Cells that one process computes, and how.

    left: the ids of those that are missing: what is computed side by side depends, in its last digits, on what is beside it, so
    that the same cells are always computed together, whichever are missing. revision: of the gradleak that made the task;
    another one refuses.
    """

    cells: tuple[Cell[Any], ...]
    left: tuple[str, ...]
    cell: Callable[..., Result]
    many: Callable[..., Iterable[Result]] | None
    bench: Bench
    revision: str
    threads: int = 1


class Done(msgspec.Struct, kw_only=True):
    """A finished cell, as its file holds it. note: the sentence of a cell that failed."""

    id: str
    study: str = ""
    setting: Any = None
    seed: int = 0
    failed: bool = False
    note: str = ""
    trace: str = ""
    facts: Row = {}
    samples: list[Row] = []
    notes: list[str] = []
    cost: dict[str, float] = {}
    seconds: float = 0.0  # on the clock
    cpu_seconds: float = 0.0
    pictures: dict[str, bytes] = {}  # files of their own on disk


class OtherVersion(BadInput):
    """A worker has another gradleak than the study."""


def plan(
    study: Study[S], bench: Bench, seeds: Iterable[int], revision: Callable[..., str], content: Callable[[Path], str]
) -> list[Cell[S]]:
    """Every cell, settings first. revision: of code, by functions and classes; content: the hash of a file, folder or data set."""
    cells, seeds = list[Cell[S]](), list(seeds)
    places = [Path(bench.data), *(Path(bench.data).parent / name for name in study.beside)]
    inputs = {place.name: content(place) for place in places}
    for setting in study.settings(bench.data, bench.size):
        more = study.depends(setting)
        files = {str(path): content(path) for path in more if isinstance(path, Path)}
        used = revision(study.cell, study.many, *(thing for thing in more if not isinstance(thing, Path)))
        for seed in seeds:
            depends = [study.name, bench.size, plain(setting), seed, used, inputs | files]
            digest = hashlib.sha256(msgspec.json.encode(depends, order="sorted")).hexdigest()
            cells.append(Cell(digest[:24], setting, seed))
    if twice := len(cells) - len({cell.id for cell in cells}):
        raise BadInput(f"The study {study.name} has {twice} cells twice: two settings are equal.")
    return cells


def plain(value: Any) -> Any:
    """A setting as JSON, names of its classes included."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def tasks(
    study: Study[S], cells: Sequence[Cell[S]], missing: Iterable[str], bench: Bench, revision: str, threads: int = 1
) -> list[Task]:
    """The missing ones of all cells in parcels for a process each; those of one seed with equal `together` stay in one."""
    parcels: dict[Hashable, list[Cell[S]]] = {}
    for cell in cells:
        key = cell.id if study.together is None else (study.together(cell.setting), cell.seed)
        parcels.setdefault(key, []).append(cell)
    made, wanted = list[Task](), set(missing)
    for parcel in parcels.values():
        most = len(parcel) if study.many is None else SIDE_BY_SIDE
        for some in (tuple(parcel[first : first + most]) for first in range(0, len(parcel), most)):
            if left := tuple(cell.id for cell in some if cell.id in wanted):
                own = dataclasses.replace(bench, seed=some[0].seed)
                made.append(Task(some, left, study.cell, study.many, own, revision, threads))
    return made


def performed(task: Task, on_step: OnStep | None = None) -> Iterator[Done]:
    """Compute what is left of a task, a cell at a time. What goes wrong in a cell is its result."""
    bench = task.bench if on_step is None else dataclasses.replace(task.bench, on_step=on_step)
    found: list[Done] = []
    if task.many is not None:
        clock = Clock(len(task.cells))
        try:
            results = list(task.many([cell.setting for cell in task.cells], bench))
            found = [done(cell, result, clock) for cell, result in zip(task.cells, results, strict=True)]
        except Exception:  # noqa: BLE001 (one of them is at fault: it shows when they are computed one by one)
            found = []
    yield from (one for one in found if one.id in task.left)
    for cell in task.cells if not found else ():
        if cell.id in task.left:
            yield computed(task, cell, bench)


def computed(task: Task, cell: Cell[Any], bench: Bench) -> Done:
    """One cell by itself."""
    clock = Clock()
    try:
        return done(cell, task.cell(cell.setting, bench), clock)
    except Exception as error:  # noqa: BLE001 (whatever a study does wrong is the result of one cell)
        return failure(cell, error, clock)


def without(task: Task, cell: str) -> Task:
    """The task when this cell is there."""
    return dataclasses.replace(task, left=tuple(one for one in task.left if one != cell))


class Clock:
    """Seconds since the last reading; of several cells side by side each gets its share."""

    def __init__(self, side_by_side: int = 1) -> None:
        self.share = side_by_side
        self.began = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """The seconds of one cell: on the clock, and of the CPU."""
        wall, cpu = time.perf_counter() - self.began[0], time.process_time() - self.began[1]
        return wall / self.share, cpu / self.share


def done(cell: Cell[Any], result: Result, clock: Clock) -> Done:
    """The file of a cell that has a result."""
    seconds, cpu_seconds = clock.read()
    return Done(
        id=cell.id,
        setting=plain(cell.setting),
        seed=cell.seed,
        facts=finite(result.facts),
        samples=finite(result.samples),
        notes=[note for note in result.notes if note],
        cost=result.cost,
        pictures=result.pictures,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
    )


def failure(cell: Cell[Any], error: BaseException | str, clock: Clock | None = None) -> Done:
    """The file of a cell that has none, with the reason as a sentence."""
    said, trace = str(error), ""
    if isinstance(error, BaseException) and not isinstance(error, BadInput):
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        trace = "".join(traceback.format_exception(error))
    seconds, cpu_seconds = (0.0, 0.0) if clock is None else clock.read()
    return Done(
        id=cell.id,
        setting=plain(cell.setting),
        seed=cell.seed,
        failed=True,
        note=said,
        trace=trace,
        seconds=seconds,
        cpu_seconds=cpu_seconds,
    )


def finite(value: Any) -> Any:
    """As JSON will give it back: numbers that are none become None, tuples lists."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def path_in(folder: Path, name: str, cell: str) -> Path:
    """Where a picture of a cell lies."""
    return folder / f"{cell}-{name}.png"
