"""An audit in one call from Python, and the report in one's hands."""

import csv
import html
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gradleak
from gradleak import (
    Architecture,
    BadInput,
    Model,
    Report,
    capture_gradient,
    load,
    run_audit,
    save_observation,
    save_secret,
)
from gradleak.attacks.analytic import Analytic
from gradleak.report import record, summary
from gradleak.report.scores import as_csv, samples


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the observation of a digit's gradient on an MLP, and its secret."""
    folder = tmp_path_factory.mktemp("captured")
    architecture = Architecture("mlp", (1, 8, 8), 10)
    observation, secret = capture_gradient(
        Model.of(architecture.build(0), architecture), load("digits", indices=[3]), reveal_labels=True
    )
    save_observation(observation, folder / "observation.safetensors")
    save_secret(secret, folder / "secret.safetensors")
    return folder


@pytest.fixture(scope="module")
def report(captured: Path) -> Report:
    """What `analytic` and an attack that reads no gradient find; scored."""
    return run_audit(
        captured / "observation.safetensors",
        ["analytic", "adam-epsilon"],
        secret=captured / "secret.safetensors",
        public="digits",
    )


def test_an_audit_from_python_finds_what_the_command_finds(report: Report, captured: Path, tmp_path: Path) -> None:
    from gradleak.cli.app import main

    said = [str(captured / "observation.safetensors"), "--secret", str(captured / "secret.safetensors"), "-q"]
    assert (
        main(["audit", *said, "--data", "digits", "--attacks", "analytic", "adam-epsilon", "--out", str(tmp_path)]) == 0
    )
    other = record.read(tmp_path / "record.json")
    assert report.record["verdict"] == other["verdict"]
    assert report.verdict["level"] == "recovered"
    for mine, theirs in zip(report.record["results"], other["results"], strict=True):
        assert mine["scores"] == theirs["scores"]
        assert mine["status"] == theirs["status"]
    assert list(report.found) == ["analytic"]
    truth = load("digits", indices=[3]).images
    assert torch.allclose(report.found["analytic"].value, truth, atol=1e-5)  # a quotient of float32 numbers


def test_attacks_are_names_or_values(captured: Path) -> None:
    observation = gradleak.load_observation(captured / "observation.safetensors")
    made = run_audit(observation, [Analytic(tolerance=1e-3)], progress=False)
    assert made.record["results"][0]["attack"] == "analytic"
    assert made.record["results"][0]["parameters"]["tolerance"] == 1e-3
    assert run_audit(observation, {"mine": Analytic()}).record["results"][0]["attack"] == "mine"
    for attacks, said in ((["nothing"], "Unknown attack 'nothing'"), ("dlg", r"give \['dlg'\]")):
        with pytest.raises(BadInput, match=said):
            run_audit(observation, attacks)
    with pytest.raises(BadInput, match="belong to the folder of an adapter"):
        run_audit(observation, base="somewhere")


def test_a_report_is_saved_read_and_redacted(report: Report, tmp_path: Path) -> None:
    folder = report.save(tmp_path / "out")
    files = {path.name for path in folder.iterdir()}
    assert files == {"record.json", "report.html", "pictures.png", *summary.FILES}
    again = Report.read(folder)
    assert again.record["results"][0]["shown"] == report.record["results"][0]["shown"]
    page = report.save_html(tmp_path / "deep" / "page.html")
    assert page.stat().st_mode & 0o777 == 0o600
    assert "data:image" in page.read_text()
    hidden = report.redacted().save(tmp_path / "redacted")
    assert not (hidden / "pictures.png").exists()
    for path in hidden.iterdir():
        assert "data:image" not in path.read_text()


def test_a_report_shows_itself(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    report.show()
    printed = " ".join(capsys.readouterr().out.split())
    assert report.verdict["sentence"] in printed
    assert "Not run: adam-epsilon." in printed
    assert report.verdict["sentence"].splitlines()[0] in repr(report).splitlines()[-1]
    frame = report._repr_html_()
    assert frame.startswith('<iframe srcdoc="')
    page = html.unescape(frame.partition('srcdoc="')[2].partition('" title=')[0])
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert '"' not in frame.partition('srcdoc="')[2].partition('" title=')[0]


def test_scores_are_a_flat_table(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = samples(report.record)
    [row, _] = report.record["results"]
    assert first["psnr_db"] == row["scores"]["psnr_db"][0]
    assert first["psnr_db (mean_image)"] == row["controls"]["mean_image"]["psnr_db"][0]
    assert (first["attack"], first["sample"], first["recovered"]) == ("analytic", 0, True)
    assert (second["attack"], second["ran"], "sample" in second) == ("adam-epsilon", False, False)
    pandas = pytest.importorskip("pandas")
    frame = report.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.loc[frame["attack"] == "analytic", "psnr_db"].tolist() == list(row["scores"]["psnr_db"])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(BadInput, match="pip install pandas"):
        report.to_dataframe()


def test_the_table_holds_no_formula_and_no_private_word() -> None:
    made: Any = record.new_record({"name": "audit", "arguments": {}}, 0, [])
    row = record.new_result("dager", {}, {"name": "first"})
    made["results"].append(
        {**row, "status": "=1+1", "shown": {"truth": ["a secret"]}, "scores": {"rouge1": [0.5, None]}}
    )
    rows = list(csv.DictReader(as_csv(made).splitlines()))
    assert [one["rouge1"] for one in rows] == ["0.5", ""]
    assert rows[0]["status"] == "'=1+1"
    assert "secret" not in as_csv(made)
