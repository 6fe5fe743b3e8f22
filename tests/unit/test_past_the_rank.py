"""Texts with more tokens than an adapter's rank: the ranking, the search, and what is refused."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from gradleak.attacks.dager.vocabulary import Embeddings
from gradleak.attacks.past_the_rank import PastTheRank, Searched, _moved, _sweep, _Target, ranked
from gradleak.audit.loop import audit
from gradleak.audit.scoring.texts import public
from gradleak.errors import NotObserved
from gradleak.formats.secret_file import Secret
from gradleak.modalities.language_models import Task
from gradleak.modalities.texts import load_texts
from gradleak.observations.model import LanguageModel
from gradleak.observations.observation import TextObservation
from gradleak.observations.training import Recipe
from gradleak.observations.transformer import layout_of
from gradleak.victims.adapter import share_adapter
from gradleak.victims.gradient import capture_gradient, keep_secret
from gradleak.victims.small_language import Kind, small_model, train_tokenizer

EVERY: list[tuple[Kind, Task]] = [("bert", "classification"), ("gpt2", "causal-lm"), ("llama", "causal-lm")]
every = pytest.mark.parametrize(("kind", "task"), EVERY)
RANK = 10  # texts have 12 to 15 tokens


@cache
def model(kind: Kind = "bert", task: Task = "classification") -> LanguageModel:
    tokenizer = train_tokenizer(load_texts("embedded", "train").texts, kind, size=420)
    return small_model(kind, tokenizer, task, width=96, layers=2, positions=64, spread=0.1)


@cache
def shared(
    kind: Kind = "bert", task: Task = "classification", rank: int = RANK, recipe: Recipe | None = None, count: int = 1
) -> tuple[TextObservation, Secret]:
    own = model(kind, task)
    secret = keep_secret(own, load_texts("embedded", indices=range(count)))
    names = [name for block in range(2) for name in layout_of(own).queries(block)]
    return share_adapter(own, secret, modules=names, rank=rank, recipe=recipe), secret


def label(secret: Secret) -> int:
    return 0 if secret.labels is None else int(secret.labels[0])


def zero() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@every
def test_the_true_text_leaves_nothing(kind: Kind, task: Task) -> None:
    """The gradients of B, put together here from deltas and inputs, are those that autograd gave the victim."""
    seen, secret = shared(kind, task)
    target = _Target(seen.model, seen.sketches())
    texts = torch.tensor(secret.inputs)
    assert float(target.distances(texts, label(secret))) < 1e-6
    wrong = texts.clone()
    wrong[0, 2] = (wrong[0, 2] + 1) % 400
    assert float(target.distances(wrong, label(secret))) > 1e-4


@every
def test_true_tokens_rank_high_although_they_fill_the_rank(kind: Kind, task: Task) -> None:
    """Of 420 tokens the median of the true ones is among the first 42; by chance it would be the 210th."""
    seen, secret = shared(kind, task)
    tokens = secret.inputs[0]
    assert len(tokens) > RANK
    views = [view for view in seen.sketches() if view.module in layout_of(seen.model).queries(0)]
    order = ranked(Embeddings.of(seen.model), views, len(tokens), 420, zero())
    places = [order[i].tolist().index(token) for i, token in enumerate(tokens[:-1])]
    assert sorted(places)[len(places) // 2] < 42


def test_the_search_corrects_a_token_and_an_exchange() -> None:
    seen, secret = shared()
    target = _Target(seen.model, seen.sketches())
    truth = torch.tensor(secret.inputs[0])
    likely = torch.stack([truth, (truth + 7) % 400], dim=1)
    wrong = truth.clone()
    wrong[3] = likely[3, 1]
    start = Searched(wrong, label(secret), float(target.distances(wrong[None], label(secret))))
    assert torch.equal(_sweep(target, likely, start, zero()).tokens, truth)
    for text in (truth[[0, 1, 5, 3, 4, 2, *range(6, len(truth))]], truth[[*range(4), *range(5, len(truth))]]):
        start = Searched(text, label(secret), float(target.distances(text[None], label(secret))))
        assert torch.equal(_moved(target, likely, start, 10).tokens, truth)


def test_more_comes_back_than_frequent_words_would_give() -> None:
    """From an adapter after five steps; by little effort."""
    seen, secret = shared(recipe=Recipe(learning_rate=1e-3, steps=5))
    pool = public("embedded", "train", seen.model, limit=50)
    [row] = audit(seen, {"past-the-rank": PastTheRank(sweeps=1, choices=10)}, pool, secret=secret)
    found = row.reconstruction
    assert found is not None
    assert not any(found.proven)
    assert "not proven" in found.status
    assert 0 < found.residual < 0.5
    (ours,), (blind,) = row.result["scores"]["rouge1"], row.result["controls"]["frequent_words"]["rouge1"]
    assert float(ours or 0) > float(blind or 0)


def test_what_it_is_not_for_is_refused() -> None:
    gradient, _ = capture_gradient(model(), load_texts("embedded", indices=[0]))
    adapter = shared()[0]
    masked = replace(adapter.model, architecture=replace(adapter.model.architecture, task="masked-lm"))
    for seen, hint in (
        (gradient, "reads an adapter, and what was released is a gradient"),
        (replace(adapter, model=masked), "predict is unknown"),
        (shared(count=2)[0], "for one text"),
        (shared(rank=32)[0], "dager tells exactly"),
    ):
        with pytest.raises(NotObserved, match=hint):
            PastTheRank()(seen, generator=zero())
