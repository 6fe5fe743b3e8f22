"""Words by row-sparse recovery: a text past the rank, many as a bag, what chance would find, and what is refused."""

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from gradleak.attacks.dager.vocabulary import Embeddings
from gradleak.attacks.reconstruction import Outcome
from gradleak.attacks.sparse_words import EXACT, Dictionary, SparseWords, _random, changes, pursue
from gradleak.errors import NotObserved
from gradleak.formats.secret_file import Secret
from gradleak.modalities.language_models import Task
from gradleak.modalities.texts import load_texts
from gradleak.observations.adapter import Adapter
from gradleak.observations.model import LanguageModel
from gradleak.observations.observation import Observation, TextObservation
from gradleak.observations.training import Recipe
from gradleak.observations.transformer import layout_of
from gradleak.victims.adapter import lora_start, share_adapter
from gradleak.victims.gradient import capture_gradient, keep_secret
from gradleak.victims.small_language import Kind, small_model, train_tokenizer

SGD = Recipe(learning_rate=0.1, steps=20)


@cache
def model(kind: Kind, task: Task, width: int = 96) -> LanguageModel:
    tokenizer = train_tokenizer(load_texts("embedded", "train").texts, kind, size=420)
    return small_model(kind, tokenizer, task, width=width, layers=2, positions=32, spread=0.1)


@cache
def shared(
    kind: Kind = "bert",
    task: Task = "classification",
    rank: int = 4,
    count: int = 1,
    recipe: Recipe = SGD,
    width: int = 96,
    seed: int = 0,
) -> tuple[TextObservation, Secret]:
    """An adapter of the first block's projections after some steps, beside its start."""
    own = model(kind, task, width)
    secret = keep_secret(own, load_texts("embedded", indices=range(count)))
    modules = layout_of(own).queries(0)
    start = lora_start(own, modules, rank, torch.Generator().manual_seed(seed))
    release = Adapter(start=start, scaling=dict.fromkeys(modules, 1.0), recipe=recipe, origin="given")
    released = release.simulate(own, start, secret.inputs, secret.labels)
    released = {name: change.detach() for name, change in released.items()}
    return Observation(model=own, release=release, released=released, batch_size=count), secret


def words(secret: Secret, task: Task) -> set[int]:
    """All tokens that entered the loss: the last one of a causal language model is only predicted."""
    return {token for row in secret.inputs for token in (row[:-1] if task == "causal-lm" else row)}


def zero() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(("kind", "task", "rank"), [("bert", "classification", 4), ("gpt2", "causal-lm", 10)])
def test_a_text_past_the_rank_comes_back_word_for_word(kind: Kind, task: Task, rank: int) -> None:
    """More tokens (12 to 15) than columns (12 of BERT, 10 of GPT-2, whose projections are one module), where the span
    alone tells nothing; fewer than half of width and columns. Neither length, special tokens nor label are given."""
    seen, secret = shared(kind, task, rank)
    entered = len(secret.inputs[0]) - (task == "causal-lm")
    assert changes(seen)[0].shape[1] < entered < (96 + 10) // 2
    for known in (seen, replace(seen, batch_size=None)):
        found = SparseWords()(known, generator=zero())
        assert found.value == secret.inputs
        assert (found.proven, found.outcome) == ((True,), Outcome.SOLVED)
        assert found.residual <= EXACT
        if secret.labels is not None:
            assert found.labels is not None
            assert torch.equal(found.labels, secret.labels)


def test_a_replay_tells_one_token_from_another() -> None:
    """What a proof rests on: of the texts with one other token, chosen nearest in the embeddings, none replays to
    rounding. Ten times the bound is left at least."""
    seen, secret = shared()
    tokens = Embeddings.of(seen.model).tokens
    near = (tokens @ F.normalize(tokens, dim=1).T).fill_diagonal_(-torch.inf).argmax(0)
    for place in range(1, len(secret.inputs[0]), 4):
        text = list(secret.inputs[0])
        text[place] = int(near[text[place]])
        assert seen.residual((tuple(text),), secret.labels) > 10 * EXACT


def test_without_a_recipe_nothing_is_proven_but_the_text_is_the_same() -> None:
    seen, secret = shared()
    found = SparseWords()(replace(seen, release=replace(seen.adapter, recipe=None)), generator=zero())
    assert found.value == secret.inputs
    assert (found.proven, found.outcome) == ((False,), Outcome.CLOSE)
    assert "not replayed" in found.status


@pytest.mark.parametrize(("kind", "task"), [("llama", "causal-lm"), ("bert", "classification"), ("gpt2", "causal-lm")])
@pytest.mark.parametrize("batch", [None, 2])
def test_all_words_of_many_texts_come_back_as_a_bag(kind: Kind, task: Task, batch: int | None) -> None:
    """Of six texts, in one batch or in three: distinct words (and, of models with positions, these) are fewer than half
    of width and columns. Whatever is returned is a word of theirs; a false one has a chance of 1 % per adapter."""
    seen, secret = shared(kind, task, 8, 6, replace(SGD, batch_size=batch), width=192)
    found = SparseWords()(seen, generator=zero())
    truth = words(secret, task)
    assert set(found.bag) <= truth
    assert len(found.bag) >= 0.9 * len(truth)  # what the attack is for
    assert (found.outcome, found.proven) == (Outcome.GUESSED, (False,))
    assert "A bag of words" in found.status


def test_a_wrong_start_shows_nothing() -> None:
    """From another seed's start the changes are random numbers, far larger than what training did."""
    for kind, task in (("bert", "classification"), ("llama", "causal-lm")):
        seen, _ = shared(kind, task, recipe=Recipe(learning_rate=0.01, steps=20))
        start = lora_start(seen.model, list(seen.adapter.scaling), 4, torch.Generator().manual_seed(1))
        release, released = seen.adapter.begun(seen.released, start, "given")
        found = SparseWords()(replace(seen, release=release, released=released), generator=zero())
        assert (found.value, found.outcome, found.residual) == ((), Outcome.NOTHING, 1.0)


def test_the_chance_of_a_random_vector_is_that_of_many_random_vectors() -> None:
    """Captured shares of 4,000 random vectors by 5 of 40 directions. The deviation of a frequency f is at most
    sqrt(f / 4,000); four of these are allowed."""
    x = torch.randn(4_000, 40, generator=zero(), dtype=torch.float64)
    captured = x[:, :5].square().sum(1) / x.square().sum(1)
    for share in (0.1, 0.2, 0.3):
        frequency = float((captured >= share).double().mean())
        expected = float(_random(torch.tensor(1 - share, dtype=torch.float64), 5, 40))
        assert abs(frequency - expected) < 4 * (expected / 4_000) ** 0.5


def test_noise_holds_no_word() -> None:
    """At `chance` 1 % per adapter, 100 adapters of white noise show one at most, five with a probability of 0.4 %."""
    seen, _ = shared("llama", "causal-lm")
    dictionary = Dictionary.words(Embeddings.of(seen.model), 1)
    shows = 0
    for number in range(100):
        noise = torch.randn(96, 12, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        shows += bool(pursue(dictionary, noise, 0.0, 0.01).atoms)
    assert shows < 5


def test_atoms_are_the_first_blocks_inputs() -> None:
    """Lengths, as the search computes them in float32, are those of exact atoms; these are sums of words and places."""
    embeddings = Embeddings.of(shared()[0].model)
    pairs, apart = Dictionary.pairs(embeddings, 20), Dictionary.words(embeddings, 20)
    W = torch.randn(3, 96, generator=zero())
    for token, place in ((3, 0), (200, 7), (400, 19)):
        x = pairs.exact(token, place)
        assert float(pairs.lengths(W)[token, place]) == pytest.approx(float((W.double() @ x).square().sum()), rel=1e-4)
        parts = apart.columns([(token, 0), *([(len(embeddings.tokens) + place, 0)])])
        rest = x - parts @ torch.linalg.lstsq(parts, x[:, None]).solution[:, 0]
        assert float(rest.norm() / x.norm()) < 1e-6


def test_what_it_is_not_for_is_refused() -> None:
    seen, secret = shared()
    modules = list(seen.adapter.scaling)
    gradient, _ = capture_gradient(seen.model, load_texts("embedded", indices=[0]))
    factors = share_adapter(seen.model, secret, modules=modules, rank=4)
    only_b = {name: change for name, change in seen.released.items() if name.endswith("lora_B")}
    unmoved = {name: change * name.endswith("lora_B") for name, change in seen.released.items()}
    adam = replace(seen.adapter, recipe=replace(SGD, optimizer="adamw"))
    for observation, hint in (
        (gradient, "reads an adapter, and what was released is a gradient"),
        (factors, "gradient of the factors was released"),
        (replace(seen, release=replace(seen.adapter, origin="unknown")), "or its seed, is needed"),
        (replace(seen, release=adam), "scales every number"),
        (replace(seen, released=only_b), "No change of a factor A"),
        (replace(seen, released=unmoved), "have not moved"),
    ):
        with pytest.raises(NotObserved, match=hint):
            SparseWords()(observation, generator=zero())
