"""The risk of sharing: which word stands beside which verdict, when it must not, and that page, terminal, JSON and Markdown say the same."""

import json
from typing import Any, get_args

import pytest

from gradleak.report import html, summary, terminal
from gradleak.report.gate import LEAK, exit_code
from gradleak.report.record import Level, Record, Result, new_record, new_result
from gradleak.report.redaction import redacted
from gradleak.report.risk import BY_LEVEL, MANY, ORDER, risk

ERROR = {"name": "replay", "level": "error", "sentence": "The model does not reproduce the release."}
BEYOND = {"name": "above_bound", "level": "warning", "sentence": "This attack names 9 of 10."}


def row(observation: str = "gradient", recovered: tuple[bool, ...] = (), **rest: Any) -> Result:
    made = new_result("dlg", {}, {"name": observation, "kind": "gradient"})
    scored = {"scores": {"psnr_db": [12.0] * len(recovered)}, "recovered": list(recovered)} if recovered else {}
    return {**made, "ran": True, "residual": 0.1, "status": "Done.", **scored, **rest}  # type: ignore[typeddict-item]


def made(level: str, *rows: Result, **levels: str) -> Record:
    record = new_record({"name": "audit", "arguments": {}}, 0, [])
    record["results"] = list(rows)
    record["verdict"] = {"level": level, "sentence": "A sentence."}  # type: ignore[typeddict-item]
    record["verdicts"] = [{"level": one, "sentence": "Its own.", "observation": n} for n, one in levels.items()]  # type: ignore[typeddict-item]
    return record


def bound(most: float) -> dict[str, Any]:
    return {"name": "privacy_bound", "level": "info", "sentence": "Epsilon is small.", "most": most}


def members(verdict: str, low: float = 0.0, proven: int = 0, resolved: bool = True) -> Any:
    rate = {"false": 0.01, "true": 0.5, "low": low, "high": 0.6, "resolved": resolved, "false_high": 0.03}
    score = {"auc": 0.7, "low": 0.6, "high": 0.8, "rates": [rate], "roc": [(0.0, 0.0), (1.0, 1.0)]}
    found: dict[str, Any] = {"members": 100, "fresh": 100, "reference": 100, "best": "alignment", "level": 0.95}
    found |= {"scores": {"alignment": score}, "not_run": {}, "apart": None, "exposed": [], "media": "text/plain"}
    proof = {"level": 1e-6, "proven": proven, "alarms": 0, "expected": 1e-4}
    return {**found, "certificate": proof, "flags": [], "verdict": verdict, "sentence": "Membership: told."}


def of_members(verdict: str, **rest: Any) -> Record:
    record = made(verdict)
    record["membership"] = members(verdict, **rest)
    return record


def with_members(record: Record, **rest: Any) -> Record:
    record["membership"] = members("nothing", **rest)
    return record


CASES = [
    (made("recovered", row(recovered=(True, True))), "HIGH"),
    (made("recovered", row(proven=[True])), "HIGH"),  # without a secret
    (made("partial", row(recovered=(True, False))), "HIGH"),  # one whole sample of two is enough
    (made("partial", row(recovered=(False,), partly=[True])), "MEDIUM"),
    (made("partial", row()), "MEDIUM"),  # words that stand in what was shared, with no attack
    (made("nothing", row(recovered=(False,))), "CANNOT SAY"),
    (made("nothing", row(recovered=(False,), flags=[bound(0.04)])), "LOW"),
    (made("nothing", row(recovered=(False,), flags=[bound(0.06)])), "CANNOT SAY"),
    (made("nothing", row(recovered=(False,), flags=[bound(0.04), BEYOND])), "CANNOT SAY"),
    (made("partial", row(recovered=(False,), partly=[True], flags=[bound(0.04)])), "MEDIUM"),
    (made("absent", row(recovered=(False,))), "LOW"),
    (made("unscored", row()), "CANNOT SAY"),
    (
        made("unscored", row(flags=[bound(0.04)])),
        "CANNOT SAY",
    ),  # nobody has asked whether it is the training that was told
    (made("void", row(recovered=(True,), flags=[ERROR])), "CANNOT SAY"),
    (made("void", row(recovered=(True,), flags=[ERROR]), row(proven=[True])), "HIGH"),  # what is proven stands
    (of_members("members", low=MANY), "HIGH"),
    (of_members("members", low=MANY - 0.01), "MEDIUM"),
    (of_members("members", low=0.5, resolved=False), "MEDIUM"),  # too few fresh samples to see 1 % of them
    (of_members("members", proven=1), "HIGH"),
    (of_members("nothing"), "CANNOT SAY"),
    (of_members("unscored"), "CANNOT SAY"),
    (of_members("void", low=0.9), "CANNOT SAY"),
    (with_members(made("absent", row(recovered=(False,)))), "CANNOT SAY"),  # pictures are absent, members unknown
    (made("void", row("a", (True,)), row("b", (True,), flags=[ERROR]), a="recovered", b="void"), "HIGH"),
    (made("nothing", row("a", (False,)), row("b", (False,)), a="nothing", b="absent"), "CANNOT SAY"),
    (made("absent", row("a", (False,)), row("b", (False,)), a="absent", b="absent"), "LOW"),
]


@pytest.mark.parametrize(("record", "label"), CASES)
def test_the_risk_of_each_verdict_is_the_same_everywhere(record: Record, label: str) -> None:
    found = risk(record)
    assert found is not None
    assert found.label == label
    said = f"Risk of sharing it: {label} ({found.why})."
    assert said in terminal.text(record)
    short = summary.summary(record)
    assert json.loads(json.dumps(short))["risk"] == {"label": label, "why": found.why}
    assert said.replace(label, f"**{label}**") in summary.markdown(short)
    page = html.render(record)
    assert said.replace(label, f"<b>{label}</b>") in page
    assert risk(redacted(record)) == found


@pytest.mark.parametrize(("record", "label"), CASES)
def test_the_risk_never_contradicts_the_gate(record: Record, label: str) -> None:
    """What `--fail-on` stops is no low risk, and what is low passes every bar."""
    for bar, least in (("recovered", ("HIGH",)), ("partly", ("HIGH", "MEDIUM"))):
        if exit_code(record, bar) == LEAK:
            assert label in least
        if label == "LOW":
            assert exit_code(record, bar) == 0


def test_every_level_has_a_risk_and_only_proofs_are_low() -> None:
    assert BY_LEVEL.keys() == set(get_args(Level))
    assert [level for level, one in BY_LEVEL.items() if one.label == "LOW"] == ["absent"]
    assert {one.label for one in BY_LEVEL.values()} == set(ORDER)


def test_each_observation_has_its_own() -> None:
    record = made("recovered", row("a", (True,)), row("b", (False,)), a="recovered", b="nothing")
    assert [one["risk"]["label"] for one in summary.summary(record)["observations"]] == ["HIGH", "CANNOT SAY"]
    page = html.render(record)
    assert [page.count(f"Risk of sharing it: <b>{label}</b>") for label in ("HIGH", "CANNOT SAY")] == [2, 1]


def test_a_record_that_audits_nothing_has_none() -> None:
    record = made("unscored")
    record["table"] = [{"psnr_db": 3.0}]
    assert risk(record) is None
    assert summary.summary(record)["risk"] is None
    assert "Risk of sharing" not in html.render(record) + terminal.text(record) + summary.markdown(
        summary.summary(record)
    )
