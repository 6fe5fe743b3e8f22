"""The audit of text: one attack on an observation, scored against the secret and beside its controls; one row of a record."""

import time
from dataclasses import asdict, replace
from typing import Any

import torch

# TODO unmasked
from gradleak.attacks.reconstruction import TextReconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.audit.metrics.texts import frequent_words, score_texts
from gradleak.errors import NotObserved
from gradleak.formats.secret_file import TextSecret
from gradleak.modalities.modality import Tokens
from gradleak.modalities.texts import Texts
from gradleak.observations.model import LanguageModel
from gradleak.observations.observation import TextObservation
from gradleak.report.record import Result, new_result
from gradleak.victims.text import capture_text_gradient


def audit_text(
    observation: TextObservation,
    name: str,
    attack: Any,
    *,
    secret: TextSecret | None = None,
    public: Texts | None = None,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> tuple[Result, TextReconstruction | None]:
    """A row of the record, and what the attack, one of TEXT_ATTACKS, returned (None if it could not run).

    With the secret every sentence is scored, special tokens left out; with public texts too there are two controls: the
    most frequent tokens of these, and the attack on the gradient of as many of them.
    """
    about = {"kind": type(observation).__name__, "batch_size": observation.batch_size}
    row = new_result(name, asdict(attack), about)
    start = time.perf_counter()
    try:
        found = attack(observation, generator=torch.Generator().manual_seed(seed), on_step=on_step)
    except NotObserved as reason:
        return {**row, "status": f"Not run: {reason}"}, None
    row |= {
        "seconds": time.perf_counter() - start,
        "status": found.status,
        "residual": found.residual,
        "texts": {"reconstruction": list(found.texts)},
    }
    if secret is not None:
        row["scores"] = scores(observation.model, found.tokens, unmasked(secret.tokens, secret.labels))
        if public is not None:
            row["controls"] = controls(observation, attack, secret, public, seed)
    return row, found


def scores(model: LanguageModel, found: Tokens, truth: Tokens) -> dict[str, list[float]]:
    """Every metric of every true sentence, special tokens left out."""
    return score_texts([plain(model, tokens) for tokens in found], [plain(model, tokens) for tokens in truth])


def plain(model: LanguageModel, tokens: tuple[int, ...]) -> tuple[int, ...]:
    """A sentence without the special tokens of its tokenizer, which are known beforehand."""
    special = set(model.architecture.tokenizer.all_special_ids)
    return tuple(token for token in tokens if token not in special)


def controls(
    observation: TextObservation, attack: Any, secret: TextSecret, public: Texts, seed: int
) -> dict[str, dict[str, list[float]]]:
    """Scores of the most frequent tokens, and of the attack on another gradient, against the same secret."""
    model, truth = observation.model, unmasked(secret.tokens, secret.labels)
    public = _readable(model, public)
    tokens = model.architecture.encode(public.texts)
    longest = max(map(len, truth))
    blind: Any = tuple(frequent_words([plain(model, sentence) for sentence in tokens], longest))
    guesses = tuple(blind[: len(plain(model, sentence))] for sentence in truth)
    made: dict[str, dict[str, list[float]]] = {"frequent_words": scores(model, guesses, truth)}
    other, _ = capture_text_gradient(model, public.texts[: len(truth)], public.labels[: len(truth)])
    try:
        wrong = attack(other, generator=torch.Generator().manual_seed(seed)).tokens
    except NotObserved:
        wrong = ()
    return {**made, "wrong_observation": scores(model, wrong, truth)}


def _readable(model: LanguageModel, public: Texts) -> Texts:
    """The public texts that the model can take: not empty, and within its positions."""
    lengths = [len(ids) for ids in model.architecture.tokenizer(list(public.texts))["input_ids"]]
    kept = [i for i, text in enumerate(public.texts) if text.strip() and lengths[i] < model.architecture.positions]
    return replace(public, texts=tuple(public.texts[i] for i in kept), labels=public.labels[kept])
