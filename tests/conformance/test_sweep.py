"""Studies of one's own: a file or a few lines of Python, checked before the first cell, scored as an audit scores."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gradleak.attacks.parameters import built
from gradleak.audit.loop import audit
from gradleak.audit.scoring import SCORING
from gradleak.cli.app import main
from gradleak.errors import BadInput
from gradleak.formats.model_folder import write_base
from gradleak.modalities.texts import load_texts
from gradleak.report import record
from gradleak.studies.run import Plan, run
from gradleak.studies.sweep import Setting, Sweep, observed, read
from gradleak.studies.table import Table
from gradleak.victims.small_language import small_model, train_tokenizer

DIGITS = {"data": "digits", "model": "mlp"}
FILE = """
question = "How much noise hides a digit?"
seeds = [0, 1]
metrics = ["psnr_db", "recovered"]

[victim]
kind = "gradient"
data = "digits"
model = "mlp"
pictures = 2
first = 5
defense = [[], ["noise:1.0"]]

[attacks.analytic]
[attacks.inverting-gradients]
steps = [3, 6]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "noise.toml"
    path.write_text(FILE)
    return path


def test_a_file_is_every_combination(file: Path) -> None:
    sweep = read(file)
    settings = list(sweep.settings())
    assert sweep.name == "noise"
    assert len(settings) == (1 + 2) * 2 * 2  # attacks with their parameters, noise levels, pictures; seeds are cells
    assert [s.columns() for s in settings[:3]] == [
        {"attack": "analytic", "defense": "none", "indices": "5"},
        {"attack": "analytic", "defense": "none", "indices": "6"},
        {"attack": "analytic", "defense": "noise:1.0", "indices": "5"},
    ]
    assert settings[-1].columns() == {
        "attack": "inverting-gradients",
        "steps": 6,
        "defense": "noise:1.0",
        "indices": "6",
    }
    assert len(Plan(study=sweep.study(), out=Path("unused"), seeds=sweep.seeds).cells()) == 24


def test_from_the_command_line(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The closed form gives a digit of a perceptron back exactly; noise as large as the gradient, and three steps, do not."""
    out = tmp_path / "out"
    assert main(["study", str(file), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(
        "analytic, defense none: 100% of 4 recovered; analytic, defense noise:1.0: 0% of 4 recovered;"
    )
    made = record.read(out / "record.json")
    assert [row["samples"] for row in made["table"]] == [4] * 6
    assert made["table"][0]["psnr_db"] > 80
    assert made["table"][0]["recovered_low"] == pytest.approx(0.025**0.25)
    assert set(made["table"][0]) <= {
        *("attack", "steps", "defense", "samples", "recovered", "recovered_low", "recovered_high"),
        *(
            f"{c}psnr_db{e}"
            for c in ("", "mean_image_", "nearest_public_", "wrong_observation_")
            for e in ("", "_low", "_high")
        ),
    }
    assert "data," not in made["verdict"]["sentence"]
    assert made["command"]["inputs"]
    assert main(["rerun", str(out / "record.json"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "table.csv").read_bytes() == (out / "table.csv").read_bytes()
    file.write_text(
        FILE.replace(
            "[attacks.analytic]", "[attacks.dlg]\nevaluations = 2\nrounds = 0\nrestarts = 1\n[attacks.analytic]"
        )
    )
    before = {path.name for path in (out / "cells").iterdir()}
    assert main(["study", str(file), "--out", str(out)]) == 0
    after = {path.name for path in (out / "cells").iterdir()}
    assert before < after
    assert len(after) == len(before) + 8  # an attack adds its cells


def test_the_tuning_of_the_page_has_a_row_for_each_setting(tmp_path: Path) -> None:
    """On public pictures; run with fewer evaluations, on one of the four."""
    page = (Path(__file__).parents[2] / "docs" / "studies.md").read_text(encoding="utf-8")
    [text] = re.findall(r"^```toml\n(question = \"Which effort.*?)^```$", page, re.DOTALL | re.MULTILINE)
    path, out = tmp_path / "tuning.toml", tmp_path / "tuning"
    path.write_text(text)
    sweep = read(path)
    assert len(list(sweep.settings())) == 2 * 2 * 4
    assert sweep.victim is not None
    assert sweep.victim["split"] == "train"
    path.write_text(
        text.replace("[20, 75]", "[1, 2]").replace("[0, 1000]", "[0, 9]").replace("pictures = 4", "pictures = 1")
    )
    assert main(["study", str(path), "--out", str(out)]) == 0
    rows = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert [(row["evaluations"], row["pairs"]) for row in rows] == [("1", "0"), ("1", "9"), ("2", "0"), ("2", "9")]
    assert all(row["psnr_db"] for row in rows)


def test_the_grid_of_the_page_has_an_epsilon_where_noise_was_added(tmp_path: Path) -> None:
    """Of one picture, with one step of the search: what epsilon is, test_private_step.py asks."""
    page = (Path(__file__).parents[2] / "docs" / "studies.md").read_text(encoding="utf-8")
    [text] = re.findall(r"^```toml\n(question = \"From which epsilon.*?)^```$", page, re.DOTALL | re.MULTILINE)
    path, out = tmp_path / "epsilon.toml", tmp_path / "epsilon"
    path.write_text(text.replace("pictures = 4", "pictures = 1").replace("steps = 100", "steps = 1"))
    assert main(["study", str(path), "--out", str(out)]) == 0
    rows = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    epsilons = {row["defense"]: row["epsilon"] for row in rows}
    assert epsilons.pop("none") == ""
    found = [float(value) for value in epsilons.values()]
    assert list(epsilons) == ["dp-sgd:1:0.05", "dp-sgd:1:0.2", "dp-sgd:1:1"]
    assert found == sorted(found, reverse=True)  # more noise, less epsilon
    assert found[-1] > 0


def test_a_cell_scores_as_an_audit_does(tmp_path: Path) -> None:
    sweep = Sweep(
        victim={**DIGITS, "indices": [[0, 1]], "reveal_labels": True},
        attacks={"analytic": {}, "dlg": {"evaluations": 5}},
    )
    table = run(Plan(study=sweep.study(), out=tmp_path / "out"))
    setting = next(iter(sweep.settings()))
    observation, secret = observed(setting, 0)
    public = SCORING["pictures"].public("digits", "train", observation.model)
    for done in audit(observation, built({"analytic": {}, "dlg": {"evaluations": 5}}), public, secret=secret, seed=0):
        row = done.result
        rows = [r for r in table.samples if r["attack"] == row["attack"]]
        if row["attack"] == "dlg":  # side by side with the control: other starts
            assert [r["mean_image_psnr_db"] for r in rows] == row["controls"]["mean_image"]["psnr_db"]
            continue
        assert [r["psnr_db"] for r in rows] == row["scores"]["psnr_db"]
        assert [r["lead"] for r in rows] == row["leads"]
        assert [r["recovered"] for r in rows] == row["recovered"]
        assert [r["identified"] for r in rows] == [rank == 1 for rank in row["scores"]["identification_rank"]]
        for control, scores in row["controls"].items():
            assert [r[f"{control}_psnr_db"] for r in rows] == scores["psnr_db"]


def test_observations_of_ones_own(tmp_path: Path) -> None:
    for model in ("mlp", "lenet"):
        assert main(["capture", "gradient", "--model", model, "--data", "digits", "--out", str(tmp_path / model)]) == 0
    files = [
        {"file": str(tmp_path / m / "observation.safetensors"), "secret": str(tmp_path / m / "secret.safetensors")}
        for m in ("mlp", "lenet")
    ]
    sweep = Sweep(observations=files, attacks={"analytic": {}, "recursive": {}})
    table = run(Plan(study=sweep.study(), out=tmp_path / "out", data="digits"))
    assert len(table.rows) == 3
    [lost] = table.failed  # a LeNet's first layer is no linear one
    assert lost["attack"] == "analytic"
    assert lost["observation"].endswith("lenet/observation.safetensors")
    assert lost["note"].endswith(".")


def test_texts_too(tmp_path: Path) -> None:
    """Each text has fewer tokens than the model is wide: DAGER proves it."""
    tokenizer = train_tokenizer(load_texts("embedded", "train").texts, "bert", size=420)
    write_base(small_model("bert", tokenizer, "classification", width=96, layers=2, spread=0.1), tmp_path / "bert")
    victim = {"model": str(tmp_path / "bert"), "data": "embedded", "indices": [[0], [1]]}
    table = run(Plan(study=Sweep(victim=victim, attacks={"dager": {}}).study(), out=tmp_path / "out"))
    [row] = table.rows
    assert row["samples"] == 2
    assert row["rouge1"] == 1
    assert row["frequent_words_rouge1"] < 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"attacks": {"dlgg": {}}}, "Unknown attack 'dlgg': did you mean dlg"),
        ({"attacks": {"dlg": {"steps": 3}}}, "dlg has no parameter 'steps'"),
        ({"attacks": {"dlg": {"evaluations": "many"}}}, "evaluations of dlg is unusable"),
        ({"attacks": {"dlg": {"evaluations": -1}}}, "lies between 0 and"),
        ({"attacks": {"dlg": {"evaluations": []}}}, "no value of evaluations"),
        (
            {"attacks": {"kkt": {}}},
            "No cell has run: kkt cannot run here. It does not read what a victim of kind gradient",
        ),
        ({"attacks": {"dager": {}}}, "No cell has run: dager cannot run here"),
        ({"attacks": {}}, r"needs \[attacks.NAME\]"),
        ({"victim": None}, r"either \[victim\] or"),
        ({"victim": {"kind": "photograph"}}, "Unknown kind of victim 'photograph'"),
        ({"victim": {"defence": [["sign"]]}}, "no setting 'defence': did you mean defense"),
        ({"victim": {"mode": "loud"}}, "cannot be so"),
        ({"victim": {"pictures": "all"}}, "are numbers of rows"),
        ({"victim": {"pictures": 10**9}}, "are numbers of rows"),
        ({"metrics": ["beauty"]}, "Unknown metric 'beauty'"),
        ({"observations": [{"file": "a"}], "victim": None}, "has a `file` and a `secret`"),
        ({"observations": [{"file": "a", "secret": "b"}], "victim": None}, "There is no file a"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_cell(change: dict[str, Any], sentence: str) -> None:
    good: dict[str, Any] = {"victim": DIGITS, "attacks": {"analytic": {}}}
    with pytest.raises(BadInput, match=sentence):
        Sweep(**(good | change)).study()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("attacks = 3", "is no study"),
        ("x = [", "is not TOML"),
        ("atacks = 3", "says 'atacks': did you mean attacks"),
        ("\x00", "is not TOML"),
        ("seeds = ['a']", "is no study"),
    ],
)
def test_files_that_are_no_study(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(BadInput, match=sentence):
        read(path)


def test_settings_are_plain(file: Path) -> None:
    """They travel to other processes, and are hashed."""
    for setting in read(file).settings():
        assert isinstance(hash(setting), int)
        assert json.loads(msgspec.json.encode(setting))["attack"] == setting.attack
    assert Setting("a", (), (), (), ()).columns() == {"attack": "a"}
    assert Table([]).rows == []


def test_more_cells_than_anybody_runs_are_refused_without_listing_them() -> None:
    """Ten billion combinations: they would not fit into memory."""
    victim = {**DIGITS, "pictures": 100_000, "defense": [[f"noise:{i / 1e6}"] for i in range(100_000)]}
    with pytest.raises(BadInput, match="at most 100,000 cells a seed"):
        Sweep(victim=victim, attacks={"analytic": {}}).study()
