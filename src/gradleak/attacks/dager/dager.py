"""DAGER: exact text from the gradients of a transformer (Petrov et al., NeurIPS 2024, arXiv:2405.15586).

Sees      Observation of a language model with a Gradient, an Update or an Adapter as its release: of the first block query, key
          and value (any of them); behind its attention the output projection, the perceptron's first layer, and query, key and
          value of the second block, for the order of a decoder's tokens and as the judge of an encoder's sentences; for
          batches of an encoder all linear layers of the first block. Neither labels nor embeddings' gradients are used
Recovers  sentences of token ids, special tokens included, and which of them are proven
Solves    dL/dW_q = Delta^T X (section 4): token a stands at position p only if norm(u_a + v_p) lies in the row space
          (spans.py, vocabulary.py). Decoders: prefixes are extended by the same check behind the attention (algorithm 2,
          decoder.py). Encoders: the attention's output follows for each token alone (path.py), linear systems say which tokens
          share a sentence (encoder.py), and the spans behind the attention say which sentence is right (judge.py)
Differs   the end of the span and the tolerance of each check come from the gap between singular values and from what white
          noise does to directions, not from numbers to be set; where noise hides too much, a decoder's sentences are weighed
          as a whole; query, key and value are pooled; the vocabulary is screened without computing its inputs one by one; no
          product over positions is searched; an encoder without positions is put in order by a search among orders
          (arrangement.py), and what would only be a bag by gradient distance (text_ordering.py); where the model keeps its layers
          is found by running it (observations/transformer.py); adapters are checked through their factor A; after several
          steps the checks allow for how far training moved the layers' inputs, and for the rounding of the parameters whose
          difference is released
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.attacks.attack import check_sees
from gradleak.attacks.dager.arrangement import arranged
from gradleak.attacks.dager.decoder import grow, likely, nearest
from gradleak.attacks.dager.encoder import assemble
from gradleak.attacks.dager.judge import SENTENCES, Judge, Sentence, layers_behind
from gradleak.attacks.dager.path import Path
from gradleak.attacks.dager.replayed import told_apart
from gradleak.attacks.dager.spans import FORWARD, Span, spans_of, telling
from gradleak.attacks.dager.vocabulary import CHUNK, TOKENS, Embeddings, Pairs, candidates, likeliest, random_tokens
from gradleak.attacks.masked_targets import unmask
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.attacks.text_ordering import Ordered, closed, ordered
from gradleak.errors import NotObserved
from gradleak.modalities.language_models import LanguageArchitecture
from gradleak.observations.adapter import Adapter
from gradleak.observations.layers import layer_inputs
from gradleak.observations.observation import TextObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.transformer import layout_of

# Sentences are weighed as a whole if random candidates need this times what noise allows. True tokens need 0.84 to 0.90 of it
# (docs/findings/text.md, "What is proven"), a third less. With 1.05 and with 2, the same 18 small sentences come back.
APART = 1.2
SMALLEST = 1e-30  # of what a change is relative to: the input of a padding token may be zero
RANDOM = 16  # random sentences, and their tokens without positions: the 256 rows of a proof ("What is proven") at most


@dataclass(frozen=True, kw_only=True)
class Dager:
    """Budgets only; the thresholds are those of rounding, noise and proofs.

    most     tokens kept per position
    pairs    candidates (token, position) of an encoder that are weighed
    beam     prefixes of a decoder kept at a time
    weighed  prefixes of a decoder kept at a time where noise hides single tokens
    budget   replacements tried in the correction of one sentence
    orders   gradients computed to put an order to tokens that nothing else orders
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update, Adapter)
    modality: ClassVar[str] = LanguageArchitecture.modality

    most: int = 2_000
    pairs: int = 12_000
    beam: int = 256
    weighed: int = 32
    budget: int = 600
    orders: int = 600

    def __call__(
        self, observation: TextObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved where the first block's projections are missing, or the tokens fill the space in which they
        were seen."""
        check_sees(self, observation)
        layout = layout_of(observation.model)

        # The span of the first layer's inputs
        first = spans_of(observation, layout.queries(0))
        if not first:
            names = ", ".join(layout.queries(0))
            raise NotObserved(f"None of {names} was released: no token can be told from another.")
        embeddings = Embeddings.of(observation.model)
        drift, drifts = _drift(observation, embeddings, generator)
        first = telling(first, embeddings.inputs(*random_tokens(observation.model, generator)), FORWARD + drift)
        if not first:
            raise NotObserved(
                "The tokens of the batch fill all directions in which they were seen: any token of the vocabulary would pass. "
                "A smaller batch, or an adapter of larger rank, gives its tokens away; past-the-rank seeks a likely text."
            )

        # The tokens that lie in it, at each position
        allowed = candidates(embeddings, first, rounding=FORWARD + drift, most=self.most)
        if not allowed:
            return _nothing(first[0])
        bag = tuple(sorted({token for ids in allowed for token in ids.tolist()}))

        # Their sentences: a decoder's token by token, an encoder's by the outputs of its attention, and by gradient distance where
        # no span behind the attention is left that could judge them
        rounding = {name: FORWARD + moved for name, moved in drifts.items()}
        judge = Judge.of(observation, min(span.rank for span in first), rounding, generator)
        sentences = self._decoder(observation, allowed, judge, generator) if layout.causal else []
        if not layout.causal or not (judge.spans or sentences):
            pairs = likeliest(observation, embeddings, allowed, first[0].rank, self.pairs)
            if not judge.spans:
                return self._by_gradient(observation, bag, pairs, generator)
            sentences = self._encoder(observation, embeddings, pairs, judge, generator, on_step)
        return unmask(observation, _result(observation, sentences, bag, first[0]))

    def _decoder(
        self, observation: TextObservation, allowed: list[Tensor], judge: Judge, generator: torch.Generator
    ) -> list[Sentence]:
        """The sentences that pass; or, where they leave something unexplained, those that fit best as a whole."""
        count, passed, complete = observation.batch_size, list[Sentence](), False
        if judge.spans:
            grown = grow(judge, allowed, widest=self.beam)
            prefixes, complete = nearest(grown, judge.clearest.rank, count)
            passed = [Sentence(p.tokens, p.distance, 1.0, judge.passing(certain=complete)) for p in prefixes]
        wanted = count or len(passed)
        if not wanted or (passed and complete) or (judge.convincing and len(passed) == wanted):
            return passed

        # Noise and updates leave most of the output projection's inputs, which depend on the whole prefix: they weigh sentences
        name, modules = next(iter(layers_behind(observation.model).items()))
        spans = [span for span in spans_of(observation, modules) if span.rank and span.factor is None]
        if not spans:
            return passed
        alone = replace(judge, spans={name: spans})
        drawn = [ids[torch.randint(len(ids), (RANDOM,), generator=generator)] for ids in allowed]
        random = torch.stack(drawn if layout_of(observation.model).placed else drawn * RANDOM, dim=1)
        power = float(alone.rows(random)[1].median())
        if power < APART:
            return passed
        neutral = power**0.5 if name in judge.spans else power
        fitting = likely(alone, allowed, count=wanted, widest=self.weighed, limit=power, neutral=neutral)
        return [Sentence(prefix.tokens, prefix.distance, torch.inf, Outcome.GUESSED) for prefix in fitting]

    def _encoder(
        self,
        observation: TextObservation,
        embeddings: Embeddings,
        pairs: Pairs,
        judge: Judge,
        generator: torch.Generator,
        on_step: OnStep | None,
    ) -> list[Sentence]:
        """The sentences that the attention's outputs make; or, where they make none, the order of the nearest gradient."""
        path = Path.of(observation, judge.exact, max(judge.rounding.values()))
        if path is not None:
            random = embeddings.inputs(*random_tokens(observation.model, generator))
            if bool(path.outputs(random)[1].any()):
                path = None  # too blurred to tell anything
        sentences = assemble(judge, pairs, path, batch_size=observation.batch_size, budget=self.budget, on_step=on_step)
        if not sentences and observation.batch_size in (None, 1) and not layout_of(observation.model).placed:
            return self._arranged(observation, judge, pairs, generator, on_step)
        order = None if sentences else self._ordered(observation, pairs, generator)
        return sentences if order is None else [judge.verdict(tokens) for tokens in order.sentences]

    def _arranged(
        self,
        observation: TextObservation,
        judge: Judge,
        pairs: Pairs,
        generator: torch.Generator,
        on_step: OnStep | None,
    ) -> list[Sentence]:
        """The text in the order that fits. Where orders beside it fit too, their replays tell them apart."""
        found = arranged(judge, pairs.ids.tolist(), generator=generator, on_step=on_step)
        if found is None:
            return []
        sentence, sure = found
        return [told_apart(observation, judge, sentence) if sentence.passes and not sure else sentence]

    def _ordered(self, observation: TextObservation, pairs: Pairs, generator: torch.Generator) -> Ordered | None:
        """The order of the nearest gradient. None for an adapter, which is for past_the_rank.py, and for a masked model: what
        was masked is unknown, so that no text can be replayed."""
        if isinstance(observation.release, Adapter) or observation.model.architecture.task == "masked-lm":
            return None
        return ordered(observation, pairs.by_place(), generator=generator, budget=self.orders)

    def _by_gradient(
        self, observation: TextObservation, bag: tuple[int, ...], pairs: Pairs, generator: torch.Generator
    ) -> Reconstruction:
        """The bag, and sentences by gradient distance: for one text, or where positions are seen."""
        model, only, positions = observation.model, pairs.only_sentence(), int(pairs.places.max()) + 1
        placed, single = layout_of(model).placed, observation.batch_size == 1
        status = (
            f"{len(bag)} tokens pass in the first block, in up to {positions} positions; nothing behind its attention was "
            "released that could tell more"
        )
        if only is not None and placed and single:
            status += ", but at each position only one passes."
            return Reconstruction(closed(model, (only,)), None, 0.0, status, Outcome.GUESSED, (False,), bag)
        order = self._ordered(observation, pairs, generator) if only is not None or placed or single else None
        if order is None:
            return Reconstruction((), None, 1.0, f"{status}, so they cannot be put together.", Outcome.GUESSED, (), bag)
        sentences = closed(model, order.sentences)
        status += f": their order is a guess, whose gradient differs from the released one by {order.distance:.1e}."
        return Reconstruction(sentences, None, order.distance, status, Outcome.GUESSED, (False,) * len(sentences), bag)


def _drift(
    observation: TextObservation, embeddings: Embeddings, generator: torch.Generator
) -> tuple[float, dict[str, float]]:
    """How far training moved the inputs of the first block, and of layers behind its attention, relative to them: the largest of
    any token, and the largest in sentences of the tokens that moved most. A span is of inputs between these ends."""
    model, after, layers = observation.model, observation.after(), list(layers_behind(observation.model))
    if after is None:
        return 0.0, dict.fromkeys(layers, 0.0)
    trained = replace(model, parameters={**model.parameters, **after})
    later, changes = Embeddings.of(trained), list[Tensor]()
    for ids in torch.split(torch.arange(model.architecture.config.vocab_size), CHUNK):
        old, new = (ends.inputs(ids, torch.zeros_like(ids)) for ends in (embeddings, later))
        changes.append((new - old).norm(dim=1) / old.norm(dim=1).clamp_min(SMALLEST))
    change = torch.cat(changes)
    length = min(TOKENS, layout_of(model).positions, len(change))
    farthest = change.topk(length).indices
    shuffled = (farthest[torch.randperm(length, generator=generator)] for _ in range(SENTENCES - 1))
    ids = torch.stack([farthest, *shuffled])
    start, end = (layer_inputs(ends, layers, ids) for ends in (model, trained))
    moved = {
        name: (end[name] - start[name]).norm(dim=-1) / start[name].norm(dim=-1).clamp_min(SMALLEST) for name in layers
    }
    return float(change.max()), {name: float(most.max()) for name, most in moved.items()}


def _nothing(first: Span) -> Reconstruction:
    status = (
        f"No token passes: the span of {first.rank} directions ends in a gap of {first.clearance:.2g}, too blurred to hold any "
        "token. A defense, or other parameters than those of the release, would explain that."
    )
    return Reconstruction((), None, 1.0, status, Outcome.NOTHING)


def _result(
    observation: TextObservation, sentences: Sequence[Sentence], bag: tuple[int, ...], first: Span
) -> Reconstruction:
    """The sentences, with what is certain of them in words."""
    model, wanted = observation.model, observation.batch_size
    proven = [sentence.outcome is Outcome.SOLVED for sentence in sentences]
    notes = [evidence(sentences, sum(proven), wanted, len(bag))]
    predicted = model.architecture.task == "causal-lm" and layout_of(model).causal
    if predicted and model.architecture.tokenizer.eos_token_id is None:
        notes.append("the last token of a text is no input of the loss and cannot be seen")
    status = (
        f"{sum(proven)} of {wanted if wanted is not None else 'an unknown number of'} sentences proven; the first layer shows "
        f"{first.rank} directions, {first.clearance:.2g} above the noise; {'; '.join(notes)}."
    )
    if not sentences:
        return Reconstruction((), None, 1.0, status, Outcome.NOTHING, (), bag)
    whole = sum(proven) == (wanted or len(sentences))
    outcome = Outcome.SOLVED if whole else Outcome.CLOSE if any(proven) else Outcome.GUESSED
    value, residual = closed(model, [s.tokens for s in sentences]), max(s.distance for s in sentences)
    return Reconstruction(value, None, residual, status, outcome, tuple(proven), bag)


def evidence(sentences: Sequence[Sentence], proven: int, wanted: int | None, tokens: int) -> str:
    """The checks that the sentences passed, in words."""
    if not sentences:
        return f"{tokens} tokens pass, but no sentence of them does"
    outcomes = [sentence.outcome for sentence in sentences]
    if Outcome.GUESSED in outcomes:
        return "noise hides what single tokens would show: these sentences fit best as a whole, and are guesses"
    if Outcome.STUCK in outcomes:
        outside = f"a row is up to {max(s.excess for s in sentences):.2g} times outside what noise allows"
        if passing := sum(sentence.passes for sentence in sentences):
            passed = f"every token of {passing} of {len(sentences)} sentences passes in all layers"
            return f"{passed}; of the others {outside}: they are guesses"
        return f"{outside}: the sentences are guesses"
    if wanted is None or proven >= wanted:
        return "every token passes in all layers"
    others = "the others are guesses, identical to these, or their beginnings"
    return f"every token passes in all layers; {others if proven else 'the sentences are guesses'}"
