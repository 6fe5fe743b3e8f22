"""Sentences of a decoder, token by token: what goes into a layer behind the first attention at a position depends on the tokens
up to there, so a prefix is right when that lies in the span that was seen. No product over positions arises.

Through noise a true token may fail and a false one pass; then sentences are weighed as a whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.attacks.dager.judge import Judge

REPEATS = 4  # times that a text may begin with one token
ALIKE = 2  # prefixes kept that share more than half of their tokens with one that fits better


@dataclass(frozen=True)
class Prefix:
    """Tokens, the largest relative distance of their rows to what was seen, and how badly they fit: the sum over the rows of
    ratio^2 - limit^2, which is the lower the longer and the nearer they are."""

    tokens: tuple[int, ...]
    distance: float = 0.0
    cost: float = 0.0


def grow(judge: Judge, candidates: Sequence[Tensor], *, widest: int, limit: float = 1.0) -> list[Prefix]:
    """Every sentence that passes at each of its positions and cannot be continued.

    candidates: token ids per position, or one set for all of them. widest: prefixes kept, those that fit best.
    limit: times what noise allows a member.
    """
    model = judge.model
    beam, done = [Prefix(())], list[Prefix]()
    for place in range(model.architecture.positions):
        if model.architecture.family.placed and place >= len(candidates):
            break
        ids = candidates[place if model.architecture.family.placed else 0].tolist()
        longer = _longer(beam, ids)
        kept, continued = [], set[tuple[int, ...]]()
        passed = judge.ends(torch.tensor([(*prefix.tokens, token) for prefix, token in longer]), limit)
        for i, far, ratio in zip(*(part.tolist() for part in passed), strict=True):
            prefix, token = longer[i]
            cost = prefix.cost + ratio**2 - limit**2
            kept.append(Prefix((*prefix.tokens, token), max(prefix.distance, far), cost))
            continued.add(prefix.tokens)
        done += [prefix for prefix in beam if prefix.tokens not in continued and prefix.tokens]
        beam = sorted(kept, key=lambda prefix: prefix.cost)[:widest]
        if not beam:
            break
    return _whole(done + beam)


def likely(
    judge: Judge, candidates: Sequence[Tensor], *, count: int, widest: int, limit: float, even: float
) -> list[Prefix]:
    """The `count` sentences that fit best as a whole, where noise makes true tokens fail and false ones pass.

    limit: times what noise allows a member, beyond which nothing is kept. even: the ratio^2 at which a token speaks neither for nor
    against a sentence. What shares most of its tokens with better ones has to make room for other sentences.
    """
    model = judge.model
    beam, every = [Prefix(())], list[Prefix]()
    for place in range(model.architecture.positions):
        if model.architecture.family.placed and place >= len(candidates):
            break
        longer = _longer(beam, candidates[place if model.architecture.family.placed else 0].tolist())
        passed = judge.ends(torch.tensor([(*prefix.tokens, token) for prefix, token in longer]), limit, quick=True)
        kept = list[Prefix]()
        for i, far, ratio in zip(*(part.tolist() for part in passed), strict=True):
            prefix, token = longer[i]
            cost = prefix.cost + ratio**2 - even
            if cost <= limit:
                kept.append(Prefix((*prefix.tokens, token), max(prefix.distance, far), cost))
        beam = _unlike(kept, most=widest, alike=ALIKE)
        every += beam
        if not beam:
            break
    return _unlike(every, most=count, alike=1)


def _longer(beam: list[Prefix], ids: list[int]) -> list[tuple[Prefix, int]]:
    """Every prefix with every token behind it, but for one token over and over."""
    return [(p, t) for p in beam for t in ids if len(p.tokens) < REPEATS or len({*p.tokens, t}) > 1]


def _unlike(found: list[Prefix], *, most: int, alike: int) -> list[Prefix]:
    """Those that fit best, of which less than `alike` that fit better share more than half of the places."""
    chosen = list[Prefix]()
    for prefix in sorted(found, key=lambda prefix: prefix.cost):
        near = sum(
            2 * sum(map(int.__eq__, prefix.tokens, p.tokens)) > min(len(prefix.tokens), len(p.tokens)) for p in chosen
        )
        if near < alike:
            chosen.append(prefix)
        if len(chosen) == most:
            break
    return chosen


def _whole(found: list[Prefix]) -> list[Prefix]:
    """Without beginnings of others, and without one token over and over: without positions in the first layer's inputs,
    its repetitions look like the first."""
    plain = {p.tokens[:1] if len(set(p.tokens)) == 1 else p.tokens: p for p in found}
    begun = {tokens[:i] for tokens in plain for i in range(1, len(tokens))}
    return [Prefix(tokens, p.distance, p.cost) for tokens, p in plain.items() if tokens not in begun]
