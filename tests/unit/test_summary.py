"""What jobs read of a record: exit codes, summaries, redaction. Each says a leak where there is one, and never holds private data."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from gradleak.errors import BadInput
from gradleak.report import html, summary
from gradleak.report.gate import check_bar, exit_code
from gradleak.report.record import Record, Result, new_record, new_result
from gradleak.report.redaction import redacted

ERROR = {"name": "replay", "level": "error", "sentence": "The model does not reproduce the release."}
WORDS = {"name": "embeddings", "level": "warning", "sentence": "The rows of 'swordfish' moved."}


def row(attack: str = "dlg", **rest: Any) -> Result:
    made = new_result(attack, {}, {"name": "gradient", "kind": "gradient"})
    return {**made, "ran": True, "residual": 0.1, "status": "Done.", **rest}  # type: ignore[typeddict-item]


def made(level: str, *rows: Result) -> Record:
    arguments = {"observation": "home/me/private.safetensors"}
    record = new_record({"name": "audit", "arguments": arguments}, 0, [])
    record["results"] = list(rows)
    record["verdict"] = {"level": level, "sentence": "A sentence."}  # type: ignore[typeddict-item]
    return record


FOUND = row(scores={"psnr_db": [30.0, 12.0]}, recovered=[True, False], partly=[True, False])
PARTS = row(scores={"psnr_db": [15.0]}, recovered=[False], partly=[True])
NOTHING = row(scores={"psnr_db": [12.0]}, recovered=[False], partly=[False])
PROVEN = row("dager", proven=[True], media="text/plain", shown={"reconstruction": ["my secret text"]})
NOT_RUN = row("kkt", ran=False, residual=None, status="Not run: It reads weights.")
VOID = row(scores={"psnr_db": [60.0]}, recovered=[True], partly=[True], flags=[ERROR])


@pytest.mark.parametrize(
    ("record", "alone", "recovered", "partly"),
    [
        (made("partial", FOUND), 0, 1, 1),
        (made("partial", PARTS), 0, 0, 1),
        (made("nothing", NOTHING), 0, 0, 0),
        (made("recovered", PROVEN), 0, 1, 1),  # without a secret
        (made("unscored", row()), 0, 3, 3),  # ran, and nobody can say what came of it: no job may pass by that
        (made("void", VOID), 0, 3, 3),
        (made("void", VOID, PROVEN), 0, 1, 1),  # what is proven stands
        (made("unscored", NOT_RUN), 0, 3, 3),
        (made("unscored"), 0, 3, 3),
    ],
)
def test_exit_codes(record: Record, alone: int, recovered: int, partly: int) -> None:
    assert [exit_code(record, bar) for bar in (None, "recovered", "partly")] == [alone, recovered, partly]


def told(level: str, true: float, proven: int = 0, best: str = "alignment") -> Record:
    """A record of membership alone, of 100 members."""
    record = made(level)
    rate = {"false": 0.01, "true": true}
    found: Any = {"members": 100, "best": best, "scores": {"alignment": {"rates": [rate]}}, "verdict": level}
    found |= {"certificate": {"level": 1e-6, "proven": proven}, "exposed": [{"row": 3, "shown": "my secret text"}]}
    record["membership"] = found
    return record


@pytest.mark.parametrize(
    ("record", "bar", "code"),
    [
        (told("members", 0.2), None, 0),
        (told("members", 0.2), "TPR>0.05", 1),
        (told("members", 0.2), "TPR>0.2", 0),
        (told("members", 0.2), "recovered", 0),  # that somebody took part is told, and nothing came back
        (told("members", 0.0, proven=30), "TPR>0.05", 1),
        (told("members", 0.0, proven=30), "recovered", 1),
        (told("nothing", 0.01), "TPR>0.05", 0),
        (told("unscored", 0.0, best=""), "TPR>0.05", 3),
        (told("void", 0.9), "TPR>0.05", 3),  # members and fresh samples differ without the model
        (made("nothing", NOTHING), "TPR>0.05", 3),
    ],
)
def test_exit_codes_of_membership(record: Record, bar: str | None, code: int) -> None:
    assert exit_code(record, bar) == code


@pytest.mark.parametrize("bar", ["TPR>5", "TPR>0.05x", "everything", ""])
def test_what_is_no_bar_is_refused(bar: str) -> None:
    with pytest.raises(BadInput, match=r"is no bar: recovered, partly or TPR>0\.05"):
        check_bar(bar, members=True)


def test_a_bar_of_membership_needs_samples() -> None:
    with pytest.raises(BadInput, match="give --members and --non-members"):
        check_bar("TPR>0.05", members=False)
    check_bar("TPR>0.05", members=True)


def test_no_redacted_record_shows_exposed_samples() -> None:
    assert "my secret text" not in json.dumps(redacted(told("members", 0.2)))


def test_junit_counts_a_leak_as_a_failure_and_void_numbers_as_an_error() -> None:
    suite = ElementTree.fromstring(summary.junit(summary.summary(made("partial", FOUND, NOTHING, VOID, NOT_RUN))))[0]
    assert [suite.get(key) for key in ("tests", "failures", "errors", "skipped")] == ["4", "1", "1", "1"]
    assert [[child.tag for child in case] for case in suite] == [["failure"], [], ["error"], ["skipped"]]
    assert suite[2][0].get("message") == ERROR["sentence"]


def test_where_the_verdict_is_void_no_row_claims_a_leak() -> None:
    """Also not that of an attack with which nothing is wrong: one page, one verdict. A proof stands."""
    short = summary.summary(made("void", FOUND, VOID, PROVEN, NOT_RUN))
    suite = ElementTree.fromstring(summary.junit(short))[0]
    assert [[child.tag for child in case] for case in suite] == [["error"], ["error"], ["failure"], ["skipped"]]
    assert suite[0][0].get("message") == ERROR["sentence"]
    kinds = [result["kind"] for result in summary.sarif(short)["runs"][0]["results"]]
    assert kinds == ["open", "open", "fail"]
    assert [row.get("recovered", "none") for row in short["attacks"]] == ["none"] * 4
    assert summary.markdown(short).count("| void |") == 3
    assert "1 of 2" not in summary.markdown(short)


def test_what_is_void_of_one_observation_leaves_another_alone() -> None:
    record = made("recovered", FOUND, {**VOID, "observation": {"name": "other"}})
    record["verdicts"] = [
        {"level": level, "sentence": "A sentence.", "observation": name}  # type: ignore[typeddict-item]
        for name, level in (("gradient", "partial"), ("other", "void"))
    ]
    first, second = summary.summary(record)["attacks"]
    assert (first["recovered"], first["errors"]) == (1, [])
    assert ("recovered" in second, second["errors"]) == (False, [ERROR["sentence"]])


def test_junit_survives_what_xml_cannot_hold() -> None:
    page = summary.junit(summary.summary(made("unscored", row(status="Not run: \x00 <evil & co>", ran=False))))
    assert "? <evil & co>" in str(ElementTree.fromstring(page)[0][0][0].get("message"))


def test_sarif_has_what_the_standard_requires() -> None:
    """Sections 3.13, 3.14, 3.18, 3.27: version, tool.driver.name, message.text; a kind other than fail has the level none."""
    page = summary.sarif(summary.summary(made("partial", FOUND, PARTS, NOTHING, NOT_RUN)))
    [run] = page["runs"]
    assert (page["version"], run["tool"]["driver"]["name"]) == ("2.1.0", "gradleak")
    assert [(r["kind"], r["level"]) for r in run["results"]] == [
        ("fail", "error"),
        ("fail", "warning"),
        ("open", "none"),
    ]
    for result in run["results"]:
        assert run["tool"]["driver"]["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["message"]["text"]
        assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "home/me/private.safetensors"


def test_markdown_says_what_ran_and_what_did_not_and_is_no_html() -> None:
    record = made("partial", FOUND, NOT_RUN)
    record["verdict"] |= {
        "sentence": "A | <script> [link](x)",
        "headline": "One of two | came back.",
        "untried": ["ntk"],
    }
    page = summary.markdown(summary.summary(record))
    assert "**Private data partly recovered.** One of two \\| came back.\n\nA \\| &lt;script> \\[link](x)" in page
    assert "Not tried, although they read such a release: ntk." in page
    assert "| dlg | 1 of 2 | none |" in page
    assert "Not run: kkt." in page


def test_no_summary_and_no_redacted_page_holds_what_was_recovered(tmp_path: Path) -> None:
    told = {**PROVEN, "flags": [WORDS], "labels": {"recovered": ["wolverine"], "true": ["wolverine"]}}
    record = made("recovered", told)  # type: ignore[arg-type]
    record["verdict"]["sentence"] = f"{WORDS['sentence']} 1 of 1 private samples proven by dager."
    assert "swordfish" in html.render(record)
    copy = redacted(record)
    summary.save(copy, tmp_path)
    pages = [html.render(copy), json.dumps(copy), *((tmp_path / name).read_text() for name in summary.FILES)]
    for page in pages:
        assert not [word for word in ("swordfish", "my secret text", "wolverine", "home/me") if word in page]
    assert "1 of 1 private samples proven by dager." in pages[0]
    assert copy["results"][0]["proven"] == [True]


def test_a_summary_is_strict_json_where_an_attack_leaves_no_residual(tmp_path: Path) -> None:
    """A count of samples has none: NaN, which JSON does not know."""
    summary.save(made("unscored", row("dataset-size", residual=float("nan"))), tmp_path)
    refuse: Any = pytest.fail
    told = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert told["attacks"][0]["residual"] is None
    assert "nan" not in (tmp_path / "summary.md").read_text()


def test_equal_samples_have_equal_hashes() -> None:
    """Whoever has the data can say which of them it was."""
    shown = {"truth": ["a text"], "reconstruction": ["a text"]}
    hashes = redacted(made("recovered", row(shown=shown, media="text/plain")))["results"][0]["shown"]
    assert hashes["truth"] == hashes["reconstruction"]
    assert hashes["truth"][0].startswith("SHA-256 ")


def test_a_page_with_private_data_says_so() -> None:
    assert "Personal data." in html.render(made("recovered", PROVEN))
    assert "Personal data." not in html.render(made("nothing", NOTHING))
    assert "Personal data." not in html.render(redacted(made("recovered", PROVEN)))
