"""Texts on the command line, and the recipes about them, at their smallest."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gradleak.cli import app as cli
from gradleak.errors import BadInput
from gradleak.modalities.texts import load_texts
from gradleak.observations.text import Task
from gradleak.studies import RECIPES
from gradleak.studies.text_victims import PACKAGE, Sources, encoder
from gradleak.victims.small_language import Kind, small_model, train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 as save_pretrained leaves it."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(load_texts("embedded", "train").texts, "gpt2", size=420)
    made = small_model("gpt2", tokenizer, "causal-lm", width=96, spread=0.1)
    module: Any = made.module
    module.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_capture_attack_and_audit(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captured = tmp_path / "captured"
    base = ["capture", "gradient", "--model", str(folder), "--task", "causal-lm", "--indices", "0", "3"]
    assert cli.main([*base, "--out", str(captured)]) == 0
    seen = str(captured / "observation.safetensors")
    assert cli.main(["attack", seen, "--attack", "dager", "--beam", "32", "--out", str(tmp_path / "a")]) == 0
    found = json.loads((tmp_path / "a" / "dager-texts.json").read_text(encoding="utf-8"))
    truth = load_texts("embedded", indices=[0, 3]).texts
    assert sorted(text.strip() for text in found["texts"]) == sorted(truth)
    audited = tmp_path / "audited"
    assert cli.main(["audit", seen, "--secret", str(captured / "secret.safetensors"), "--out", str(audited)]) == 0
    record = json.loads((audited / "record.json").read_text(encoding="utf-8"))
    assert record["results"][0]["scores"]["exact_match"] == [1.0, 1.0]
    assert record["verdict"]["level"] == "recovered"
    assert {"item": "texts", "revealed": False, "detail": "the secret"} in record["threat_model"]
    assert (audited / "report.html").is_file()
    assert "2 of 2 sentences proven" in capsys.readouterr().out


def test_a_folder_as_peft_saves_it_gives_its_text_away(tmp_path: Path) -> None:
    """Ten SGD steps by PEFT and torch.optim on one text of 14 tokens, rank 32."""
    import warnings

    import torch
    from peft import LoraConfig, get_peft_model

    tokenizer = train_tokenizer(load_texts("embedded", "train").texts, "bert", size=420)
    made = small_model("bert", tokenizer, "classification", width=96, layers=3, spread=0.1)
    base: Any = made.module
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    ids, mask = made.padded(made.encode(load_texts("embedded", indices=[0]).texts))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = get_peft_model(base, LoraConfig(r=32, lora_alpha=32, target_modules=["query", "value"])).eval()
    optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(10):
        optimiser.zero_grad()
        logits = adapted(input_ids=ids, attention_mask=mask).logits
        torch.nn.functional.cross_entropy(logits, torch.tensor([1])).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    adapted.save_pretrained(str(tmp_path / "adapter"))
    argv = ["attack", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--attack", "dager"]
    assert cli.main([*argv, "--out", str(tmp_path / "found")]) == 0
    found = json.loads((tmp_path / "found" / "dager-texts.json").read_text(encoding="utf-8"))
    assert [text.strip() for text in found["texts"]] == list(load_texts("embedded", indices=[0]).texts)


def test_an_update_of_texts_is_captured_and_audited(folder: Path, tmp_path: Path) -> None:
    """Two local steps, so small that the first block's inputs stay what they were."""
    small = ["--learning-rate", "1e-5", "--local-steps", "2", "--local-batch-size", "1", "--indices", "0", "3"]
    update = ["capture", "update", "--model", str(folder), "--task", "causal-lm", *small]
    assert cli.main([*update, "--out", str(tmp_path / "u")]) == 0
    seen, secret = tmp_path / "u" / "observation.safetensors", tmp_path / "u" / "secret.safetensors"
    assert cli.main(["audit", str(seen), "--secret", str(secret), "--out", str(tmp_path / "a")]) == 0
    row = json.loads((tmp_path / "a" / "record.json").read_text(encoding="utf-8"))["results"][0]
    assert row["observation"]["kind"] == "TextUpdate"
    assert row["scores"]["exact_match"] == [1.0, 1.0]


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_an_adapter_of_texts_is_captured_as_peft_saves_it(kind: Kind, tmp_path: Path) -> None:
    """GPT-2's layers are transposed; of BERT the attack finds the text, from PEFT's folder and from our file alike."""
    tokenizer = train_tokenizer(load_texts("embedded", "train").texts, kind, size=420)
    task: Task = "causal-lm" if kind == "gpt2" else "classification"
    made: Any = small_model(kind, tokenizer, task, width=96, spread=0.1)
    made.module.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = ["--rank", "32", "--lr", "1e-3", "--steps", "1", "--task", task]
    out = tmp_path / "captured"
    assert cli.main(["capture", "adapter", "--model", str(tmp_path / "model"), *recipe, "--out", str(out)]) == 0
    seen = ["--attack", "dager", "--task", task, "--out"]
    folder = [str(out / "adapter"), "--base", str(out / "base")]
    assert cli.main(["attack", *folder, *seen, str(tmp_path / "a")]) == 0
    assert cli.main(["attack", str(out / "observation.safetensors"), *seen, str(tmp_path / "b")]) == 0
    for name in "ab":
        found = json.loads((tmp_path / name / "dager-texts.json").read_text(encoding="utf-8"))
        assert [text.strip() for text in found["texts"]] == list(load_texts("embedded", indices=[0]).texts)


def test_masked_texts_are_scored_without_their_masks(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(load_texts("embedded", "train").texts, "bert", size=420)
    made: Any = small_model("bert", tokenizer, "masked-lm", width=96, spread=0.1)
    made.module.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "captured"
    base = ["capture", "gradient", "--model", str(tmp_path / "model"), "--task", "masked-lm", "--out", str(out)]
    assert cli.main(base) == 0
    secret = str(out / "secret.safetensors")
    audit = ["audit", str(out / "observation.safetensors"), "--secret", secret, "--out", str(tmp_path / "a")]
    assert cli.main(audit) == 0
    row = json.loads((tmp_path / "a" / "record.json").read_text(encoding="utf-8"))["results"][0]
    assert row["scores"]["exact_match"] == [1.0]


def test_bad_input_is_one_sentence(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captured = tmp_path / "captured"
    base = ["capture", "gradient", "--model", str(folder), "--task", "causal-lm"]
    assert cli.main([*base, "--indices", "4000", "--out", str(captured)]) == 2
    assert "Row 4000 does not exist" in capsys.readouterr().err
    assert cli.main([*base, "--out", str(captured)]) == 0
    seen = str(captured / "observation.safetensors")
    assert cli.main(["attack", seen, "--attack", "dlg", "--out", str(tmp_path / "a")]) == 2
    assert "is of texts" in capsys.readouterr().err
    adapter = ["capture", "adapter", "--model", str(folder), "--task", "causal-lm", "--out", str(tmp_path / "b")]
    for flags, hint in (
        (["--init", "pissa"], "start at PEFT's default"),
        (["--target-modules", "c_atn"], "no linear or convolutional layer called 'c_atn'"),
        (["--resize", "8", "8"], "--resize is for pictures"),
        (["--steps", "3", "--lr", "1e30"], "diverged"),
    ):
        assert cli.main([*adapter, *flags]) == 2
        assert hint in capsys.readouterr().err
        assert not (tmp_path / "b" / "observation.safetensors").exists()
        shutil.rmtree(tmp_path / "b", ignore_errors=True)


@pytest.mark.parametrize("name", ["dager-encoder", "dager-decoder", "lora-text", "past-the-rank"])
def test_recipes_run_on_embedded_texts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the small model even where the package with the large one is installed."""
    monkeypatch.setattr("gradleak.studies.text_victims.find_spec", lambda package: None)
    *_, last = RECIPES[name]("embedded", "small", seed=0, device="cpu", start=lambda told: lambda *report: None)
    assert last.table
    for row in last.table:
        assert 0 <= row["frequent_words_rouge1"] < 100
        if name.startswith("dager"):
            assert row["rouge1"] == 100
    assert "ROUGE-1" in last.sentence


def test_data_sets_beside_a_folder_are_found(tmp_path: Path) -> None:
    for name in ("sst2", "rotten_tomatoes"):
        (tmp_path / name).mkdir()
    assert set(Sources.of(str(tmp_path / "sst2")).folders) == {"sst2", "rotten_tomatoes"}
    assert Sources.of("embedded").folders == {"embedded": "embedded"}


def test_the_pretrained_encoder_gives_two_texts_away() -> None:
    """all-MiniLM-L6-v2 with its whole vocabulary, where its package is installed."""
    from importlib.util import find_spec

    import torch

    from gradleak.attacks.dager.dager import Dager
    from gradleak.victims.text import capture_text_gradient

    if find_spec(PACKAGE) is None:
        pytest.skip(f"{PACKAGE} is not installed")
    private = load_texts("embedded", indices=[0, 1])
    seen, secret = capture_text_gradient(encoder("embedded", 0), private.texts, private.labels)
    found = Dager()(seen, generator=torch.Generator().manual_seed(0))
    assert sorted(found.tokens) == sorted(secret.tokens)


def test_a_folder_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    from gradleak.formats.language_folder import read_language_model

    with pytest.raises(BadInput, match="holds no language model"):
        read_language_model(tmp_path, "causal-lm")
