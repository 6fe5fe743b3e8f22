"""Sentences of an encoder out of the tokens that its first layer shows, in polynomial time: the attention's output for every
candidate (outputs.py), a linear system for the members of its sentence (memberships.py), and the spans behind the
attention, whose members depend on the whole sentence, as the judge."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from gradleak.attacks.dager.judge import Found, Judge
from gradleak.attacks.dager.memberships import Attention, Pairs, members
from gradleak.attacks.dager.outputs import Path
from gradleak.attacks.search.descend import OnStep
from gradleak.observations.model import LanguageModel

TWICE = 2  # proposals that hold a token before it is no focus any more, until more outputs are known
AT_ONCE = 1_024  # candidates whose outputs are sought before sentences are
TOGETHER = 8  # tokens of a sentence whose equations are solved together
GAPS = 5  # positions of a sentence that are filled before every candidate's output was sought
TURNS = 5  # times that the members of a sentence are solved for, with more of its tokens each time
UNSURE = 0.2  # from 1: then the candidates of that position are weighed once more
BEYOND = 4  # positions after the last that is taken


def unambiguous(pairs: Pairs) -> tuple[int, ...] | None:
    """The only sentence there can be, when each position has one candidate."""
    order = pairs.places.argsort()
    alone = torch.equal(pairs.places[order], torch.arange(len(pairs)))
    return tuple(pairs.ids[order].tolist()) if alone else None


def by_place(pairs: Pairs) -> list[list[int]]:
    """Token ids per position, in the order of the candidates."""
    return [pairs.ids[pairs.places == place].tolist() for place in range(int(pairs.places.max()) + 1)]


def assemble(
    judge: Judge,
    pairs: Pairs,
    path: Path | None,
    *,
    batch_size: int | None,
    budget: int,
    on_step: OnStep | None = None,
) -> list[Found]:
    """The sentences of the batch: proven ones first, then the nearest guesses, up to the batch size where it is known.

    pairs: likeliest first. path: from the attention's output to the end of the block; None where that was not seen.
    """
    only = unambiguous(pairs)
    if only is not None:
        alone = judge.verdict(only)
        if alone.proven or path is None or batch_size == 1:
            return [alone]
    if path is None:
        return []
    choices = by_place(pairs)
    attention = Attention.of(judge.model, judge.exact, pairs.x)
    outputs: dict[int, Tensor] = {}
    proven: dict[tuple[int, ...], Found] = {}
    guesses: dict[tuple[int, ...], Found] = {}
    covered: set[tuple[int, int]] = set()
    parts = torch.split(torch.arange(len(pairs)), AT_ONCE)
    for number, part in enumerate(parts, 1):
        o, near = path.outputs(pairs.x[part])
        outputs |= {int(i): output for i, output, sure in zip(part, o, near, strict=True) if bool(sure)}
        proposed = Counter[tuple[int, int]]()
        for focus in outputs:
            own = (int(pairs.places[focus]), int(pairs.ids[focus]))
            if own in covered or own[0] == 0 or proposed[own] >= TWICE:
                continue
            most = GAPS if number < len(parts) else len(choices)
            tokens = _around(judge.model, attention, pairs, outputs, focus, most)
            proposed.update(enumerate(tokens or ()))
            if tokens is None or tokens in proven or tokens in guesses:
                continue
            found = judge.verdict(tokens)
            if found.proven:
                proven[tokens] = found
                covered |= set(enumerate(tokens))
                if len(proven) == batch_size:
                    return list(proven.values())
            else:
                guesses[tokens] = found
        if on_step is not None:
            on_step(number, len(parts), 1 - len(proven) / (batch_size or max(len(proven), 1)))
    missing = max((batch_size or len(proven)) - len(proven), 0)
    for found in _distinct(list(proven.values()), list(guesses.values()), missing):
        better = judge.corrected(found.tokens, choices, budget)
        (proven if better.proven else guesses)[better.tokens] = better
    missing = max((batch_size or len(proven)) - len(proven), 0)
    return list(proven.values()) + _distinct(list(proven.values()), list(guesses.values()), missing)


def _around(
    model: LanguageModel, attention: Attention, pairs: Pairs, outputs: dict[int, Tensor], focus: int, most: int
) -> tuple[int, ...] | None:
    """The sentence of the candidate `focus`: its members among those with known outputs, then whoever fills the gaps; None
    where there are more than `most` of these."""
    close = model.architecture.tokenizer.sep_token_id
    others = torch.tensor(list(outputs))
    together = [focus]
    for turn in range(TURNS):
        sure = torch.isin(others, torch.tensor(together))
        w = members([attention.system(i, outputs[i], others) for i in together], sure)
        likely = _one_per_place(pairs, others, w, focus)
        # Those whose own equations are explained best: an output may be that of the same token in another sentence.
        rest = {i: _unexplained(attention, outputs[i], i, others, w) for i in likely if i in outputs}
        together = sorted(rest, key=lambda i: (i != focus, rest[i]))[:TOGETHER]
        if turn == 0:
            continue
        settled = {int(pairs.places[i]) for i, weight in likely.items() if turn == 1 or abs(weight - 1) < UNSURE}
        closed = any(int(pairs.ids[i]) == close and int(pairs.places[i]) in settled for i in likely)
        last = max(settled) + (0 if closed else BEYOND)
        gaps = [place for place in range(last + 1) if place not in settled]
        if not gaps:
            break
        if len(gaps) > most:
            return None
        fillers = torch.isin(pairs.places, torch.tensor(gaps)).nonzero()[:, 0]
        others = torch.unique(torch.cat([torch.tensor(list(likely)), fillers]))
    return _rounded(model, pairs, list(likely), focus)


def _one_per_place(pairs: Pairs, others: Tensor, w: Tensor, focus: int) -> dict[int, float]:
    """The members and their weights: candidates with more than half a membership, the best of each position, the focus at its
    own."""
    best: dict[int, tuple[float, int]] = {}
    for i, weight in zip(others.tolist(), w.tolist(), strict=True):
        place = int(pairs.places[i])
        if weight > 0.5 and weight > best.get(place, (0.0, 0))[0]:
            best[place] = (weight, i)
    best[int(pairs.places[focus])] = (1.0, focus)
    return {i: weight for weight, i in best.values()}


def _unexplained(attention: Attention, o: Tensor, i: int, others: Tensor, w: Tensor) -> float:
    """How far the equations of candidate i are from holding with these memberships, relative to their terms."""
    A = attention.system(i, o, others) * w.double()
    return float(A.sum(1).norm() / A.norm())


def _rounded(model: LanguageModel, pairs: Pairs, likely: Sequence[int], focus: int) -> tuple[int, ...]:
    """The members by position, up to the closing token behind the focus; a position without one takes the likeliest of all."""
    close, here = model.architecture.tokenizer.sep_token_id, int(pairs.places[focus])
    member = {int(pairs.places[i]): int(pairs.ids[i]) for i in likely}
    tokens = list[int]()
    for place in range(max(member) + 1):
        tokens.append(member[place] if place in member else int(pairs.ids[(pairs.places == place).nonzero()[0, 0]]))
        if tokens[-1] == close and place >= here:
            break
    return tuple(tokens)


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
