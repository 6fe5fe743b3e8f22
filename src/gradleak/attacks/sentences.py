"""Sentences of an encoder out of the tokens that its first layer shows, in polynomial time: a guess at the members of a
sentence by linear systems (memberships.py), corrected token by token against the span of the second layer's inputs, which
depend on the whole sentence; a sentence whose rows all lie in it is right."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.attacks.memberships import Attention, Pairs, memberships
from gradleak.attacks.spans import Span, excess
from gradleak.optimise import OnStep
from gradleak.tensors import Tensors
from gradleak.text import LanguageModel

ROWS = 256  # sentences at a time
ONCE = 0.05  # how near to 1 the share of a token is that stands once in the batch, at a position without recurring ones


@dataclass(frozen=True)
class Found:
    """A sentence, the largest relative distance of its rows to what was seen, whether all are within what noise allows, and
    the mean of the distances."""

    tokens: tuple[int, ...]
    distance: float
    proven: bool
    mean: float = 0.0


@dataclass(frozen=True)
class Judge:
    """The second layer's span, as a judge of whole sentences."""

    model: LanguageModel
    exact: Tensors
    second: list[Span]
    rounding: float

    def rows(self, sentences: Tensor, *, quick: bool = False) -> tuple[Tensor, Tensor]:
        """(distance, ratio to what is allowed) of every token's row: (n, length) each."""
        name = self.model.family.queries(1)[0]
        parameters = self.model.parameters if quick else self.exact
        parts = [self.model.inputs([name], part, parameters=parameters)[name] for part in torch.split(sentences, ROWS)]
        return excess(self.second, torch.cat(parts), self.rounding)

    def verdict(self, tokens: tuple[int, ...]) -> Found:
        """The sentence as it stands."""
        distance, ratio = self.rows(torch.tensor([tokens]))
        return Found(tokens, float(distance.max()), bool(ratio.max() <= 1), float(distance.mean()))

    def corrected(self, tokens: tuple[int, ...], choices: list[list[int]], budget: int) -> Found:
        """The sentence after replacing one token at a time, the worst row's first, as long as that brings the rows nearer.

        choices: token ids per position. budget: replacements that may be tried.
        """
        current = torch.tensor(tokens)
        distance = self.rows(current[None], quick=True)[0][0].square()
        untried = set(range(1, len(tokens)))
        while untried and budget > 0:
            place = max(untried, key=lambda p: float(distance[p]))
            untried.discard(place)
            other = [token for token in choices[place] if token != int(current[place])][:budget]
            if not other:
                continue
            budget -= len(other)
            trials = current.repeat(len(other), 1)
            trials[:, place] = torch.tensor(other)
            rows = self.rows(trials, quick=True)[0].square()
            best = int(rows.mean(1).argmin())
            if float(rows[best].mean()) < float(distance.mean()) * (1 - 1e-6):
                current, distance = trials[best], rows[best]
                untried = set(range(1, len(tokens))) - {place}
                if float(distance.max()) < 1e-6:  # as near as float32 can tell
                    break
        return self.verdict(tuple(current.tolist()))


def unambiguous(pairs: Pairs) -> tuple[int, ...] | None:
    """The only sentence there can be, when each position has one candidate."""
    order = pairs.places.argsort()
    alone = torch.equal(pairs.places[order], torch.arange(len(pairs)))
    return tuple(pairs.ids[order].tolist()) if alone else None


def assemble(
    judge: Judge,
    pairs: Pairs,
    share: Tensor,
    outside: Tensor | None,
    *,
    at_once: int,
    batch_size: int | None,
    tries: int,
    budget: int,
    on_step: OnStep | None = None,
) -> list[Found]:
    """The sentences of the batch: proven ones first, then the nearest guesses, up to the batch size where it is known.

    share    (m,) how certain each candidate is to stand where it does: near 1 for one that certainly does
    at_once  candidates that are weighed together: those of the largest shares
    outside  N (equations, width), orthogonal to every attention output of the first layer; None where it was not released
    """
    order = share.argsort(descending=True)
    choices = [pairs.ids[order][pairs.places[order] == place].tolist() for place in range(int(pairs.places.max()) + 1)]
    only = unambiguous(pairs)
    if only is not None:
        alone = judge.verdict(only)
        if alone.proven or outside is None or batch_size == 1:
            return [alone]
    if outside is None:
        return []
    likely = order[:at_once]
    likely = torch.unique(torch.cat([likely, (pairs.places == 0).nonzero()[:, 0]]))
    pairs, share = pairs.at(likely), share[likely]
    attention = Attention.of(judge.model, judge.exact, pairs, outside)
    proven: list[Found] = []
    guesses: list[Found] = []
    tried = 0
    queue = [i for i in (share - 1).abs().argsort().tolist() if int(pairs.places[i]) > 0]
    covered = torch.zeros(len(pairs), dtype=torch.bool)
    limit = tries * (batch_size or len(choices))
    while queue and tried < limit and (batch_size is None or len(proven) < batch_size):
        focus = queue.pop(0)
        if bool(covered[focus]):
            continue
        tried += 1
        found: Found | None = None
        # What stands once in the batch, and has found its sentence, is in no other; but a share of 1 can also be that of
        # a token which stands at this position in two sentences.
        spent = covered & ((share - 1).abs() < ONCE) & (pairs.places > 0)
        for away in (spent, torch.zeros_like(spent)) if bool(spent.any()) else (spent,):
            rest = (~away).nonzero()[:, 0]
            guess = _proposal(
                attention.at(rest), pairs.at(rest), share[rest], int((rest == focus).nonzero()), judge.model
            )
            if guess is None or any(guess == other.tokens for other in (*proven, *guesses)):
                continue
            found = judge.verdict(guess)
            if not found.proven:
                found = judge.corrected(guess, choices, budget)
            if found.proven:
                break
            guesses.append(found)
        if found is None:
            continue
        if found.proven and found not in proven:
            proven.append(found)
            for place, token in enumerate(found.tokens):
                covered |= (pairs.places == place) & (pairs.ids == token)
        if on_step is not None:
            on_step(tried, limit, found.distance)
    missing = max((batch_size or len(proven)) - len(proven), 0)
    return proven + _distinct(proven, guesses, missing)


def _proposal(
    attention: Attention, pairs: Pairs, share: Tensor, focus: int, model: LanguageModel
) -> tuple[int, ...] | None:
    """The sentence that linear systems put around the candidate `focus`."""
    certain = pairs.places == 0
    if int(certain.sum()) > 1:
        certain = torch.zeros_like(certain)
    w, _ = memberships(attention, pairs, focus, certain, _guess(pairs, share))
    return _rounded(model, pairs, w, focus)


def _guess(pairs: Pairs, share: Tensor) -> Tensor:
    """A start for w: the shares, brought to a sum of 1 at each position."""
    w = share.clamp(0.02, 1)
    total = torch.zeros(int(pairs.places.max()) + 1, dtype=w.dtype).index_add_(0, pairs.places, w)
    return w / total[pairs.places]


def _rounded(model: LanguageModel, pairs: Pairs, w: Tensor, focus: int) -> tuple[int, ...] | None:
    """The likeliest token at each position, up to the closing token, or to where no position is taken any more."""
    close, tokens = model.tokenizer.sep_token_id, list[int]()
    ends = (pairs.ids == close) & (pairs.places >= pairs.places[focus]) if close is not None else None
    last = None
    if ends is not None and bool(ends.any()) and float(w[ends].max()) > 0:
        where = ends.nonzero()[:, 0]
        last = int(pairs.places[where[w[where].argmax()]])
    for place in range(int(pairs.places.max()) + 1):
        here = (pairs.places == place).nonzero()[:, 0]
        if close is not None and last is not None and place < last:
            here = here[pairs.ids[here] != close] if bool((pairs.ids[here] != close).any()) else here
        if not len(here) or (last is None and place > int(pairs.places[focus]) and float(w[here].sum()) < 0.5):
            break
        if place == last and close is not None:
            tokens.append(close)
            break
        tokens.append(int(pairs.ids[here[w[here].argmax()]]))
    return tuple(tokens) if len(tokens) > 1 else None


def _distinct(proven: list[Found], guesses: list[Found], count: int) -> list[Found]:
    """The nearest guesses that share less than half of their tokens' places with anything chosen before."""
    chosen: list[Found] = []
    for found in sorted(guesses, key=lambda found: found.mean):
        if len(chosen) == count:
            break
        others = [*proven, *chosen]
        if all(_overlap(found.tokens, other.tokens) < 0.5 for other in others):
            chosen.append(found)
    rest = [found for found in sorted(guesses, key=lambda found: found.mean) if found not in chosen]
    return chosen + rest[: count - len(chosen)]


def _overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    return sum(x == y for x, y in zip(a, b, strict=False)) / max(len(a), 1)
