"""The order of one text's tokens in an encoder whose first layer sees no positions: T5, whose attention adds a bias by distance, and
encoders with rotary positions.

The tokens are certain and the input of the second block depends on the whole text, so that an order is right when all rows lie in
their span. Wrong orders are the nearer the fewer tokens stand wrong: from random orders, tokens are exchanged and moved, and parts
turned round, as long as that brings the rows nearer. A text of 12 to 15 tokens came back from 1 to 6 of 10 random orders (T5 and
ModernBERT of width 64 and two blocks, three texts of the package each).
"""

from collections.abc import Sequence
from itertools import combinations, groupby

import torch
from torch import Tensor

from gradleak.attacks.dager.judge import Judge, Sentence
from gradleak.attacks.search.descend import OnStep
from gradleak.observations.model import LanguageModel

TRIED = 100_000  # orders in all: about 3,000 from one random order of 14 tokens to the nearest, so that 30 are tried
TOGETHER = 3  # neighbours that are moved as one, at most
CLEAR = 1e-3  # distance of a random order above which float32, which leaves 1e-6, is enough for the search


def arranged(
    judge: Judge, bag: Sequence[int], *, generator: torch.Generator, on_step: OnStep | None = None
) -> tuple[Sentence, bool] | None:
    """The order of these tokens whose rows are nearest, and whether it passes while no text one move away does; None for one token.

    Where the spans behind the attention have more directions than there are tokens, some stand more than once.
    """
    first, last = _ends(judge.model, bag)
    inner = [token for token in bag if token not in (*first, *last)]
    length = max(judge.clearest.rank, len(bag)) - len(first) - len(last)
    if len(bag) < 2 or not inner:
        return None

    def closest(orders: Sequence[tuple[int, ...]], quick: bool) -> tuple[float, tuple[int, ...]]:
        rows = [judge.rows(part, quick=quick)[0].double().square().mean(1) for part in _framed(first, orders, last)]
        every = torch.cat(rows)
        return float(every.min()), orders[int(every.argmin())]

    best, sure, quick, tried = None, False, False, 0
    while tried < TRIED and not sure:
        more = torch.randint(len(inner), (length - len(inner),), generator=generator).tolist()
        tokens = [*inner, *(inner[i] for i in more)]
        order = tuple(tokens[i] for i in torch.randperm(length, generator=generator).tolist())
        distance = closest([order], False)[0]
        quick = quick or distance > CLEAR**2
        while True:
            others = _others(order, inner)
            tried += len(others)
            nearest, other = closest(others, quick)
            if not nearest < distance * (1 - 1e-6):  # by more than rounding
                break
            distance, order = nearest, other
        found = judge.verdict((*first, *order, *last))
        if best is None or found.mean < best.mean:
            best, sure = found, found.passes and not passing(judge, found.tokens)
        if on_step is not None:
            on_step(min(tried, TRIED), TRIED, best.mean)
    return None if best is None else (best, sure)


def passing(judge: Judge, tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Texts one move away from this one whose rows all pass."""
    first, last = _ends(judge.model, tokens)
    inner = tokens[len(first) : len(tokens) - len(last)]
    parts = _framed(first, _others(inner, inner), last)
    return [tuple(row) for part in parts for row in part[judge.rows(part)[1].amax(1) <= 1].tolist()]


def _framed(first: list[int], orders: Sequence[tuple[int, ...]], last: list[int]) -> list[Tensor]:
    """Whole texts, (n, length) for each length, in the order given."""
    by_length = groupby(orders, key=len)
    return [torch.tensor([[*first, *order, *last] for order in some]) for _, some in by_length]


def _ends(model: LanguageModel, bag: Sequence[int]) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind every text, of those in the bag."""
    architecture = model.architecture
    around: list[int] = list(architecture.tokenizer("")["input_ids"])
    end = architecture.tokenizer.eos_token_id
    if architecture.task == "causal-lm" and end is not None and around[-1:] != [end]:
        around.append(end)
    first, last = (around[:1], around[1:]) if len(around) > 1 else ([], around if around == [end] else [])
    return [token for token in first if token in bag], [token for token in last if token in bag]


def _others(order: tuple[int, ...], inner: Sequence[int]) -> list[tuple[int, ...]]:
    """What is one move away, by length: two tokens exchanged, a part turned round, or a few neighbours moved elsewhere; another
    token in place of one that stands more than once, or without it; any token once more."""
    changed = set[tuple[int, ...]]()
    for i, j in combinations(range(len(order)), 2):
        changed.add((*order[:i], order[j], *order[i + 1 : j], order[i], *order[j + 1 :]))
        changed.add((*order[:i], *reversed(order[i : j + 1]), *order[j + 1 :]))
        changed.add((*order[:i], order[j], *order[i:j], *order[j + 1 :]))
        for count in range(1, TOGETHER + 1):
            rest = order[:i] + order[i + count :]
            changed.add((*rest[:j], *order[i : i + count], *rest[j:]))
    for i, old in enumerate(order):
        if order.count(old) > 1:
            changed.add(order[:i] + order[i + 1 :])
            changed |= {(*order[:i], token, *order[i + 1 :]) for token in inner}
    changed |= {(*order[:i], token, *order[i:]) for token in inner for i in range(len(order) + 1)}
    return sorted(changed - {order}, key=lambda other: (len(other), other))
