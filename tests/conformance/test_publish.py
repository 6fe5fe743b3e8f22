"""What is handed on to stand-ins of wandb and of the hub: results by examples/publish_results.py, adapters by `guarded_push`. No private data
are among it, and no adapter that gives too much away."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from gradleak import Architecture, Model, Recipe, fine_tune, load, run_audit, save_secret
from gradleak.errors import BadInput
from gradleak.integrations import hub
from gradleak.integrations.hub import UPLOADED, Withheld, guarded_push
from gradleak.report.files import finish
from gradleak.report.record import new_record, new_result
from gradleak.report.report import Report
from pages import run_page

EXAMPLE = Path(__file__).parents[2] / "examples" / "publish_results.py"
SECRET = "the secret sentence"


@pytest.fixture
def audited(tmp_path: Path) -> Path:
    """The folder of an audit that has one text proven."""
    row: Any = new_result("dager", {}, {"name": "gradient", "kind": "gradient"})
    row |= {"ran": True, "residual": 1e-7, "status": "1 of 1 sentences proven.", "proven": [True]}
    record: Any = new_record({"name": "audit", "arguments": {}}, 0, [])
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


# --- An adapter on its way to the hub ---


class Hub:
    """In place of HfApi: what was made, and what each upload held."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.uploads: list[dict[str, str]] = []

    def create_repo(self, name: str, *, private: bool | None, exist_ok: bool) -> None:
        self.made.append(name)

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        assert repo_id == self.made[-1]
        files = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        self.uploads.append(
            {path.relative_to(folder_path).as_posix(): path.read_text(errors="replace") for path in files}
        )


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of one digit after twenty steps of SGD, as PEFT saves it, with what a checkpoint has beside it."""
    out, architecture = tmp_path_factory.mktemp("tuned") / "tuned", Architecture("mlp", (1, 8, 8), 10)
    base, digit = Model.of(architecture.build(0), architecture), load("digits", indices=[0])
    _, secret = fine_tune(base, digit, rank=8, out=out, recipe=Recipe(learning_rate=1e-2, steps=20))
    save_secret(secret, out / "secret.safetensors")
    (out / "adapter" / "optimizer.pt").write_bytes(b"states")
    (out / "adapter" / "leakage").mkdir()
    (out / "adapter" / "leakage" / "record.json").write_text(SECRET)
    return out


@pytest.mark.parametrize("scored", [True, False])
def test_an_adapter_above_the_bar_or_without_a_verdict_stays_here(tuned: Path, tmp_path: Path, scored: bool) -> None:
    """Of an adapter whose start is known the picture comes back exactly (test_unmixing.py); without the secret nobody knows."""
    fake, out = Hub(), tmp_path / "audited"
    secret = tuned / "secret.safetensors" if scored else None
    about: dict[str, Any] = {"base": tuned / "base", "attacks": ["unmixing"], "api": fake, "out": out}
    why = "gives away more than the bar allows" if scored else "could not be judged"
    with pytest.raises(Withheld, match=f"Nothing was uploaded to me/mine: the adapter {why}") as refused:
        guarded_push(tuned / "adapter", "me/mine", secret=secret, **about)
    assert not fake.made
    assert not fake.uploads
    assert refused.value.report.verdict["level"] == ("recovered" if scored else "unscored")
    assert (out / "report.html").is_file()
    with pytest.raises(BadInput, match="holds other results already"):
        guarded_push(tuned / "adapter", "me/mine", **about)


def test_what_goes_out_is_the_adapter_and_its_card_alone(tuned: Path, tmp_path: Path) -> None:
    """Without a bar; from the model in memory as from a folder, whose card has an older audit in it."""
    fake, folder = Hub(), tmp_path / "checkpoint"
    shutil.copytree(tuned / "adapter", folder)
    (folder / "README.md").write_text("# Mine\n\n## Privacy audit by gradleak\n\nold\n\n## Use\n\nIt works.\n")
    model = SimpleNamespace(save_pretrained=lambda there: shutil.copytree(tuned / "adapter", there, dirs_exist_ok=True))
    about: dict[str, Any] = {"base": tuned / "base", "attacks": ["adam-epsilon"], "api": fake, "fail_on": None}
    for name, given in (("folder", folder), ("model", model)):
        guarded_push(given, "me/mine", out=tmp_path / name, **about)
    assert fake.made == ["me/mine"] * 2
    for upload in fake.uploads:
        assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= {*upload} <= {*UPLOADED}
        assert upload["README.md"].count("## Privacy audit by gradleak") == 1
        assert "Risk of sharing it: **CANNOT SAY**" in upload["README.md"]
    card = fake.uploads[0]["README.md"]
    assert "## Use\n\nIt works." in card
    assert "old" not in card
    assert "## Privacy" not in (tuned / "adapter" / "README.md").read_text()  # what is here stays as it is


def test_who_was_trained_on_decides_where_that_is_asked(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is handed to the audit, and that a bar of membership needs fresh samples; the gate itself: test_summary.py."""
    fake, asked = Hub(), dict[str, Any]()
    record: Any = new_record({"name": "audit", "arguments": {}}, 0, [])
    record["verdict"] = {"level": "nothing", "sentence": "Not found."}
    monkeypatch.setattr(hub, "run_audit", lambda *_, **about: asked.update(about) or Report(record))
    about: dict[str, Any] = {"base": tuned / "base", "out": tmp_path / "audited", "api": fake, "fail_on": "TPR>0.05"}
    with pytest.raises(BadInput, match="is about membership"):
        guarded_push(tuned / "adapter", "me/mine", **about)
    with pytest.raises(Withheld, match="could not be judged"):  # the record holds no membership
        guarded_push(tuned / "adapter", "me/mine", members="a", non_members="b", **about)
    assert (asked["members"], asked["non_members"]) == ("a", "b")
    assert fake.made == []


def test_the_lines_of_the_page_run(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one attack, which runs on nothing here: that is no verdict, however the secret is at hand."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuned").symlink_to(tuned)
    monkeypatch.setattr(hub, "run_audit", lambda place, _, **about: run_audit(place, ["adam-epsilon"], **about))
    with pytest.raises(Withheld, match="could not be judged"):
        run_page("hub", {"model": tuned / "adapter"}, tmp_path)


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    fake = Hub()
    with pytest.raises(BadInput, match="no adapter of PEFT to upload"):
        guarded_push(tmp_path, "me/mine", out=tmp_path / "audited", api=fake)
    with pytest.raises(BadInput, match="is no bar"):
        guarded_push(tmp_path, "me/mine", out=tmp_path / "audited", api=fake, fail_on="never")
    assert fake.made == []
