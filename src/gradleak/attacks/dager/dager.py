"""DAGER: exact text from the gradients of a transformer (Petrov et al., NeurIPS 2024, arXiv:2405.15586).

Sees      Gradient, Update or Adapter of a language model: of the first block query, key and value (any of them); behind its attention
          the output projection, the perceptron's first layer, and query, key and value of the second block, for the order of
          a decoder's tokens and as the judge of an encoder's sentences; for batches of an encoder all linear layers of the
          first block. Neither labels nor embeddings' gradients are used
Recovers  sentences of token ids, special tokens included, and which of them are proven
Solves    dL/dW_q = Delta^T X (section 4): token a stands at position p only if norm(u_a + v_p) lies in the row space. Decoders:
          prefixes are extended by the same check behind the attention (algorithm 2). Encoders: the attention's output is
          found for each token alone (outputs.py), linear systems say which tokens share a sentence (memberships.py), and
          the spans behind the attention which sentence is right
Differs   the end of the span and the tolerance of each check come from the gap between singular values, not from numbers
          to be set, through noise from what white noise does to directions (spans.py), and where that hides too much, a
          decoder's sentences are weighed as a whole; query, key and value are pooled; the vocabulary is screened without
          computing its inputs one by one; no product over positions is searched; what would only be a bag is ordered by
          gradient distance (ordering.py); adapters are checked through their factor A; after several steps the checks allow
          for how far training moved the layers' inputs, and for the rounding of the parameters whose difference is seen
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.attacks.attack import check_sees
from gradleak.attacks.dager.decoder import Prefix, grow, likely
from gradleak.attacks.dager.encoder import assemble, by_place, unambiguous
from gradleak.attacks.dager.judge import Found, Judge
from gradleak.attacks.dager.masked_targets import unmask
from gradleak.attacks.dager.memberships import Pairs, pairs_of, placements
from gradleak.attacks.dager.ordering import ordered
from gradleak.attacks.dager.outputs import Path
from gradleak.attacks.dager.spans import Span, excess, spans
from gradleak.attacks.dager.vocabulary import CHUNK, Embeddings, candidates
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import NotObserved
from gradleak.modalities.language_models import LanguageArchitecture
from gradleak.modalities.modality import Tokens
from gradleak.observations.layers import layer_inputs
from gradleak.observations.model import LanguageModel
from gradleak.observations.observation import TextObservation
from gradleak.observations.releases import Adapter, Gradient, Release, Update
from gradleak.observations.tensors import Tensors

MARGIN = 10.0  # random tokens have to be refused by this factor, or passing proves nothing
BY_CHANCE = 2  # of 256 of these that may be true: a decoder's first token is right whatever follows
CLEAR = 1.2  # ratio at which random candidates have to fail, or fitting means nothing
DECOYS = 16  # sentences of random candidates
LENGTH = 16  # tokens of these, where positions are not seen
WIDEST = 32  # prefixes kept through noise
FORWARD = 32 * torch.finfo(torch.float32).eps  # what the victim's own forward pass in float32 rounds


@dataclass(frozen=True, kw_only=True)
class Dager:
    """Budgets only; there is no threshold to set.

    most    tokens kept per position
    pairs   candidates (token, position) of an encoder that are weighed
    beam    prefixes of a decoder kept at a time
    budget  replacements tried in the correction of one sentence
    orders  gradients computed to put an order to tokens that nothing else orders
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update, Adapter)
    modality: ClassVar[str] = LanguageArchitecture.modality

    most: int = 2_000
    pairs: int = 12_000
    beam: int = 256
    budget: int = 600
    orders: int = 600

    def __call__(
        self, observation: TextObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved where the first block's projections are missing, or the tokens fill the space in which they
        were seen."""
        check_sees(self, observation)
        model, family = observation.model, observation.model.architecture.family
        views = observation.sketches(family.linear(model.architecture.config))
        first = spans(views, family.queries(0), observation.precision, causal=family.causal)
        if not first:
            names = ", ".join(family.queries(0))
            raise NotObserved(f"None of {names} was released: no token can be told from another.")
        embeddings = Embeddings.of(model)
        behind = [names[0] for names in _behind(model)]
        moved, drift = _drift(model, observation.after(), embeddings, behind, generator)
        rounding = FORWARD + moved
        first = _telling(first, embeddings.inputs(*_decoys(model, generator)), rounding)
        if not first:
            raise NotObserved(
                "The tokens of the batch fill all directions in which they were seen: any token of the vocabulary would pass. "
                "A smaller batch, or an adapter of larger rank, gives its tokens away; past-the-rank seeks a likely text."
            )
        allowed = candidates(embeddings, first, rounding=rounding, most=self.most)
        if not allowed:
            return _nothing(first)
        rank = min(span.rank for span in first)
        judge, sure = _judge(observation, rank, {name: FORWARD + d for name, d in drift.items()}, generator)
        bag = tuple(sorted({token for ids in allowed for token in ids.tolist()}))
        passed, fitting = self._decoder(observation, allowed, judge, sure, generator) if family.causal else ([], [])
        if not judge.spans and not fitting:
            likeliest = self._likeliest(observation, embeddings, allowed, first)
            return _bag_only(observation, bag, likeliest, generator, self.orders)
        if not family.causal:
            passed = self._encoder(observation, embeddings, allowed, first, judge, generator, on_step)
        if not sure:
            passed = [replace(entry, proven=False) for entry in passed]
        found = _result(observation, passed, fitting, bag, first[0])
        return unmask(observation, found) if model.architecture.task == "masked-lm" else found

    def _encoder(
        self,
        observation: TextObservation,
        embeddings: Embeddings,
        allowed: list[Tensor],
        first: list[Span],
        judge: Judge,
        generator: torch.Generator,
        on_step: OnStep | None,
    ) -> list[Found]:
        model, views, family = observation.model, observation.sketches(), observation.model.architecture.family
        pairs = self._likeliest(observation, embeddings, allowed, first)
        block = family.block(0)
        parts = ((family.output,), family.hidden, family.passed)
        seen = [spans(views, tuple(f"{block}.{name}" for name in names), observation.precision) for names in parts]
        path = Path.of(model, judge.exact, seen, max(judge.rounding.values()))
        if path is not None and bool(path.outputs(embeddings.inputs(*_decoys(model, generator)))[1].any()):
            path = None  # too blurred to tell anything
        found = assemble(judge, pairs, path, batch_size=observation.batch_size, budget=self.budget, on_step=on_step)
        if found or not _replayable(observation) or isinstance(observation.release, Adapter):
            return found  # what an adapter leaves open is for past_the_rank.py
        guess = ordered(observation, by_place(pairs), generator=generator, budget=self.orders)
        return [judge.verdict(tokens) for tokens in guess.sentences]

    def _decoder(
        self, observation: TextObservation, allowed: list[Tensor], judge: Judge, sure: bool, generator: torch.Generator
    ) -> tuple[list[Found], list[Found]]:
        """(sentences that pass, none); or, where they leave something unexplained, (none, those that fit best as a whole)."""
        model, count = observation.model, observation.batch_size
        passed = list[Found]()
        if judge.spans:
            grown = grow(judge, allowed, widest=self.beam)
            passed = _nearest(grown, judge.clearest.rank, count)
        names = _behind(model)[0]
        seen = [span for span in spans(observation.sketches(), names, observation.precision, causal=True) if span.rank]
        wanted = count or len(passed)
        explained = bool(passed) and all(entry.proven for entry in passed)
        if (
            explained
            or (sure and len(passed) == wanted)
            or not wanted
            or not seen
            or isinstance(observation.release, Adapter)
        ):
            return passed, []
        alone = replace(judge, spans={names[0]: seen})
        drawn = [ids[torch.randint(len(ids), (DECOYS,), generator=generator)] for ids in allowed]
        decoys = torch.stack(drawn if model.architecture.family.placed else drawn * LENGTH, dim=1)
        power = float(alone.rows(decoys)[1].median())
        if power < CLEAR:
            return passed, []
        even = power**0.5 if names[0] in judge.spans else power
        fitting = likely(alone, allowed, count=wanted, widest=WIDEST, limit=power, even=even)
        return [], [Found(entry.tokens, entry.distance, torch.inf, False) for entry in fitting]

    def _likeliest(
        self, observation: TextObservation, embeddings: Embeddings, allowed: list[Tensor], first: list[Span]
    ) -> Pairs:
        """Candidates (token, position), likeliest first."""
        family = observation.model.architecture.family
        pairs = pairs_of(embeddings, allowed)
        whole = [v.measured for v in observation.sketches() if v.module in family.queries(0) and v.factor is None]
        if not family.placed or not whole or len(pairs) <= first[0].rank:
            return pairs
        share = placements(embeddings, pairs, torch.cat(whole))
        return pairs.at(share.argsort(descending=True)[: self.pairs])


def _decoys(model: LanguageModel, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random tokens at the first positions: they have no reason to pass any check."""
    count = min(32, model.architecture.positions - model.architecture.family.offset)
    ids = torch.randint(model.architecture.config.vocab_size, (count,), generator=generator)
    return ids, torch.arange(count) if model.architecture.family.placed else torch.zeros(count, dtype=torch.long)


def _nearest(grown: list[Prefix], rank: int, batch_size: int | None) -> list[Found]:
    """The texts that fit best: as many as the batch had, or as explain all directions; every prefix makes one.

    They are proven when these are all that passed, and leave no direction to a text that goes on unseen.
    """
    kept, prefixes = list[Prefix](), set[tuple[int, ...]]()
    for entry in sorted(grown, key=lambda entry: entry.cost):
        if len(kept) == batch_size or (batch_size is None and len(prefixes) >= rank):
            break
        kept.append(entry)
        prefixes |= {entry.tokens[: i + 1] for i in range(len(entry.tokens))}
    whole = len(kept) == len(grown) and len(prefixes) >= rank
    return [Found(entry.tokens, entry.distance, 1.0, whole) for entry in kept]


def _telling(found: list[Span], decoys: Tensor, rounding: float) -> list[Span]:
    """The spans that refuse most decoys; the others are so full, or so blurred, that passing means nothing."""
    return [span for span in found if float((excess([span], decoys, rounding)[1] <= 1).double().mean()) < 0.5]


def _drift(
    model: LanguageModel,
    after: Tensors | None,
    embeddings: Embeddings,
    layers: Sequence[str],
    generator: torch.Generator,
) -> tuple[float, dict[str, float]]:
    """How far training moved the inputs of the first block, and of layers behind its attention, relative to them: the
    largest of any token, and the largest in sentences of the tokens that moved most. A span is of inputs between these ends."""
    if after is None:
        return 0.0, dict.fromkeys(layers, 0.0)
    moved = replace(model, parameters={**model.parameters, **after})
    later, changes = Embeddings.of(moved), list[Tensor]()
    for ids in torch.split(torch.arange(model.architecture.config.vocab_size), CHUNK):
        old, new = (seen.inputs(ids, torch.zeros_like(ids)) for seen in (embeddings, later))
        changes.append((new - old).norm(dim=1) / old.norm(dim=1))
    change = torch.cat(changes)
    length = min(32, model.architecture.positions - model.architecture.family.offset, len(change))
    own = change.topk(length).indices
    ids = torch.stack([own, *(own[torch.randperm(length, generator=generator)] for _ in range(7))])
    before, then = (layer_inputs(seen, layers, ids) for seen in (model, moved))
    drifts = {n: (then[n] - before[n]).norm(dim=-1) / before[n].norm(dim=-1) for n in layers}
    return float(change.max()), {name: float(drift.max()) for name, drift in drifts.items()}


def _behind(model: LanguageModel) -> list[tuple[str, ...]]:
    """Layers behind the first attention whose inputs depend on the sentence: names of modules that share them."""
    family = model.architecture.family
    layers = [tuple(f"{family.block(0)}.{name}" for name in names) for names in ((family.output,), family.hidden)]
    return layers + ([family.queries(1)] if model.architecture.config.num_hidden_layers > 1 else [])


def _judge(
    observation: TextObservation, rank: int, rounding: dict[str, float], generator: torch.Generator
) -> tuple[Judge, bool]:
    """The spans behind the first attention that can tell sentences apart, and whether random sentences fail so clearly that
    passing is a proof.

    rank: directions that were seen of the first layer's inputs. Where fewer were seen, members are missing.
    """
    model, views = observation.model, observation.sketches()
    judge = Judge(model, _exact(model), {}, rounding)
    decoys = torch.stack([_decoys(model, generator)[0] for _ in range(8)])
    x = layer_inputs(model, list(rounding), decoys, parameters=judge.exact)
    for names in _behind(model):
        seen = spans(views, names, observation.precision, causal=model.architecture.family.causal)
        whole = [span for span in seen if span.rank >= min(rank, span.basis.shape[1])]
        if told := _telling(whole, x[names[0]].flatten(0, 1), rounding[names[0]]):
            judge.spans[names[0]] = told
    return judge, bool(judge.spans) and float(judge.rows(decoys)[1].flatten().kthvalue(BY_CHANCE + 1).values) > MARGIN


def _exact(model: LanguageModel) -> Tensors:
    """The parameters up to the second block in float64."""
    base, blocks = (
        f"{model.architecture.family.base}.",
        f"{model.architecture.family.base}.{model.architecture.family.layers}.",
    )
    near = (model.architecture.family.block(0) + ".", model.architecture.family.block(1) + ".")
    return {
        name: p.double()
        for name, p in model.parameters.items()
        if name.startswith(near) or (name.startswith(base) and not name.startswith(blocks))
    }


def _replayable(observation: TextObservation) -> bool:
    """Whether `simulate` can tell what a text would have released: not where what is masked is unknown."""
    return observation.model.architecture.task != "masked-lm"


def _nothing(first: list[Span]) -> Reconstruction:
    status = (
        f"No token passes: the span of {first[0].rank} directions ends in a gap of {first[0].clearance:.2g}, too blurred to hold any "
        "token. A defense, or other parameters than those of the release, would explain that."
    )
    return Reconstruction((), None, 1.0, status, Outcome.NOTHING)


def _bag_only(
    observation: TextObservation, bag: tuple[int, ...], pairs: Pairs, generator: torch.Generator, orders: int
) -> Reconstruction:
    """The bag, and sentences by gradient distance: for one text, or where positions are seen."""
    model, count, only = observation.model, int(pairs.places.max()) + 1, unambiguous(pairs)
    placed = model.architecture.family.placed
    status = f"{len(bag)} tokens pass in the first block, in up to {count} positions; nothing behind its attention "
    status += "was released that could tell more"
    if only is not None and placed and observation.batch_size == 1:
        status += ", but at each position only one passes."
        return Reconstruction(_closed(model, (only,)), None, 0.0, status, Outcome.GUESSED, (False,), bag)
    adapter = isinstance(observation.release, Adapter)  # what that leaves open is for past_the_rank.py
    loose = only is None and not placed and observation.batch_size != 1
    if adapter or loose or not _replayable(observation):
        return Reconstruction((), None, 1.0, f"{status}, so they cannot be put together.", Outcome.GUESSED, (), bag)
    found = ordered(observation, by_place(pairs), generator=generator, budget=orders)
    sentences = _closed(model, found.sentences)
    status += f": their order is a guess, whose gradient differs from the released one by {found.distance:.1e}."
    return Reconstruction(sentences, None, found.distance, status, Outcome.GUESSED, (False,) * len(sentences), bag)


def _closed(model: LanguageModel, sentences: Sequence[tuple[int, ...]]) -> Tokens:
    """With the end-of-text token behind each, which a causal language model only predicts."""
    end = model.architecture.tokenizer.eos_token_id if model.architecture.task == "causal-lm" else None
    return tuple(tokens if end is None else (*tokens, end) for tokens in sentences)


def _result(
    observation: TextObservation, passed: list[Found], fitting: list[Found], bag: tuple[int, ...], first: Span
) -> Reconstruction:
    """The sentences, with what is certain of them in words."""
    model, wanted, found = observation.model, observation.batch_size, passed or fitting
    sentences = _closed(model, [entry.tokens for entry in found])
    proven = sum(entry.proven for entry in found)
    notes = [_evidence(found, proven, wanted, len(bag), bool(fitting))]
    if model.architecture.task == "causal-lm" and model.architecture.tokenizer.eos_token_id is None:
        notes.append("the last token of a text is no input of the loss and cannot be seen")
    status = (
        f"{proven} of {wanted if wanted is not None else 'an unknown number of'} sentences proven; the first layer shows "
        f"{first.rank} directions, {first.clearance:.2g} above the noise; {'; '.join(notes)}."
    )
    residual = max((entry.distance for entry in found), default=1.0)
    whole = proven == (wanted or len(found))
    outcome = (
        Outcome.NOTHING if not found else Outcome.SOLVED if whole else Outcome.CLOSE if proven else Outcome.GUESSED
    )
    return Reconstruction(sentences, None, residual, status, outcome, tuple(e.proven for e in found), bag)


def _evidence(found: list[Found], proven: int, wanted: int | None, tokens: int, fitting: bool) -> str:
    """What speaks for the sentences."""
    passing = [entry.passes for entry in found]
    if fitting:
        return "noise hides what single tokens would show: these sentences fit best as a whole, and are guesses"
    if not found:
        return f"{tokens} tokens pass, but no sentence of them does"
    if not all(passing):
        worst = max(entry.excess for entry in found)
        passed = f"every token of {sum(passing)} of {len(found)} sentences passes in all layers" if any(passing) else ""
        outside = f"a row is up to {worst:.2g} times outside what noise allows"
        return (
            f"{passed}; of the others {outside}: they are guesses"
            if passed
            else f"{outside}: the sentences are guesses"
        )
    if wanted is not None and proven < wanted:
        more = "the others are guesses, identical to these, or their beginnings"
        return f"every token passes in all layers; {more if proven else 'the sentences are guesses'}"
    return "every token passes in all layers"
