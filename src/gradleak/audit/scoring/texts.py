"""How recovered texts are scored: matched by ROUGE, over tokens, special ones left out."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradleak.audit.metrics.texts import TEXT_METRICS, frequent_words, match_texts
from gradleak.audit.scoring.scoring import Candidates, Control, Metric, Scores, Scoring, check_labels
from gradleak.errors import BadInput
from gradleak.modalities.modality import Tokens
from gradleak.modalities.texts import Texts, load_texts
from gradleak.observations.model import LanguageModel

LIMIT = 500  # public texts for controls
CLEAR_LEAD = 0.3  # of ROUGE-1, over every blind control: the published bags of frequent words differ by less
HALF = 0.5  # ROUGE-1 above which half of a text's words are right
LABELS = {  # label, decimals, meaning
    "rouge1": (
        "ROUGE-1",
        3,
        "the share of words that truth and reconstruction have in common, whatever their order. 1 is all of them.",
    ),
    "rouge2": ("ROUGE-2", 3, "the same of pairs of neighbouring words."),
    "rouge_l": (
        "ROUGE-L",
        3,
        "the longest run of words that stand in the same order in both, gaps allowed, as a share. 1 is the same text.",
    ),
    "exact_match": ("Word for word", 0, "1 where every word came back in its place, else 0."),
    "position_accuracy": ("Right places", 3, "the share of words that stand in their places."),
}


def public(source: str, split: str, model: LanguageModel, limit: int = LIMIT) -> Texts:
    """Public texts that the model can take: not empty, and within its positions."""
    pool, architecture = load_texts(source, split, limit=limit), model.architecture
    lengths = [len(ids) for ids in architecture.tokenizer(list(pool.texts))["input_ids"]]
    kept = [i for i, text in enumerate(pool.texts) if text.strip() and 0 < lengths[i] < architecture.positions]
    if not kept:
        raise BadInput(f"No text of {source} is within the {architecture.positions} positions of the model.")
    return replace(pool, texts=tuple(pool.texts[i] for i in kept), labels=pool.labels[kept])


def sample(model: LanguageModel, pool: Texts, count: int, seed: int) -> tuple[Tokens, Tensor | None]:
    """The first public texts, with labels that the model has."""
    some = replace(pool, texts=pool.texts[:count], labels=pool.labels[:count] % model.architecture.classes)
    return model.architecture.feed(some, seed=seed)


def check(tokens: Any, model: LanguageModel) -> None:
    """BadInput for pictures, and for tokens that the model does not have."""
    if isinstance(tokens, Tensor):
        raise BadInput("The secret holds pictures, and the observed model takes texts: it is of another observation.")
    size = model.architecture.config.vocab_size
    if any(not 0 <= token < size for row in tokens for token in row):
        raise BadInput(f"The secret holds tokens beyond the model's {size:,}: it is of another model.")


def match(model: LanguageModel, tokens: Tokens, truth: Tokens) -> tuple[Tokens, list[int]]:
    """The best assignment; an empty sentence stands for what an attack did not return."""
    plain = [model.architecture.plain(row) for row in tokens]
    chosen = match_texts(plain, [model.architecture.plain(row) for row in truth])
    left = list(range(len(plain)))
    order = []
    for sentence in chosen:
        index = next((i for i in left if plain[i] == tuple(sentence)), -1)
        order.append(index)
        left = [i for i in left if i != index]
    return tuple(tokens[i] if i >= 0 else () for i in order), order


def words(model: LanguageModel, truth: Tokens, pool: Texts) -> Tokens:
    """The most frequent tokens of the public texts, as many as each true sentence has."""
    architecture = model.architecture
    sentences = [architecture.plain(row) for row in architecture.encode(pool.texts)]
    longest = max(map(len, truth))
    frequent: Any = tuple(frequent_words(sentences, longest))
    return tuple(frequent[: len(architecture.plain(row))] for row in truth)


def recovered(scores: Scores, leads: list[float]) -> list[bool]:
    """Word for word."""
    return [match == 1 for match in scores["exact_match"]]


def partly(scores: Scores, leads: list[float]) -> list[bool]:
    """Most of its words, and clearly more than somebody guesses who has seen nothing."""
    return [rouge > HALF and lead >= CLEAR_LEAD for rouge, lead in zip(scores["rouge1"], leads, strict=True)]


def in_bag(model: LanguageModel, bag: Sequence[int], truth: Tokens, pool: Texts) -> tuple[list[bool], str]:
    """Whether most of a text's words were seen, clearly more than among as many frequent words, and most of the bag is true."""
    plain = model.architecture.plain
    texts, seen = [set(plain(row)) for row in truth], set(plain(tuple(bag)))
    frequent = set(frequent_words([plain(row) for row in model.architecture.encode(pool.texts)], len(seen)))
    every = set().union(*texts)
    right, guessed = len(seen & every), len(frequent & every)
    told = [
        2 * right >= len(seen) > 0
        and len(own & seen) >= max(HALF * len(own), len(own & frequent) + CLEAR_LEAD * len(own))
        for own in texts
    ]
    sentence = (
        f"{len(seen)} distinct words were seen, {right} of them among the {len(every)} of the private texts; of as many frequent "
        f"words {guessed} are."
    )
    return told, sentence


def is_public(tokens: Tokens, pool: Texts, model: LanguageModel) -> list[bool]:
    """Which private texts are among the public ones."""
    known = {model.architecture.plain(row) for row in model.architecture.encode(pool.texts)}
    return [model.architecture.plain(row) in known for row in tokens]


def _metric(name: str) -> Metric:
    measure, (label, decimals, meaning) = TEXT_METRICS[name], LABELS[name]

    def each(model: LanguageModel, tokens: Tokens, truth: Tokens) -> list[float]:
        plain = model.architecture.plain
        return [measure(plain(a), plain(b)) for a, b in zip(tokens, truth, strict=True)]

    return Metric(name, label, "", "higher", decimals, each, meaning)


def candidates(source: str, split: str, model: LanguageModel, limit: int, seed: int) -> Candidates:
    """Random texts of a source that the model can take: not empty, and within its positions."""
    pool, architecture = load_texts(source, split), model.architecture
    order = torch.randperm(len(pool.texts), generator=torch.Generator().manual_seed(seed)).tolist()
    rows, left_out = list[int](), 0
    for row in order:
        if len(rows) == limit:
            break
        text = pool.texts[row]
        fits = bool(text.strip()) and 0 < len(architecture.tokenizer(text)["input_ids"]) < architecture.positions
        rows, left_out = ([*rows, row], left_out) if fits else (rows, left_out + 1)
    if not rows:
        raise BadInput(f"No text of {source} is within the {architecture.positions} positions of the model.")
    if architecture.classes > 1:
        check_labels(pool.labels[rows], architecture.classes, source)
    inputs, labels = architecture.feed(
        replace(pool, texts=tuple(pool.texts[row] for row in rows), labels=pool.labels[rows]), seed=seed
    )
    return Candidates(inputs, labels, rows, pool.labelled or architecture.classes == 1, None, left_out, len(order))


def features(tokens: Tokens, model: LanguageModel) -> Any:
    """How often each token is in a text, and how long it is."""
    from scipy.sparse import lil_matrix

    width = int(model.architecture.config.vocab_size)
    counts = lil_matrix((len(tokens), width + 1))
    for number, row in enumerate(tokens):
        for token in row:
            counts[number, token] += 1
        counts[number, width] = len(row)
    return counts.tocsr()


TEXTS = Scoring(
    media="text/plain",
    metrics=tuple(map(_metric, TEXT_METRICS)),
    controls=(
        Control(
            *("frequent_words", "Frequent words", True, words),
            "the commonest words of public texts, as many as the truth has: what somebody returns who has seen nothing.",
        ),
    ),
    public=public,
    split=lambda pool: (pool, pool),
    wider=lambda pool, model, secret: pool,
    sample=sample,
    check=check,
    match=match,
    rank=lambda matched, truth, decoys: None,
    recovered=recovered,
    partly=partly,
    is_public=is_public,
    candidates=candidates,
    keys=lambda tokens: list(tokens),
    features=features,
    in_bag=in_bag,
)
