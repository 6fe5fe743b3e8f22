"""The engine of studies: what is finished is never computed again nor lost, whatever happens, and the table does not depend on it."""

import importlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import toy_study
from gradleak.audit.intervals import share as share_interval
from gradleak.errors import BadInput
from gradleak.studies import executors
from gradleak.studies.results import Results
from gradleak.studies.revision import revision, whole
from gradleak.studies.run import Plan, estimate, run
from gradleak.studies.statistics import mean_interval, summary
from gradleak.studies.study import OtherVersion, Published, Study, tasks
from gradleak.studies.table import Table
from toy_study import Setting, toy

TABLES = ("table.csv", "samples.csv", "samples.parquet")


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


def computed(marks: Path) -> int:
    return len([mark for mark in marks.iterdir() if mark.name != "mended"])


def planned(out: Path, settings: list[Setting], more: dict[str, Any] | None = None, **options: Any) -> Plan:
    return Plan(study=toy(settings, **(more or {})), out=out, **options)


def test_a_table_has_means_with_intervals_and_everything_is_on_disk(tmp_path: Path) -> None:
    figure = Published({"number": 3}, "square", 10.0, "Nobody (2026)")
    table = run(planned(tmp_path / "out", [Setting(3), Setting(5)], {"published": (figure,)}))
    first, second = table.rows
    assert (first["number"], first["square"], first["samples"]) == (3, 9, 4)
    assert (first["value"], first["hit"]) == (4.5, 0.5)
    assert (first["hit_low"], first["hit_high"]) == share_interval(2, 4)
    assert 3 <= first["value_low"] < 4.5 < first["value_high"] <= 6
    assert (first["square_published"], first["citation"]) == (10.0, "Nobody (2026)")
    assert second.get("citation") is None
    assert not {"cpu_seconds", "half"} & set(first)  # times differ from run to run
    assert table.spent("half", number=3) == 0.5
    out = tmp_path / "out"
    assert all((out / name).stat().st_size for name in (*TABLES, "cells.csv", "record.json", "report.html"))
    assert len(list((out / "cells").glob("*.json"))) == len(list((out / "cells").glob("*-dot.png"))) == 2
    assert "embedded data, small size (a note): 2 rows." in (out / "report.html").read_text()
    assert len((out / "samples.csv").read_text().splitlines()) == 1 + 2 * 4


def test_what_is_finished_is_not_computed_again_and_more_seeds_and_settings_add_cells(
    tmp_path: Path, marks: Path
) -> None:
    settings, out = [Setting(n, str(marks)) for n in range(5)], tmp_path / "out"
    assert len(run(planned(out, settings), limit=3).rows) == computed(marks) == 3
    whole_table = run(planned(out, settings))
    assert computed(marks) == 5
    assert run(planned(out, settings)).rows == whole_table.rows
    run(planned(out, [*settings, Setting(7, str(marks))]))
    assert computed(marks) == 6
    table = run(planned(out, settings, seeds=(0, 1)))
    assert computed(marks) == 11
    assert [row["samples"] for row in table.rows] == [8] * 5
    assert table.rows[0]["seed_is"] == 0.5  # facts are averaged over seeds too
    assert len(run(planned(out, settings[:2])).rows) == 2  # the table is that of what was asked for


def test_a_cell_that_fails_is_a_row_and_is_computed_again_on_request_only(tmp_path: Path, marks: Path) -> None:
    settings, out = [Setting(1), Setting(2, str(marks), "fail")], tmp_path / "out"
    table = run(planned(out, settings))
    assert [row["note"] for row in table.failed] == ["ValueError: 2 is no good"]
    assert "1 rows could not be had: ValueError: 2 is no good." in (out / "report.html").read_text()
    (marks / "mended").touch()
    assert run(planned(out, settings)).failed
    assert not run(planned(out, settings), retry=True).failed
    assert computed(marks) == 2


def test_some_seeds_of_a_row_may_fail(tmp_path: Path, marks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unlucky(setting: Setting, bench: Any) -> Any:
        if bench.seed == 1:
            raise BadInput("An unlucky seed.")
        return toy_study.cell(setting, bench)

    study = replace(toy([Setting(1)]), cell=unlucky)
    [row] = run(Plan(study=study, out=tmp_path / "out", seeds=(0, 1))).rows
    assert row["note"] == "1 of 2 cells failed: An unlucky seed."
    assert row["square"] == 1


def test_what_is_side_by_side_stays_side_by_side(tmp_path: Path) -> None:
    """Whichever of them are missing: their last digits depend on each other."""
    settings, out = [Setting(n) for n in range(25)], tmp_path / "out"
    more = {"many": toy_study.many, "together": lambda setting: 0}
    first = run(planned(out, settings, more))
    assert first.rows[0]["beside"] == " ".join(map(str, range(20)))
    for cell in list((out / "cells").glob("*.json"))[::2]:
        cell.unlink()
    assert run(planned(out, settings, more)).rows == first.rows
    failing = [*settings[:3], Setting(3, does="fail"), *settings[4:]]
    table = run(planned(tmp_path / "other", failing, more))
    assert [row["number"] for row in table.failed] == [3]  # it alone, not all that were beside it
    assert len(table.rows) == 24


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_random_moments_nothing_is_lost(tmp_path: Path, workers: int) -> None:
    """Each cell takes 5 ms and a kill falls anywhere: also into the writing of a cell or a table."""
    moments, finished = random.Random(workers), set[str]()
    for name in ("calm", "killed"):
        (tmp_path / f"marks of {name}").mkdir()

    def started(name: str) -> subprocess.Popen[bytes]:
        arguments = [str(tmp_path / name), str(tmp_path / "marks of"), str(workers)]
        return subprocess.Popen([sys.executable, toy_study.__file__, *arguments], env={**os.environ})

    (tmp_path / "marks of").mkdir()
    cells = tmp_path / "killed" / "cells"
    for _ in range(4 // workers):  # each start is a process, and each worker another
        process, began = started("killed"), len(finished)
        deadline = time.monotonic() + 60
        while len(list(cells.glob("*.json")) if cells.is_dir() else []) <= began and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1 * moments.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = {file.name for file in cells.glob("*.json")}
        assert finished <= now
        finished = now
    assert 0 < len(finished) < 200
    times = {name: (cells / name).stat().st_mtime_ns for name in finished}
    assert started("killed").wait() == 0
    assert {name: (cells / name).stat().st_mtime_ns for name in finished} == times
    assert started("calm").wait() == 0
    for name in TABLES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()


def test_processes_give_the_same_table_and_survive_a_death(tmp_path: Path, marks: Path) -> None:
    settings = [Setting(n, str(marks), {4: "die once", 6: "die"}.get(n, "")) for n in range(8)]
    table = run(planned(tmp_path / "two", settings, workers=2))
    assert [row["note"] for row in table.failed] == [executors.DIED.format(2)]
    assert [row["number"] for row in table.rows] == [0, 1, 2, 3, 4, 5, 7]
    alive = [replace(setting, does="") for setting in settings]
    shown = [{**row, "does": ""} for row in table.rows]
    assert shown == [row for row in run(planned(tmp_path / "one", alive)).rows if row["number"] != 6]


def test_a_worker_with_another_version_is_refused() -> None:
    study, other = toy([Setting(1)]), "another"
    plan = Plan(study=study, out=Path("unused"))
    [task] = tasks(study, cells := plan.cells(), [cells[0].id], plan.bench, other)
    with pytest.raises(OtherVersion, match=f"has gradleak {whole()}, and the study {other}"):
        executors.whole_task(task)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the kernel stops the write in the middle, in the same way."""
    run(planned(tmp_path / "out", [Setting(1)]))
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            run(planned(tmp_path / "out", [Setting(1), Setting(2)]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    after = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    small = {file for file in after if file not in before}
    assert all(after[file] == content for file, content in before.items())
    assert all(file.name.endswith("-dot.png") for file in small)  # three bytes: whole


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(planned(out, [Setting(1)]))
    with pytest.raises(BadInput, match=r"holds results of the study toy on embedded, small size.*choose another --out"):
        run(replace(planned(out, [Setting(1)]), size="paper"))
    with pytest.raises(BadInput, match="holds results of the study toy"):
        run(Plan(study=replace(toy([Setting(1)]), name="another"), out=out))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(BadInput, match="holds other results already"):
        run(planned(tmp_path / "full", [Setting(1)]))
    (out / "study.json").write_text("{}")
    with pytest.raises(BadInput, match="is damaged"):
        run(planned(out, [Setting(1)]))


def test_a_damaged_cell_is_computed_again(tmp_path: Path, marks: Path) -> None:
    out = tmp_path / "out"
    run(planned(out, [Setting(1, str(marks))]))
    [cell] = (out / "cells").glob("*.json")
    cell.write_text("{")
    assert len(run(planned(out, [Setting(1, str(marks))])).rows) == 1
    assert computed(marks) == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"where": "there"}, "--where is here, ray or ray://host:port"),
        ({"workers": 0}, "--workers is a number of processes"),
        ({"workers": 2, "where": "ray"}, "Ray has its own"),
        ({"device": "cuda"}, "toy computes on the CPU only"),
    ],
)
def test_plans_that_cannot_be(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        planned(Path("unused"), [Setting(1)], **options)


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_where_no_cluster_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    for name in ("INITIAL_TIMEOUT_SEC", "MAX_TIMEOUT_SEC"):
        monkeypatch.setattr(f"ray.util.client.worker.{name}", 0.1)
    plan = Plan(study=toy([Setting(1)]), out=tmp_path / "out", where="ray://127.0.0.1:1")
    with pytest.raises(BadInput, match=r"There is no Ray cluster at ray://127\.0\.0\.1:1"):
        run(plan)


def test_equal_settings_are_refused_and_so_are_none() -> None:
    with pytest.raises(BadInput, match="1 cells twice"):
        planned(Path("unused"), [Setting(1), Setting(1)]).cells()
    with pytest.raises(BadInput, match="no cells"):
        planned(Path("unused"), []).cells()


def test_an_estimate_measures_the_first_cell_and_keeps_it(tmp_path: Path, marks: Path) -> None:
    plan = planned(tmp_path / "out", [Setting(n, str(marks)) for n in range(4)])
    cells, seconds = estimate(plan)
    assert [row["state"] for row in cells] == ["finished", "missing", "missing", "missing"]
    assert seconds == pytest.approx(3 * Results.finished(plan.results())[cells[0]["cell"]].cpu_seconds)
    run(plan)
    assert computed(marks) == 4


def test_an_estimate_keeps_side_by_side_what_is_computed_so(tmp_path: Path) -> None:
    """Or the cell that was measured would have other last digits than in a run without an estimate."""
    settings, more = [Setting(n) for n in range(25)], {"many": toy_study.many, "together": lambda setting: 0}
    cells, _ = estimate(planned(tmp_path / "estimated", settings, more))
    assert sum(row["state"] == "finished" for row in cells) == 20
    estimated, at_once = (run(planned(tmp_path / name, settings, more)) for name in ("estimated", "at once"))
    assert estimated.rows == at_once.rows


# --- What a cell uses ---

MODULE = """
import math
from gradleak.observations import distances

LIMIT = 3

def helper(x):
    '''Help.'''
    return x + LIMIT

def cell(setting, bench):
    return helper(setting)

def tell(table):
    return "words"
"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ('"words"', '"other words"', True),
        ("'''Help.'''", "'''Help, in other words.'''", True),
        ("import math", "import math  # and a comment", True),
        ("LIMIT = 3", "LIMIT = 4", False),
        ("x + LIMIT", "x - LIMIT", False),
        ("helper(setting)", "helper(bench)", False),
    ],
)
def test_finished_cells_stay_valid_until_what_they_use_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, same: bool
) -> None:
    revisions = []
    for number, text in enumerate((MODULE, MODULE.replace(old, new))):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "own_study.py").write_text(text)
        with monkeypatch.context() as patched:
            patched.syspath_prepend(folder)
            patched.delitem(sys.modules, "own_study", raising=False)
            from gradleak.studies import revision as module

            module.definitions.cache_clear()
            module.every.cache_clear()
            revisions.append(revision(importlib.import_module("own_study").cell))
    monkeypatch.delitem(sys.modules, "own_study", raising=False)
    assert (revisions[0] == revisions[1]) is same


def test_what_a_study_uses_reaches_into_the_package_and_no_further() -> None:
    """Through imports within functions, through classes and through names in strings."""
    from gradleak.attacks.dlg import DLG
    from gradleak.attacks.weights.kkt import KKT
    from gradleak.studies.revision import definitions, mentions

    assert revision(DLG) != revision(KKT)
    [statement] = definitions("gradleak.victims")["VICTIMS"]
    assert ("gradleak.victims.play", "CaptureGradient") in mentions(statement, "gradleak.victims")


# --- Statistics ---


def test_intervals() -> None:
    """All of five hit: the lower end p of Clopper and Pearson has p^5 = .025. Of equal values the mean is certain."""
    assert share_interval(5, 5) == pytest.approx((0.025**0.2, 1.0))
    assert share_interval(0, 5) == pytest.approx((0.0, 1 - 0.025**0.2))
    assert mean_interval([1.0]) is None
    assert mean_interval([2.0] * 9) == (2.0, 2.0)
    assert summary("x", [None, None]) == {"x": None}
    assert summary("x", [True, None]) == {"x": 1.0, "x_low": pytest.approx(0.025), "x_high": 1.0}


def test_the_bootstrap_covers_the_mean() -> None:
    """Of 200 samples of 40 from an exponential, nominally 95 % of the intervals hold the mean 1, less for so skewed a law; below
    85 % would be seven standard deviations of the count away."""
    draws = random.Random(0)
    held = 0
    for _ in range(200):
        interval = mean_interval([draws.expovariate(1.0) for _ in range(40)])
        assert interval is not None
        held += interval[0] <= 1 <= interval[1]
    assert 0.85 <= held / 200 <= 1


def test_rows_are_found() -> None:
    table = Table([{"a": 1, "b": None}, {"a": 2, "b": 5}], samples=[{"a": 1, "v": 0.5}, {"a": 1, "v": None}])
    assert table.where(a=2) == [{"a": 2, "b": 5}]
    assert table.where(a=lambda a: a > 0, b=None) == [{"a": 1, "b": None}]
    assert table.sampled("v", a=1) == [0.5]
    assert table.spent() == 0


def test_the_identity_of_a_cell(tmp_path: Path) -> None:
    """Another setting, seed, size, study or data set is another cell; the order of settings is not part of it."""

    def ids(study: Study[Setting], **more: Any) -> list[str]:
        return [cell.id for cell in Plan(study=study, out=tmp_path, **more).cells()]

    one, two = ids(toy([Setting(1), Setting(2)]))
    assert [two, one] == ids(toy([Setting(2), Setting(1)]))
    others = [
        *ids(toy([Setting(1, seconds=0.1)])),
        *ids(toy([Setting(1)]), seeds=(5,)),
        *ids(toy([Setting(1)]), size="smoke"),
    ]
    others += [*ids(replace(toy([Setting(1)]), name="other")), *ids(toy([Setting(1)]), data="digits")]
    assert len({one, two, *others}) == 7
    data = tmp_path / "data"
    data.mkdir()
    (data / "a").write_text("1")
    [before] = ids(toy([Setting(1)]), data=str(data))
    from gradleak.studies.run import content_hash

    content_hash.cache_clear()
    (data / "a").write_text("2")
    assert [before] != ids(toy([Setting(1)]), data=str(data))
