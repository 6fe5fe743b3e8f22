"""Sentences of a decoder, token by token (algorithm 2). The input of a layer behind the first attention depends on the tokens up
to its position, so a prefix is right when that input lies in the span which the gradient shows. There is no search over
products of positions.

Noise may make a true token fail and a false one pass. Then sentences are weighed as a whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.attacks.dager.judge import Judge
from gradleak.observations.model import LanguageModel
from gradleak.observations.transformer import layout_of

# Times that a text may begin with one token: Llama's first layer cannot tell a repetition from one token. With 2 and with 8,
# the same 18 small sentences come back.
REPEATS = 4
# Prefixes kept that share more than half of their tokens: a sentence and one rival. With 1, one of 18 small sentences under
# noise or from updates is lost; with 4 none is won.
ALIKE = 2


@dataclass(frozen=True)
class Prefix:
    """Tokens, the largest relative distance of their rows to the spans, and how badly they fit: the sum over the rows of
    ratio^2 - limit^2, which is the lower the longer and the nearer they are."""

    tokens: tuple[int, ...]
    distance: float = 0.0
    cost: float = 0.0


def grow(judge: Judge, candidates: Sequence[Tensor], *, widest: int) -> list[Prefix]:
    """Every sentence that passes at each of its positions and cannot be continued.

    candidates: token ids per position, or one set for all of them. widest: prefixes kept, those that fit best.
    """
    beam, ended = [Prefix(())], list[Prefix]()
    for ids in _by_place(judge.model, candidates):
        longer = _extended(judge, beam, ids, limit=1.0, neutral=1.0)
        continued = {prefix.tokens[:-1] for prefix in longer}
        ended += [prefix for prefix in beam if prefix.tokens not in continued and prefix.tokens]
        beam = sorted(longer, key=lambda prefix: prefix.cost)[:widest]
        if not beam:
            break
    return _whole(ended + beam)


def nearest(grown: Sequence[Prefix], rank: int, batch_size: int | None) -> tuple[list[Prefix], bool]:
    """The texts that fit best: as many as the batch had, or as explain all directions, of which every prefix makes one, but for
    repetitions: longer texts than that come last. And whether these are all that passed, and leave no direction to another."""
    kept, prefixes = list[Prefix](), set[tuple[int, ...]]()
    for text in sorted(grown, key=lambda text: (len(text.tokens) > rank + REPEATS, text.cost)):
        if len(kept) == batch_size or (batch_size is None and len(prefixes) >= rank):
            break
        kept.append(text)
        prefixes |= {text.tokens[: i + 1] for i in range(len(text.tokens))}
    return kept, len(kept) == len(grown) and len(prefixes) >= rank


def likely(
    judge: Judge, candidates: Sequence[Tensor], *, count: int, widest: int, limit: float, neutral: float
) -> list[Prefix]:
    """The `count` sentences that fit best as a whole, where noise makes true tokens fail and false ones pass.

    limit: times what noise allows a member, beyond which nothing is kept. neutral: the ratio^2 at which a token speaks neither
    for nor against a sentence. What shares most of its tokens with better ones makes room for other sentences.
    """
    beam, every = [Prefix(())], list[Prefix]()
    for ids in _by_place(judge.model, candidates):
        longer = _extended(judge, beam, ids, limit=limit, neutral=neutral, quick=True)
        beam = _unlike([prefix for prefix in longer if prefix.cost <= limit], most=widest, alike=ALIKE)
        every += beam
        if not beam:
            break
    return _unlike(every, most=count, alike=1)


def _by_place(model: LanguageModel, candidates: Sequence[Tensor]) -> list[list[int]]:
    """Token ids per position: without positions in the first layer's inputs, the same at each."""
    layout = layout_of(model)
    if not layout.placed:
        return [candidates[0].tolist()] * layout.positions
    return [ids.tolist() for ids in candidates[: layout.positions]]


def _extended(
    judge: Judge, beam: list[Prefix], ids: list[int], *, limit: float, neutral: float, quick: bool = False
) -> list[Prefix]:
    """Every prefix with every token behind it that passes there, but for one token over and over."""
    longer = [(p, t) for p in beam for t in ids if len(p.tokens) < REPEATS or len({*p.tokens, t}) > 1]
    if not longer:
        return []
    ends = judge.ends(torch.tensor([(*prefix.tokens, token) for prefix, token in longer]), limit, quick=quick)
    extended = list[Prefix]()
    for i, distance, ratio in zip(*(part.tolist() for part in ends), strict=True):
        prefix, token = longer[i]
        cost = prefix.cost + ratio**2 - neutral
        extended.append(Prefix((*prefix.tokens, token), max(prefix.distance, distance), cost))
    return extended


def _unlike(prefixes: Sequence[Prefix], *, most: int, alike: int) -> list[Prefix]:
    """Those that fit best, each sharing more than half of its places with fewer than `alike` better ones."""
    chosen = list[Prefix]()
    for prefix in sorted(prefixes, key=lambda prefix: prefix.cost):
        near = sum(
            2 * sum(map(int.__eq__, prefix.tokens, p.tokens)) > min(len(prefix.tokens), len(p.tokens)) for p in chosen
        )
        if near < alike:
            chosen.append(prefix)
        if len(chosen) == most:
            break
    return chosen


def _whole(prefixes: Sequence[Prefix]) -> list[Prefix]:
    """Without beginnings of others, and without one token over and over: without positions in the first layer's inputs,
    its repetitions look like the first."""
    plain = {p.tokens[:1] if len(set(p.tokens)) == 1 else p.tokens: p for p in prefixes}
    begun = {tokens[:i] for tokens in plain for i in range(1, len(tokens))}
    return [Prefix(tokens, p.distance, p.cost) for tokens, p in plain.items() if tokens not in begun]
