"""What a page shows, what its verdict says and what its files hold are one: the rules that a newcomer's trust stands on.

That audits of every kind end in a verdict, that steps of an attack are not those of a training, that other secrets and public ones void
it, that observations stay apart, that defended gradients are no mistakes, and that files are their owner's alone, stands in test_cli.py and
test_cli_texts.py; what each level is called for, in tests/unit/test_verdict.py; exit codes, in tests/unit/test_summary.py.
"""

import io
import json
import re
from collections.abc import Callable
from contextlib import redirect_stdout
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from gradleak.cli.app import main
from gradleak.modalities.pictures import load
from gradleak.observations.remedies import REMEDIES
from gradleak.report import record

SHORT = ("--inverting-gradients.steps", "2", "--data", "digits")
Run = Callable[..., str]


@pytest.fixture(scope="module")
def audits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one digit behind a perceptron, found exactly, beside a search that is cut short under three seeds; of three digits behind a LeNet,
    not found, with the secret and without."""
    folder = tmp_path_factory.mktemp("audits")

    def run(*argv: object) -> None:
        with redirect_stdout(io.StringIO()):
            assert main([str(part) for part in argv]) == 0

    def captured(kind: str, model: str, out: str, *more: object) -> None:
        run("capture", kind, "--model", model, "--data", "digits", "--out", folder / out, *more)

    captured("gradient", "mlp", "one", "--indices", 3)
    captured("gradient", "lenet", "three", "--indices", 3, 4, 5)
    for name, attacks in (("one", ("analytic", "inverting-gradients")), ("three", ("inverting-gradients",))):
        files = [folder / name / "observation.safetensors", "--secret", folder / name / "secret.safetensors"]
        repeats = 3 if name == "one" else 1
        run("audit", *files, "--attacks", *attacks, *SHORT, "--repeats", repeats, "--out", folder / f"{name}-audit")
    alone = ["--attacks", "inverting-gradients", *SHORT, "--out", folder / "alone-audit"]
    run("audit", folder / "three" / "observation.safetensors", *alone)
    return folder


def page_of(out: Path) -> str:
    """The words of a page, in order."""
    html = re.sub(r"<style>.*?</style>", "", (out / "report.html").read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", html)).split())


def test_the_headline_stands_first_and_is_the_same_everywhere(audits: Path) -> None:
    out = audits / "one-audit"
    verdict = record.read(out / "record.json")["verdict"]
    assert verdict["headline"].startswith(
        "1 of 1 private images came back to an attacker who sees only what was shared"
    )
    text = page_of(out)
    places = [text.index(part) for part in (verdict["headline"], "What came back", "What to do", "What was not tried")]
    places.append(text.index("What the attacker saw"))
    assert places == sorted(places)
    assert verdict["headline"] in (out / "summary.md").read_text(encoding="utf-8")
    assert json.loads((out / "summary.json").read_text(encoding="utf-8"))["verdict"]["headline"] == verdict["headline"]


def test_the_lead_of_the_verdict_is_that_of_the_table(audits: Path) -> None:
    """One mean of gaps, with one interval, on the same page."""
    out = audits / "three-audit"
    made = record.read(out / "record.json")
    [row] = made["results"]
    low, high = row["intervals"]["leads"]
    mean = sum(value or 0.0 for value in row["leads"]) / 3
    assert f"{mean:+.1f} dB ({low:+.1f} to {high:+.1f}) against the best blind control" in made["verdict"]["sentence"]
    assert f"{mean:+.2f} [{low:.1f}, {high:.1f}]".replace("-", "−") in page_of(out).replace("\N{NO-BREAK SPACE}", " ")  # noqa: RUF001


def test_what_was_not_found_is_not_green_and_names_what_was_not_tried_and_the_labels_that_came_out(
    audits: Path,
) -> None:
    """Three labels of a LeNet are read off its last layer (Zhao et al. 2020 for one, counts for more)."""
    out = audits / "three-audit"
    verdict, text = record.read(out / "record.json")["verdict"], page_of(out)
    assert verdict["level"] == "nothing"
    assert "None of 3 private images came back with the attacks that were tried" in verdict["headline"]
    assert "3 of 3 were read" in verdict["headline"]
    assert {"map-inversion", "dlg"} <= set(verdict["untried"])
    assert f"Not asked for, although they read such a release: {', '.join(verdict['untried'])}" in text
    assert 'class="verdict nothing"' in (out / "report.html").read_text(encoding="utf-8")
    assert "No sample recovered: no proof of safety" in text


def test_without_the_secret_a_page_shows_what_came_out_and_asks_to_look_at_it(audits: Path) -> None:
    out = audits / "alone-audit"
    verdict, text = record.read(out / "record.json")["verdict"], page_of(out)
    assert verdict["level"] == "unscored"
    assert "compared" in verdict["headline"]
    assert "What inverting-gradients returned" in text
    assert "Share nothing on the strength of this page" in text


def test_a_page_that_holds_private_data_says_so_and_classes_go_by_their_names(audits: Path) -> None:
    text = page_of(audits / "one-audit")
    assert text.index("Personal data.") < text.rindex("Private data recovered")
    digit = load("digits", "test", indices=[3])
    assert f"Image 1, class {digit.classes[int(digit.labels[0])]}" in text


def test_seeds_are_told_of_what_draws_and_not_of_a_closed_form(audits: Path) -> None:
    rows: dict[str, Any] = {row["attack"]: row for row in record.read(audits / "one-audit" / "record.json")["results"]}
    assert "repeats" not in rows["analytic"]
    searched = rows["inverting-gradients"]
    assert [one["seed"] for one in searched["repeats"]] == [0, 1, 2]
    assert searched["residual"] == min(one["residual"] for one in searched["repeats"])


def test_changes_that_were_measured_stand_beside_what_they_cost(audits: Path) -> None:
    [changes] = record.read(audits / "one-audit" / "record.json")["remedies"].values()
    assert changes[0]["change"].startswith("Train with differential privacy")
    text = page_of(audits / "one-audit")
    assert all(one[key] in text for one in changes for key in ("change", "effect", "cost", "source"))


def test_every_change_names_a_page_where_it_was_measured() -> None:
    for changes in REMEDIES.values():
        for one in changes:
            assert (Path(__file__).parents[2] / "docs" / one.source).is_file()


def test_no_repeats_are_refused(audits: Path, tmp_path: Path, refused: Run) -> None:
    observation = audits / "one" / "observation.safetensors"
    assert "give at least 1" in refused("audit", observation, "--repeats", 0, "--out", tmp_path / "out")
