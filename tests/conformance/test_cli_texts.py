"""The command line with texts: the same commands as with pictures, by the folder of a language model."""

import io
import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from gradleak.attacks import ATTACKS
from gradleak.attacks.dager.dager import Dager
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.audit.loop import Audited
from gradleak.cli.app import main
from gradleak.cli.auditing import said
from gradleak.formats.model_folder import read_language_model, write_base
from gradleak.formats.observation_file import load_observation
from gradleak.formats.secret_file import load_secret, save_secret
from gradleak.modalities.language_models import LanguageArchitecture, Task
from gradleak.modalities.texts import load_texts
from gradleak.observations.adapter import Adapter
from gradleak.observations.observation import TextObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update
from gradleak.report import record
from gradleak.victims.small_language import Kind, small_model, train_tokenizer

Run = Callable[..., str]
TRUTH = load_texts("embedded", indices=[0, 3]).texts


def folder_of(path: Path, kind: Kind, task: Task, layers: int = 2) -> Path:
    """A small transformer as save_pretrained leaves it, freshly initialised."""
    tokenizer = train_tokenizer(load_texts("embedded", "train").texts, kind, size=420)
    write_base(small_model(kind, tokenizer, task, width=96, layers=layers, spread=0.1), path)
    return path


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("gpt2"), "gpt2", "causal-lm")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(tmp_path_factory.mktemp("bert"), "bert", "classification", layers=3)


@pytest.fixture(scope="module")
def captured(gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2's gradient on two texts, with the secret."""
    out = tmp_path_factory.mktemp("captured") / "gradient"
    made = [
        "capture",
        "gradient",
        "--model",
        str(gpt2),
        "--task",
        "causal-lm",
        "--indices",
        "0",
        "3",
        "--out",
        str(out),
    ]
    with redirect_stdout(io.StringIO()):
        assert main(made) == 0
    return out


def seen(folder: Path) -> Path:
    return folder / "observation.safetensors"


def rows_of(out: Path) -> dict[str, Any]:
    return {row["attack"]: row for row in record.read(out / "record.json")["results"]}


def texts_of(out: Path) -> list[str]:
    """The texts that `attack --attack dager` has left, spaces at the ends apart."""
    return [text.strip() for text in json.loads((out / "dager-texts.json").read_text(encoding="utf-8"))["texts"]]


@dataclass(frozen=True, kw_only=True)
class Interrupted:
    """Ctrl-C in the middle of an attack."""

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update, Adapter)
    modality: ClassVar[str] = LanguageArchitecture.modality

    def __call__(self, observation: Any, *, generator: torch.Generator, on_step: object = None) -> Reconstruction:
        raise KeyboardInterrupt


SEEN: list[TextObservation] = []


@dataclass(frozen=True, kw_only=True)
class Watched(Dager):
    """DAGER, with what it was given kept in SEEN."""

    def __call__(self, observation: Any, *, generator: torch.Generator, on_step: Any = None) -> Reconstruction:
        SEEN.append(observation)
        return super().__call__(observation, generator=generator, on_step=on_step)


# --- Audits ---


def test_an_audit_scores_texts_beside_controls(
    tmp_path: Path, captured: Path, ok: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bare audit: all attacks on texts, none on pictures. The second one is interrupted: what the first has found is kept."""
    monkeypatch.setitem(ATTACKS, "past-the-rank", Interrupted)
    audit = ["audit", seen(captured), "--secret", captured / "secret.safetensors", "--out", tmp_path / "out"]
    assert main([str(part) for part in audit]) == 130
    made = record.read(tmp_path / "out" / "record.json")
    (row,) = made["results"]
    assert row["attack"] == "dager"
    assert row["media"] == "text/plain"
    shown = {name: [text.strip() for text in texts] for name, texts in row["shown"].items()}
    assert shown["truth"] == shown["reconstruction"] == list(TRUTH)
    assert (
        row["controls"].keys() == {"frequent_words", "wrong_observation"} == shown.keys() - {"truth", "reconstruction"}
    )
    assert row["scores"]["exact_match"] == row["scores"]["rouge1"] == [1.0, 1.0]
    assert row["controls"]["wrong_observation"]["exact_match"] == [0.0, 0.0]
    assert row["recovered"] == row["proven"] == [True, True]
    assert {flag["name"]: flag["level"] for flag in row["flags"]} == {"replay": "info"}
    assert made["verdict"]["level"] == "recovered"
    assert made["verdict"]["headline"].startswith("2 of 2 private texts came back")
    assert "The best attack is dager" in made["verdict"]["sentence"]
    assert {"item": "texts", "revealed": False, "detail": "the secret", "observation": "gradient"} in made[
        "threat_model"
    ]
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert TRUTH[0] in page


def test_an_attack_prints_the_texts_that_it_found_and_no_empty_lines() -> None:
    """Of several texts `embedding-rows` knows words, and no text."""
    row: Any = {"attack": "embedding-rows", "status": "A bag of words.", "media": "text/plain"}
    row["shown"] = {"reconstruction": ["", "a text"]}
    assert said(Audited(row, None)).splitlines() == ["embedding-rows: A bag of words.", "  a text"]


def test_what_is_proven_is_recovered_without_the_secret(tmp_path: Path, captured: Path, ok: Run) -> None:
    said = ok("audit", seen(captured), "--attacks", "dager", "dlg", "--dager.beam", 32, "--out", tmp_path / "out")
    made = record.read(tmp_path / "out" / "record.json")
    assert made["verdict"]["level"] == "recovered"
    assert "2 of 2 private samples proven by dager" in made["verdict"]["sentence"]
    assert made["verdict"]["sentence"] in said
    rows = rows_of(tmp_path / "out")
    assert rows["dager"]["parameters"]["beam"] == 32
    assert rows["dager"]["scores"] == {}
    assert rows["dlg"]["status"] == "Not run: It recovers pictures, and the observed model takes texts."
    assert sorted(texts_of(tmp_path / "out")) == sorted(TRUTH)


def test_the_secret_of_other_texts_voids_the_verdict(tmp_path: Path, captured: Path, ok: Run) -> None:
    """And still, what is proven needs no secret."""
    secret = load_secret(captured / "secret.safetensors")
    save_secret(replace(secret, inputs=tuple(row[::-1] for row in secret.inputs)), tmp_path / "other")
    ok("audit", seen(captured), "--secret", tmp_path / "other", "--attacks", "dager", "--out", tmp_path / "out")
    verdict = record.read(tmp_path / "out" / "record.json")["verdict"]
    assert verdict["level"] == "void"
    assert "it is another secret" in verdict["sentence"]
    assert "What needs no secret stands: 2 of 2 private samples proven by dager" in verdict["sentence"]


def test_public_texts_that_hold_the_secret_void_the_verdict(tmp_path: Path, captured: Path, ok: Run) -> None:
    audit = ["--secret", captured / "secret.safetensors", "--public-split", "test", "--attacks", "dager"]
    ok("audit", seen(captured), *audit, "--out", tmp_path / "out")
    made = record.read(tmp_path / "out" / "record.json")
    assert made["verdict"]["level"] == "void"
    assert "2 private texts are in the public pool" in made["verdict"]["sentence"]


def test_a_rerun_gives_the_same_texts(tmp_path: Path, captured: Path, ok: Run) -> None:
    ok("attack", seen(captured), "--attack", "dager", "--dager.beam", 32, "--out", tmp_path / "first")
    ok("rerun", tmp_path / "first" / "record.json", "--out", tmp_path / "second")
    first, second = (rows_of(tmp_path / name)["dager"] for name in ("first", "second"))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert sorted(texts_of(tmp_path / "second")) == sorted(TRUTH)


# --- Every kind of release ---


def test_an_update_of_texts_is_captured_and_audited(
    gpt2: Path, tmp_path: Path, ok: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two local steps, so small that the first block's inputs stay what they were. The control is an update too."""
    monkeypatch.setitem(ATTACKS, "dager", Watched)
    SEEN.clear()
    small = ["--learning-rate", "1e-5", "--local-steps", 2, "--local-batch-size", 1, "--indices", 0, 3]
    ok("capture", "update", "--model", gpt2, "--task", "causal-lm", *small, "--out", tmp_path / "u")
    secret = ["--secret", tmp_path / "u" / "secret.safetensors", "--attacks", "dager"]
    ok("audit", seen(tmp_path / "u"), *secret, "--out", tmp_path / "a")
    row = rows_of(tmp_path / "a")["dager"]
    assert row["observation"]["kind"] == "update"
    assert row["scores"]["exact_match"] == [1.0, 1.0]
    mine, others = SEEN
    assert isinstance(mine.release, Update)
    assert others.release == mine.release
    assert others.released.keys() == mine.released.keys()
    assert row["shown"]["wrong_observation"] != row["shown"]["reconstruction"]


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_an_adapter_of_texts_is_captured_as_peft_saves_it(
    kind: Kind, request: pytest.FixtureRequest, tmp_path: Path, ok: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2's layers are transposed. The text comes out of PEFT's folder and of our file alike; the control is an adapter too."""
    monkeypatch.setitem(ATTACKS, "dager", Watched)
    SEEN.clear()
    task = ["--task", "causal-lm" if kind == "gpt2" else "classification"]
    out, flags = tmp_path / "captured", ["--rank", 32, "--lr", "1e-3", "--steps", 1]
    ok("capture", "adapter", "--model", request.getfixturevalue(kind), *flags, *task, "--out", out)
    folder = [out / "adapter", "--base", out / "base", *task]
    ok("attack", *folder, "--attack", "dager", "--out", tmp_path / "a")
    secret = ["--secret", out / "secret.safetensors", "--attacks", "dager"]
    ok("audit", seen(out), *secret, "--out", tmp_path / "b")
    for name in "ab":
        assert texts_of(tmp_path / name) == [TRUTH[0]]
    assert rows_of(tmp_path / "b")["dager"]["observation"]["kind"] == "adapter"
    _, mine, others = SEEN
    assert others.adapter.recipe == mine.adapter.recipe
    assert others.adapter.start.keys() == mine.adapter.start.keys()
    assert others.released.keys() == mine.released.keys()


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_an_adapter_of_texts_that_began_elsewhere(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, ok: Run
) -> None:
    """PiSSA subtracts its start from the weights, which are transposed in GPT-2: the release replays, and the base gives its start."""
    task = ["--task", "causal-lm" if kind == "gpt2" else "classification"]
    task += ["--target-modules", "c_attn" if kind == "gpt2" else "query,value"]
    out, flags = tmp_path / "captured", ["--rank", 32, "--lr", "1e-3", "--init", "pissa"]
    ok("capture", "adapter", "--model", request.getfixturevalue(kind), *flags, *task, "--out", out)
    ok("audit", seen(out), "--secret", out / "secret.safetensors", "--attacks", "dager", "--out", tmp_path / "a")
    row = rows_of(tmp_path / "a")["dager"]
    assert {flag["name"]: flag["level"] for flag in row["flags"]}["replay"] == "info"
    assert row["scores"]["exact_match"] == [1.0]
    folder = [out / "adapter", "--base", out / "base", *task[:2], "--lr", "1e-3", "--attack", "dager"]
    ok("attack", *folder, "--initial", out / "initial", "--out", tmp_path / "b")
    assert texts_of(tmp_path / "b") == [TRUTH[0]]
    ok("attack", *folder, "--out", tmp_path / "c")
    assert texts_of(tmp_path / "c") == [TRUTH[0]]


def test_a_folder_as_peft_saves_it_gives_its_text_away(bert: Path, tmp_path: Path, ok: Run) -> None:
    """Ten SGD steps by PEFT and torch.optim themselves on one text of 14 tokens, rank 32."""
    from peft import LoraConfig, get_peft_model

    architecture = read_language_model(bert, "classification").architecture
    base: Any = read_language_model(bert, "classification").solid()
    positional, named = architecture.arguments(architecture.encode(TRUTH[:1]), torch.zeros(()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = get_peft_model(base, LoraConfig(r=32, lora_alpha=32, target_modules=["query", "value"])).eval()
    optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(10):
        optimiser.zero_grad()
        logits = adapted(*positional, **named).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor([1])).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    adapted.save_pretrained(str(tmp_path / "adapter"))
    ok("attack", tmp_path / "adapter", "--base", bert, "--attack", "dager", "--out", tmp_path / "found")
    assert texts_of(tmp_path / "found") == [TRUTH[0]]


def test_masked_texts_are_scored_without_their_masks(tmp_path: Path, ok: Run) -> None:
    model, out = folder_of(tmp_path / "model", "bert", "masked-lm"), tmp_path / "captured"
    ok("capture", "gradient", "--model", model, "--task", "masked-lm", "--out", out)
    secret = load_secret(out / "secret.safetensors")
    mask = load_observation(seen(out)).model.architecture.tokenizer.mask_token_id
    assert any(mask in row for row in secret.inputs)
    ok("audit", seen(out), "--secret", out / "secret.safetensors", "--attacks", "dager", "--out", tmp_path / "a")
    row = rows_of(tmp_path / "a")["dager"]
    assert row["scores"]["exact_match"] == [1.0]
    assert [text.strip() for text in row["shown"]["truth"]] == [TRUTH[0]]


def test_a_plain_gradient_of_a_language_model(
    tmp_path: Path, gpt2: Path, captured: Path, ok: Run, refused: Run
) -> None:
    """{name: gradient} as somebody's training loop leaves it, with the folder of the model."""
    save_file(dict(load_observation(seen(captured)).released), tmp_path / "gradient.safetensors")
    taken = [tmp_path / "gradient.safetensors", "--model", gpt2, "--task", "causal-lm", "--batch-size", 2]
    attack = ["attack", *taken, "--attack", "dager"]
    ok(*attack, "--out", tmp_path / "found")
    assert sorted(texts_of(tmp_path / "found")) == sorted(TRUTH)
    for flags in (
        ["--classes", 2],
        ["--input-shape", 1, 8, 8],
        ["--mode", "eval"],
    ):
        assert f"{flags[0]} says nothing about" in refused(*attack, *flags, "--out", tmp_path / "o")
    model = (gpt2 / "model.safetensors").read_bytes()
    try:
        (gpt2 / "model.safetensors").write_bytes(model[:-1] + b"\0")
        again = ["rerun", tmp_path / "found" / "record.json", "--out", tmp_path / "again"]
        assert "no longer the file" in refused(*again)
    finally:
        (gpt2 / "model.safetensors").write_bytes(model)


def test_a_defended_gradient_of_texts(tmp_path: Path, gpt2: Path, ok: Run) -> None:
    made = ["capture", "gradient", "--model", gpt2, "--task", "causal-lm", "--defense", "noise:1e-6"]
    ok(*made, "--out", tmp_path / "c")
    audit = ["--secret", tmp_path / "c" / "secret.safetensors", "--attacks", "dager"]
    ok("audit", seen(tmp_path / "c"), *audit, "--out", tmp_path / "a")
    row = rows_of(tmp_path / "a")["dager"]
    assert row["defense"] == {"kind": "Gaussian noise of deviation 1e-06"}
    assert "error" not in {flag["level"] for flag in row["flags"]}
    facts = {row["item"]: row["detail"] for row in record.read(tmp_path / "a" / "record.json")["threat_model"]}
    assert facts["defenses"] == "Gaussian noise of deviation 1e-06"


# --- Bad input ---


def test_captures_of_texts_that_cannot_be(tmp_path: Path, gpt2: Path, refused: Run) -> None:
    gradient = ["capture", "gradient", "--model", gpt2, "--task", "causal-lm", "--out", tmp_path / "o"]
    adapter = ["capture", "adapter", *gradient[2:]]
    for command, flags, hint in (
        (gradient, ["--indices", 4000], "Row 4000 does not exist"),
        (gradient, ["--weights", gpt2 / "model.safetensors"], "--weights is for pictures"),
        (gradient, ["--resize", 8, 8], "--resize is for pictures"),
        (gradient, ["--epochs", 1], "leave --epochs out"),
        (gradient, ["--mode", "train"], "--mode eval is all there is"),
        (gradient, ["--task", "masked-lm"], "mask"),
        (adapter, ["--target-modules", "c_atn"], "no linear or convolutional layer called 'c_atn'"),
        (adapter, ["--steps", 30, "--lr", "1e6"], "diverged"),
    ):
        assert hint in refused(*command, *flags)
        assert not (tmp_path / "o" / "observation.safetensors").exists()
        shutil.rmtree(tmp_path / "o", ignore_errors=True)


def test_folders_that_are_no_language_model(tmp_path: Path, refused: Run) -> None:
    made = ["capture", "gradient", "--model", tmp_path, "--task", "causal-lm", "--out", tmp_path / "o"]
    assert "--task is for language models" in refused(*made)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "holds no language model" in refused(*made)


def test_an_attack_on_pictures_names_those_on_texts(tmp_path: Path, captured: Path, refused: Run) -> None:
    said = refused("attack", seen(captured), "--attack", "dlg", "--out", tmp_path / "a")
    assert "It recovers pictures, and the observed model takes texts. Attacks that do: dager, " in said
    said = refused("attack", seen(captured), "--attack", "past-the-rank", "--out", tmp_path / "a")
    assert "an adapter, and what was released is a gradient. Attacks that do: dager, " in said


def test_secrets_of_another_kind(tmp_path: Path, captured: Path, ok: Run, refused: Run) -> None:
    ok("capture", "gradient", "--model", "mlp", "--data", "digits", "--out", tmp_path / "digit")
    pictures, texts = tmp_path / "digit" / "secret.safetensors", captured / "secret.safetensors"
    audit = ["audit", seen(captured), "--attacks", "dager", "--out", tmp_path / "a"]
    assert "holds pictures, and the observed model takes texts" in refused(*audit, "--secret", pictures)
    audit = ["audit", seen(tmp_path / "digit"), "--attacks", "analytic", "--out", tmp_path / "a"]
    assert "holds texts, and the observed model takes pictures" in refused(*audit, "--secret", texts)


def test_texts_are_no_start_of_a_search(tmp_path: Path, captured: Path, ok: Run, refused: Run) -> None:
    ok("attack", seen(captured), "--attack", "dager", "--out", tmp_path / "a")
    start = ["--start", tmp_path / "a" / "reconstruction.safetensors", "--out", tmp_path / "b"]
    assert "no search" in refused("attack", seen(captured), "--attack", "dager", *start)
