"""DAGER: exact text from the gradients of a transformer (Petrov et al., NeurIPS 2024, arXiv:2405.15586).

Sees      TextGradient, TextUpdate or TextAdapter: of the first block query, key and value (any of them); of the second the
          same, for the order of a decoder's tokens and as the judge of an encoder's sentences; for batches of an encoder also
          the first block's attention output projection. Neither labels nor embeddings' gradients are used
Recovers  sentences of token ids, special tokens included, and which of them are proven
Solves    dL/dW_q = Delta^T X (section 4): token a stands at position p only if norm(u_a + v_p) lies in the row space. Decoders:
          prefixes are extended by the same check on the second layer's inputs (algorithm 2). Encoders: linear systems say
          which tokens share a sentence (memberships.py), the second layer's span says which sentence is right
Differs   the end of the span and the tolerance of each check come from the gap between singular values, not from numbers
          to be set; query, key and value are pooled; the vocabulary is screened without computing its inputs one by one; no
          product over positions is searched; adapters are checked through their factor A
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradleak.attacks.masked_targets import unmask
from gradleak.attacks.memberships import pairs_of, placements
from gradleak.attacks.prefixes import grow
from gradleak.attacks.sentences import Found, Judge, assemble
from gradleak.attacks.spans import Span, excess, spans
from gradleak.attacks.vocabulary import Embeddings, candidates
from gradleak.errors import NotObserved
from gradleak.optimise import OnStep
from gradleak.reconstruction import TextReconstruction
from gradleak.tensors import Tensors
from gradleak.text import LanguageModel, TextGradient

MARGIN = 10.0  # every decoy has to be refused by this factor, or passing proves nothing
SPARE = 3  # candidates that are weighed at a time, per token that the batch has
FORWARD = 8 * torch.finfo(torch.float32).eps  # what the victim's own forward pass in float32 rounds


@dataclass(frozen=True, kw_only=True)
class Dager:
    """Budgets only; there is no threshold to set.

    most    tokens kept per position
    beam    prefixes of a decoder kept at a time
    tries   tokens per sentence from which an encoder's sentence is sought
    budget  replacements tried in the correction of one sentence
    """

    most: int = 2_000
    beam: int = 256
    tries: int = 4
    budget: int = 600

    def __call__(
        self, observation: TextGradient, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> TextReconstruction:
        """Raises NotObserved where the first block's projections are missing, or the tokens fill the space in which they
        were seen."""
        model, views = observation.model, observation.views()
        family = model.family
        first = spans(views, family.queries(0), observation.precision, causal=family.causal)
        if not first:
            names = ", ".join(family.queries(0))
            raise NotObserved(f"None of {names} was released: no token can be told from another.")
        embeddings = Embeddings.of(model)
        first = _telling(first, embeddings.inputs(*_decoys(model, generator)))
        if not first:
            raise NotObserved(
                "The tokens of the batch fill all directions in which they were seen: any token of the vocabulary would pass. "
                "A smaller batch, or an adapter of larger rank, gives its tokens away."
            )
        allowed = candidates(embeddings, first, rounding=FORWARD, most=self.most)
        if not allowed:
            return _nothing(first)
        second = (
            spans(views, family.queries(1), observation.precision, causal=family.causal)
            if model.config.num_hidden_layers > 1
            else []
        )
        exact = _exact(model)
        sure = False
        if second:
            decoys = torch.stack([_decoys(model, generator)[0] for _ in range(8)])
            name = family.queries(1)[0]
            rows = model.inputs([name], decoys, parameters=exact)[name].flatten(0, 1)
            second = _telling(second, rows)
            sure = bool(second) and float(excess(second, rows, FORWARD)[1].min()) > MARGIN
        bag = tuple(sorted({token for ids in allowed for token in ids.tolist()}))
        if not second:
            return _bag_only(model, bag, allowed)
        if family.causal:
            grown = grow(model, exact, allowed, second, rounding=FORWARD, widest=self.beam)
            found = [Found(tokens, far, True) for tokens, far in grown]
        else:
            found = self._encoder(
                observation, embeddings, allowed, first, Judge(model, exact, second, FORWARD), on_step
            )
        if not sure or (observation.batch_size is not None and len(found) > observation.batch_size):
            found = [replace(entry, proven=False) for entry in found]
        told = _told(observation, found, bag, first[0], second[0])
        return unmask(observation, told) if model.task == "masked-lm" else told

    def _encoder(
        self,
        observation: TextGradient,
        embeddings: Embeddings,
        allowed: list[Tensor],
        first: list[Span],
        judge: Judge,
        on_step: OnStep | None,
    ) -> list[Found]:
        model, views = observation.model, observation.views()
        pairs = pairs_of(embeddings, allowed)
        share = torch.ones(len(pairs), dtype=torch.float64)
        whole = [v.measured for v in views if v.module in model.family.queries(0) and v.factor is None]
        if whole and len(pairs) > first[0].rank:
            share = placements(embeddings, pairs, torch.cat(whole))
        contexts = spans(views, (f"{model.family.block(0)}.{model.family.output}",), observation.precision)
        outside = contexts[0].outside() if contexts and not contexts[0].full else None
        return assemble(
            judge,
            pairs,
            share,
            outside,
            at_once=SPARE * judge.second[0].rank,
            batch_size=observation.batch_size,
            tries=self.tries,
            budget=self.budget,
            on_step=on_step,
        )


def _decoys(model: LanguageModel, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random tokens at the first positions: they have no reason to pass any check."""
    count = min(32, model.positions - model.family.offset)
    ids = torch.randint(model.config.vocab_size, (count,), generator=generator)
    return ids, torch.arange(count) if model.family.placed else torch.zeros(count, dtype=torch.long)


def _telling(found: list[Span], decoys: Tensor) -> list[Span]:
    """The spans that refuse most decoys; the others are so full, or so blurred, that passing means nothing."""
    return [span for span in found if float((excess([span], decoys, FORWARD)[1] <= 1).double().mean()) < 0.5]


def _exact(model: LanguageModel) -> Tensors:
    """The parameters up to the second block in float64."""
    base, blocks = f"{model.family.base}.", f"{model.family.base}.{model.family.layers}."
    near = (model.family.block(0) + ".", model.family.block(1) + ".")
    return {
        name: p.double()
        for name, p in model.parameters.items()
        if name.startswith(near) or (name.startswith(base) and not name.startswith(blocks))
    }


def _nothing(first: list[Span]) -> TextReconstruction:
    gap = float(first[0].values[-1]) / max(first[0].noise, 1e-300)
    status = (
        f"No token passes: the span of {first[0].rank} directions ends in a gap of {gap:.2g}, too blurred to hold any "
        "token. A defense, or other parameters than those of the release, would explain that."
    )
    return TextReconstruction((), (), (), (), 1.0, status)


def _bag_only(model: LanguageModel, bag: tuple[int, ...], allowed: list[Tensor]) -> TextReconstruction:
    status = (
        f"{len(bag)} tokens pass in the first block, in up to {len(allowed)} positions; the second block's projections were not "
        "released, or the tokens fill their directions, so they cannot be put together."
    )
    if model.family.placed and all(len(ids) == 1 for ids in allowed):
        only = tuple(int(ids[0]) for ids in allowed)
        status = "One token passes at each position; without the second block's projections that is not checked again."
        return TextReconstruction((only,), (model.decode(only),), (False,), bag, 0.0, status)
    return TextReconstruction((), (), (), bag, 1.0, status)


def _told(
    observation: TextGradient, found: list[Found], bag: tuple[int, ...], first: Span, second: Span
) -> TextReconstruction:
    """The result, with what is certain in words."""
    model, wanted = observation.model, observation.batch_size
    sentences = [entry.tokens for entry in found]
    end = model.tokenizer.eos_token_id
    notes = []
    if model.task == "causal-lm":
        if end is not None:
            sentences = [(*tokens, end) for tokens in sentences]
        else:
            notes.append("the last token of a text is no input of the loss and cannot be seen")
    proven = sum(entry.proven for entry in found)
    if wanted is not None and proven < wanted:
        notes.append(
            (
                "the others are guesses, identical to these, or their beginnings"
                if proven
                else "the sentences are guesses"
            )
            if found
            else f"{len(bag)} tokens pass, but no sentence of them does"
        )
    gap = float(first.values[-1]) / max(first.noise, 1e-300)
    status = (
        f"{proven} of {wanted if wanted is not None else 'an unknown number of'} sentences proven: every token passes in "
        f"both layers; {first.rank} directions of the first ({gap:.2g} above the noise), {second.rank} of the second"
        + "".join(f"; {note}" for note in notes)
        + "."
    )
    residual = max((entry.distance for entry in found), default=1.0)
    texts = tuple(model.decode(tokens) for tokens in sentences)
    return TextReconstruction(tuple(sentences), texts, tuple(e.proven for e in found), bag, residual, status)
