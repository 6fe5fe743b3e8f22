"""examples/publish_results.py: what it hands on, to stand-ins of wandb and of the hub, and that no private data are among it."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from gradleak.report.files import finish
from gradleak.report.record import new_record, new_result

EXAMPLE = Path(__file__).parents[2] / "examples" / "publish_results.py"
SECRET = "the secret sentence"


@pytest.fixture
def audited(tmp_path: Path) -> Path:
    """The folder of an audit that has one text proven."""
    row: Any = new_result("dager", {}, {"name": "gradient", "kind": "gradient"})
    row |= {"ran": True, "residual": 1e-7, "status": "1 of 1 sentences proven.", "proven": [True]}
    record = new_record({"name": "audit", "arguments": {}}, 0, [])
    record["results"] = [{**row, "media": "text/plain", "shown": {"reconstruction": [SECRET]}}]
    record["verdict"] = {"level": "recovered", "headline": "1 of 1 came back.", "sentence": "Proven by dager."}
    folder = tmp_path / "audited"
    folder.mkdir()
    finish(record, folder)
    return folder


def hand_on(folder: Path, *flags: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(EXAMPLE), str(folder), *flags])
        runpy.run_path(str(EXAMPLE), run_name="__main__")


def test_a_run_of_wandb_holds_verdict_risk_and_attacks(audited: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: dict[str, Any] = {"summary": {}}
    run = SimpleNamespace(summary=said["summary"], log=said.update, finish=lambda: said.update(finished=True))
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **given: said.update(given) or run, Table=lambda **rows: rows)
    )
    hand_on(audited, "--wandb", "mine")
    assert (said["project"], said["finished"]) == ("mine", True)
    assert said["summary"] == {"verdict": "recovered", "risk": "HIGH"}
    [row] = said["attacks"]["data"]
    told = dict(zip(said["attacks"]["columns"], row, strict=True))
    assert (told["attack"], told["proven"], told["residual"]) == ("dager", 1, 1e-7)
    assert SECRET not in json.dumps(said)


def test_a_model_card_holds_the_newest_audit_once(audited: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = ModelCard(
        "---\nlicense: mit\n---\n# My adapter\n\n## Privacy audit by gradleak\n\nold\n\n## Use\n\nIt works.\n"
    )
    pushed = []
    monkeypatch.setattr(ModelCard, "load", lambda name: card)
    monkeypatch.setattr(ModelCard, "push_to_hub", lambda self, name, **_: pushed.append((name, str(self))))
    hand_on(audited, "--card", "me/mine")
    [(name, text)] = pushed
    assert name == "me/mine"
    assert text.count("## Privacy audit by gradleak") == text.count("## Use\n\nIt works.") == 1
    assert "license: mit" in text
    assert "Risk of sharing it: **HIGH**" in text
    assert "old" not in text
    assert SECRET not in text
