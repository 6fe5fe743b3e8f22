"""The study of defenses on texts, what training behind a defense costs, and embeddings that are withheld."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from gradleak.attacks.embedding_rows import EmbeddingRows
from gradleak.audit.advice import Tried
from gradleak.errors import BadInput, NotObserved
from gradleak.modalities.language_models import Task
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.modalities.texts import Texts, holds_texts, load_texts
from gradleak.observations.defense_names import Chosen
from gradleak.observations.model import LanguageModel, Model
from gradleak.studies import defenses, text_victims
from gradleak.studies.run import Plan, run
from gradleak.studies.table import Table
from gradleak.victims.defended import accuracy, perplexity, train_behind
from gradleak.victims.gradient import capture_gradient
from gradleak.victims.small_language import Kind, small_model, train_tokenizer

TEXTS = load_texts("embedded", "train", limit=24)


def model(kind: Kind = "bert", task: Task = "classification") -> LanguageModel:
    return small_model(kind, train_tokenizer(TEXTS.texts, kind, size=400), task, spread=0.1)


def trained(start: LanguageModel, *defenses: str, texts: Texts = TEXTS, epochs: int = 4) -> LanguageModel:
    return train_behind(start, texts, Chosen.of(defenses).defenses, epochs=epochs, seed=0, batch=8)


# --- What it costs ---


def test_a_model_that_knows_nothing_is_perplexed_by_every_token() -> None:
    """All weights zero: each of the vocabulary's tokens is as likely as the others."""
    start = model("gpt2", "causal-lm")
    zero = Model.of(start.solid(), start.architecture)
    blank = LanguageModel(
        **{**vars(zero), "parameters": {name: torch.zeros_like(p) for name, p in zero.parameters.items()}}
    )
    assert perplexity(blank, TEXTS) == pytest.approx(len(start.architecture.tokenizer), rel=1e-5)


def test_perplexity_is_over_all_tokens_and_not_a_mean_over_texts() -> None:
    """exp of the loss of one padded batch, whose mean is over the tokens of all its texts."""
    start = model("gpt2", "causal-lm")
    texts = Texts((*TEXTS.texts[:3], "a ."), torch.zeros(4, dtype=torch.int64), 2, "", "")
    tokens, _ = start.architecture.feed(texts)
    together = start.loss({}, tokens, None).exp()
    assert perplexity(start, texts) == pytest.approx(float(together), rel=1e-5)


def test_training_behind_defenses_learns_texts_and_noise_alone_does_not() -> None:
    """Of 24 texts in two classes a network of 100,000 numbers learns the labels by heart. Behind noise a thousand times as long as the
    gradient, what it learns is no more than chance gives: at least 20 of 24 by chance has a probability below .001."""
    start = model()
    assert accuracy(trained(start, epochs=12), TEXTS) == 1
    assert accuracy(trained(start, "relative-noise:1000"), TEXTS) < 20 / 24
    decoder = model("gpt2", "causal-lm")
    assert perplexity(trained(decoder), TEXTS) < perplexity(decoder, TEXTS)


# --- Embeddings that are withheld ---


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_withheld_embeddings_hide_their_tables_and_nothing_else(kind: Kind) -> None:
    plain, _ = capture_gradient(model(kind), TEXTS)
    seen, secret = capture_gradient(model(kind), TEXTS, defenses=Chosen.of(("withheld-embeddings",)).defenses)
    gone = {*plain.released} - {*seen.released}
    assert gone
    assert all("embed" in name or ".wte." in name or ".wpe." in name for name in gone)
    assert all(torch.equal(t, plain.released[name]) for name, t in seen.released.items())
    assert seen.residual(secret.inputs, secret.labels) < 1e-5  # float32: what is left is replayed as ever
    with pytest.raises(NotObserved, match="gradient of the token embeddings was not released"):
        EmbeddingRows()(seen, generator=torch.Generator())


def test_embeddings_that_are_withheld_are_not_trained() -> None:
    start = model()
    ended = trained(start, "withheld-embeddings", epochs=1)
    still = {name for name, p in start.parameters.items() if torch.equal(p, ended.parameters[name])}
    assert "bert.embeddings.word_embeddings.weight" in still
    assert "classifier.weight" not in still


def test_only_what_has_embeddings_can_withhold_them() -> None:
    [defense] = Chosen.of(("withheld-embeddings",)).defenses
    mlp = Architecture("mlp", (1, 8, 8), 10)
    with pytest.raises(BadInput, match="The model has no embeddings whose gradients could be withheld"):
        capture_gradient(Model.of(mlp.build(0), mlp), load("digits", indices=[0]), defenses=(defense,))
    with pytest.raises(BadInput, match="withheld where the model is"):
        defense.apply({}, torch.Generator())


# --- The study ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The texts that are embedded, as a folder of parquet files."""
    (tmp_path / "texts").mkdir()
    for split in ("train", "test"):
        every = load_texts("embedded", split)
        table = pa.table({"text": list(every.texts), "label": every.labels.tolist()})
        parquet.write_table(table, tmp_path / "texts" / f"{split}.parquet")
    return tmp_path / "texts"


def test_data_that_are_texts_are_told_from_pictures(folder: Path) -> None:
    assert holds_texts(str(folder))
    assert not holds_texts("embedded")
    assert not holds_texts("digits")


def test_texts_have_accuracy_and_perplexity_beside_what_leaks(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text of fewer tokens than there are numbers in a row comes back from the rows of its words, also from the largest tenth of them."""
    monkeypatch.setattr(text_victims, "packaged", lambda name: None)  # a small BERT, which says so
    table = run(Plan(study=defenses.STUDY, data=str(folder), out=tmp_path / "out", size="smoke"))
    assert not table.failed
    read = table.where(model="encoder", attack="embedding-rows")
    assert [row["rouge1"] for row in read] == [100, 100]
    assert all(0 <= row["accuracy"] <= 1 for row in table.where(model="encoder", attack="training"))
    assert all(row["perplexity"] > 1 for row in table.where(model="decoder", attack="training"))
    sentence = json.loads((tmp_path / "out" / "record.json").read_text())["verdict"]["sentence"]
    assert f"a small bert, as {text_victims.STAND_IN}" in sentence
    assert "A gradient of 1 text in the encoder, 1 texts attacked." in sentence
    assert "hides nothing: ROUGE-1 stays at 100 % (embedding-rows), and 100 % of the texts come back whole" in sentence
    assert "accuracy goes from" in sentence
    assert "perplexity goes from" in sentence


def test_an_attack_that_needs_no_knowledge_is_no_use_of_it() -> None:
    """Rows of words are read without being told; DAGER, which is not told, reads nothing: nobody is protected by not telling."""
    case = {"model": "encoder", "shared": "gradient", "batch": 1, "defense": "bits:4"}
    read = {**case, "attack": "embedding-rows", "knows": True, "rouge1": 94.0, "exact_match": 60.0}
    blind = {**case, "attack": "dager", "knows": False, "rouge1": 0.0, "exact_match": 0.0}
    rows = [row | {"frequent_words_rouge1": 26.0} for row in (read, blind)]
    [tried] = defenses.tried_of(
        Table([{**case, "attack": "training", "accuracy": 0.7}, *rows]), ("encoder", "gradient", 1)
    )
    assert tried == Tried("bits:4", 0.94, "embedding-rows", 0.26, unaware=0.94, whole=0.6, accuracy=0.7)
