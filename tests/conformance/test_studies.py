"""Every study runs at its smallest size, on embedded data, and says so; and the command line runs studies."""

import inspect
import math
from pathlib import Path
from typing import Any

import pytest

from gradleak.cli.app import main
from gradleak.report import record
from gradleak.studies import catalogue
from gradleak.studies.catalogue import ALIASES, STUDIES
from gradleak.studies.run import Plan, run
from gradleak.studies.table import Table, columns
from toy_study import Setting, toy

# What the smallest size has to show, as {study: (row, column, least)}: closed forms and proofs, which size does not change.
SHOWN: dict[str, tuple[dict[str, Any], str, float]] = {
    "text-encoder": ({"batch": 1}, "rouge1", 100),  # one text of fewer tokens than the width is proven
    "text-decoder": ({"batch": 1, "model": "small gpt2"}, "rouge1", 100),
    "text-adapters": ({"rank": 64, "shared": "gradient"}, "rouge1", 100),  # fewer tokens than the rank
    "closed-form": ({"model": "mlp", "noise": 0.0}, "psnr_db", 100),  # exact in float32
    "adapters-as-trained": (
        {"recipe": lambda recipe: "sgd" in recipe},
        "identified",
        1.0,
    ),  # the span of four digits, known by the seed
    "learned-weights": ({"model": "relu3"}, "exact_psnr_db", 60),  # weights recovered, pictures in closed form
}
LONGEST = 125  # lines of a study


@pytest.fixture(autouse=True)
def one_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Victims are trained once for all studies, and nowhere else than here."""
    monkeypatch.setenv("GRADLEAK_CACHE", str(tmp_path_factory.getbasetemp() / "victims"))


def finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("name", STUDIES)
def test_the_smallest_size_runs(name: str, tmp_path: Path) -> None:
    study = STUDIES[name]
    table = run(Plan(study=study, out=tmp_path / "out", size="smoke"))
    assert table.rows
    assert not table.failed
    page = (tmp_path / "out" / "report.html").read_text()
    made = record.read(tmp_path / "out" / "record.json")
    assert "smoke size" in made["verdict"]["sentence"]
    assert made["verdict"]["sentence"][:40] in page
    assert all(plot["image"].startswith("data:image/png;base64,") for plot in made["plots"])
    assert all(plot["words"].endswith("The numbers stand in the table.") for plot in made["plots"])
    assert len(list((tmp_path / "out").glob("plot-*.pdf"))) == len(made["plots"])
    assert all(map(finite, (value for row in table.rows for value in row.values())))
    if name in SHOWN:
        where, column, least = SHOWN[name]
        assert (rows := table.where(**where))
        assert all(row[column] >= least for row in rows)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_short_and_says_what_it_asks(name: str) -> None:
    study = STUDIES[name]
    assert study.question.endswith("?")
    file = Path(inspect.getfile(study.settings))
    assert len(file.read_text(encoding="utf-8").splitlines()) <= LONGEST


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("size", ["small", "paper"])
def test_settings_differ_in_their_columns_at_every_size(name: str, size: Any) -> None:
    """Or rows of the table would be averaged that nobody meant to. Published figures stand beside columns that rows are told by."""
    study = STUDIES[name]
    rows = [columns(setting) for setting in study.settings("embedded", size)]
    assert len({tuple(row.values()) for row in rows}) == len(rows) > 1
    assert set(study.over) <= set(rows[0])
    for figure in study.published:
        assert figure.citation
        assert set(figure.where) <= {*rows[0], "data"}


def test_what_a_sentence_says_of_some_rows_only(tmp_path: Path) -> None:
    """Reports are written while cells run: each study tells of its first cell alone."""
    for name in ("closed-form", "text-encoder", "adapter-initialisation"):
        study = STUDIES[name]
        table = run(Plan(study=study, out=tmp_path / name, size="smoke"), limit=1)
        assert study.tell is not None
        assert study.tell(table).sentence


def test_old_names_and_new_ones() -> None:
    assert len(ALIASES) == 27
    never = {"adapters-as-trained", "membership", "label-counts", "defenses", "rounds"}  # had another name
    never |= {f"priors-on-{released}" for released in ("gradients", "adapters", "weights")}
    assert set(ALIASES.values()) == set(STUDIES) - never
    assert not set(ALIASES) & set(STUDIES)


def test_published_figures_stand_beside_ours() -> None:
    assert sum(bool(study.published) for study in STUDIES.values()) >= 5


# --- The command line ---


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of five cells that leave marks, one of which fails."""
    marks = tmp_path / "marks"
    marks.mkdir()
    settings = [Setting(n, str(marks), "fail" if n == 3 else "") for n in range(5)]
    monkeypatch.setitem(catalogue.STUDIES, "toy", toy(settings))
    monkeypatch.setitem(catalogue.ALIASES, "old-toy", "toy")
    return marks


def test_a_study_is_run_resumed_and_rerun(tmp_path: Path, toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, again = str(tmp_path / "out"), str(tmp_path / "again")
    assert main(["study", "toy", "--limit", "2", "--out", out]) == 0
    assert "embedded data, small size (a note): 2 rows." in capsys.readouterr().out
    assert main(["reproduce", "old-toy", "--out", out]) == 0
    assert "4 rows. 1 rows could not be had: ValueError: 3 is no good." in capsys.readouterr().out
    assert len(list(toys.iterdir())) == 5
    (toys / "mended").touch()
    assert main(["study", "toy", "--retry", "--seed", "0", "--seeds", "2", "--workers", "2", "--out", out]) == 0
    assert len(list(toys.iterdir())) == 12
    made = record.read(tmp_path / "out" / "record.json")
    assert [row["samples"] for row in made["table"]] == [8] * 5
    assert main(["rerun", f"{out}/record.json", "--out", again]) == 0
    assert record.read(tmp_path / "again" / "record.json")["table"] == made["table"]


def test_a_dry_run_lists_cells_and_estimates(tmp_path: Path, toys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "toy", "--dry-run", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 6
    assert said[0].split()[1] == "0"
    assert "finished" in said[0]
    assert all("missing" in line for line in said[1:5])
    assert said[5].startswith("5 cells, 4 missing: about 0 CPU-seconds")
    assert len(list(toys.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["toys"], "did you mean toy"),
        (["kkt-lor"], "did you mean kkt-lora"),
        (["toy", "--device", "abacus"], "abacus"),
        (["toy", "--workers", "0"], "--workers is a number"),
        (["toy", "--where", "the-moon"], "--where is here, ray"),
        (["toy", "--where", "ray", "--workers", "3"], "Ray has its own"),
        (["none.toml"], "Cannot read none.toml: No such file"),
        (["closed-form", "--data", "marks", "--size", "smoke"], "No cell could be computed: "),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path,
    toys: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # where "marks" is an empty folder
    assert main(["study", *arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert not list(toys.iterdir())


def test_a_table_of_nothing_is_said_to_be_one(tmp_path: Path) -> None:
    run(Plan(study=toy([Setting(1)]), out=tmp_path / "out"), limit=0)
    made = record.read(tmp_path / "out" / "record.json")
    assert made["verdict"]["sentence"] == "embedded data, small size: Nothing has been computed yet."
    assert Table([]).all == []
