"""Masked language modelling: what is masked, and what the head's gradient says of it."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from transformers import RobertaConfig

from gradleak.attacks.dager.dager import Dager
from gradleak.attacks.masked_targets import unmask
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.errors import BadInput
from gradleak.formats.secret_file import Secret
from gradleak.modalities.language_models import NO_TARGET, LanguageArchitecture, build
from gradleak.modalities.modality import Tokens
from gradleak.modalities.texts import load_texts
from gradleak.observations.model import LanguageModel, Model
from gradleak.observations.observation import TextObservation
from gradleak.observations.training import Recipe
from gradleak.victims.gradient import capture_gradient, share_update
from gradleak.victims.small_language import small_model, train_tokenizer


@cache
def model(kind: str = "bert") -> LanguageModel:
    tokenizer = train_tokenizer(load_texts("embedded", "train").texts, "bert", size=420)
    if kind == "bert":
        return small_model("bert", tokenizer, "masked-lm", width=96, layers=3, positions=64, spread=0.1)
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=64,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
    )
    module, config = build(config, "masked-lm", classes=2, tokenizer=tokenizer, seed=0)
    return Model.of(module, LanguageArchitecture("roberta", config, "masked-lm", tokenizer))


@cache
def captured(kind: str = "bert", count: int = 3) -> tuple[TextObservation, Secret]:
    return capture_gradient(model(kind), load_texts("embedded", indices=range(count)))


def before(secret: Secret) -> Tokens:
    """What was masked in it, put back."""
    tokens: Tokens = model().architecture.original(secret.inputs, secret.labels)
    return tokens


def as_found(sentences: Tokens) -> Reconstruction:
    return Reconstruction(sentences, None, 0.0, "Found.", Outcome.SOLVED, (True,) * len(sentences))


def test_masking_is_that_of_bert() -> None:
    """Of the tokens, 15 % are chosen; of these 80 % masked, 10 % kept: Devlin et al. 2018. Bounds: 5 standard deviations."""
    architecture = model().architecture
    tokens = architecture.encode(load_texts("embedded", "train", limit=300).texts)
    fed, labels = architecture.masked(tokens, 0)
    assert architecture.original(fed, labels) == tokens
    chosen = [(row[i], fed[n][i]) for n, row in enumerate(tokens) for i in range(len(row)) if labels[n, i] != NO_TARGET]
    special = set(architecture.tokenizer.all_special_ids)
    assert not special & {old for old, _ in chosen}
    plain = sum(token not in special for row in tokens for token in row)
    assert len(chosen) / plain == pytest.approx(0.15, abs=0.03)  # at least one of each text, and whole numbers
    deviation = (0.8 * 0.2 / len(chosen)) ** 0.5
    share = sum(new == architecture.tokenizer.mask_token_id for _, new in chosen) / len(chosen)
    assert share == pytest.approx(0.8, abs=5 * deviation)
    kept = sum(new == old for old, new in chosen) / len(chosen)
    assert kept == pytest.approx(0.1, abs=5 * (0.1 * 0.9 / len(chosen)) ** 0.5)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_masked_tokens_are_read_from_the_gradient_of_the_head(kind: str) -> None:
    """All of them: the equations are exact while there are fewer tokens than directions."""
    seen, secret = captured(kind)
    found = unmask(seen, as_found(secret.inputs))
    assert found.value == before(secret) != secret.inputs
    count = int((secret.labels != NO_TARGET).sum()) if secret.labels is not None else 0
    assert f"{count} of {count} masked tokens" in found.status


def test_the_attack_gives_the_whole_text() -> None:
    """Two texts: DAGER finds what the model saw, the head what was under the masks."""
    private = load_texts("embedded", indices=[0, 3])
    seen, _ = capture_gradient(model(), private)
    found = Dager()(seen, generator=torch.Generator().manual_seed(0))
    assert sorted(text.strip() for text in model().architecture.show(found.value)) == sorted(private.texts)
    assert all(found.proven)


def test_an_update_shows_them_too() -> None:
    """One step: the change is the gradient times a number that need not be known."""
    seen, secret = captured()
    update = share_update(seen, secret, Recipe(learning_rate=1e-3, steps=1))
    assert unmask(update, as_found(secret.inputs)).value == before(secret)


def test_sentences_that_are_wrong_unmask_nothing() -> None:
    """Under other inputs the solved vectors point nowhere: no token is within the tolerance."""
    seen, secret = captured()
    wrong = tuple(tuple(reversed(row)) for row in secret.inputs)
    found = unmask(seen, as_found(wrong))
    assert found.value == wrong
    assert "0 of" in found.status


def test_why_nothing_was_sought_is_said() -> None:
    seen, secret = captured()
    short = {name: t for name, t in seen.released.items() if "transform.dense.weight" not in name}
    found = unmask(replace(seen, released=short), as_found(secret.inputs))
    assert found.value == secret.inputs
    assert "cls.predictions.transform.dense.weight was not released" in found.status
    found = unmask(seen, as_found(secret.inputs * 4))
    assert "96 directions" in found.status
    assert unmask(seen, as_found(())).status == "Found."


def test_what_cannot_be_masked_is_refused() -> None:
    private = load_texts("embedded", indices=[0])
    with pytest.raises(BadInput, match="are its text"):
        capture_gradient(model(), private, reveal_labels=True)
    decoder = train_tokenizer(load_texts("embedded", "train").texts, "gpt2", size=420)
    with pytest.raises(BadInput, match="masked-lm"):
        small_model("gpt2", decoder, "masked-lm")
    with pytest.raises(BadInput, match="no mask token"):
        small_model("gpt2", decoder, "causal-lm").architecture.masked(((5, 6),), 0)
    with pytest.raises(BadInput, match="could be masked"):
        model().architecture.masked(((model().architecture.tokenizer.cls_token_id,),), 0)
