"""The order of one text's tokens in an encoder whose first layer sees no positions: T5, whose attention adds a bias by distance, and
encoders with rotary positions.

The tokens are certain and the input of the second block depends on the whole text, so that an order is right when all rows lie in
their span. Wrong orders are the nearer the fewer tokens stand wrong: from random orders, tokens are exchanged and moved, and parts
turned round, as long as that brings the rows nearer. A text of 12 to 15 tokens came back from 1 to 6 of 10 random orders (T5 and
ModernBERT of width 64 and two blocks, three texts of the package each).
"""

from collections.abc import Iterator, Sequence
from itertools import combinations

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
    """The order of these tokens whose rows are nearest, and whether any order one move away passes as well; None for one token.

    Where the spans behind the attention have more directions than there are tokens, some stand more than once.
    """
    first, last = _ends(judge.model, bag)
    inner = [token for token in bag if token not in (*first, *last)]
    length = max(judge.clearest.rank, len(bag)) - len(first) - len(last)
    if len(bag) < 2 or not inner:
        return None

    def distances(orders: Sequence[tuple[int, ...]], quick: bool) -> Tensor:
        rows = torch.tensor([[*first, *order, *last] for order in orders])
        return judge.rows(rows, quick=quick)[0].double().square().mean(1)

    best, quick, tried = None, False, 0
    while tried < TRIED:
        more = torch.randint(len(inner), (length - len(inner),), generator=generator).tolist()
        tokens = [*inner, *(inner[i] for i in more)]
        order = tuple(tokens[i] for i in torch.randperm(length, generator=generator).tolist())
        distance = float(distances([order], False)[0])
        quick = quick or distance > CLEAR**2
        while True:
            others = [*_moves(order), *_replacements(order, inner)]
            tried += 1 + len(others)
            near = distances(others, quick) if others else torch.tensor([torch.inf])
            if not float(near.min()) < distance * (1 - 1e-6):  # by more than rounding
                break
            order, distance = others[int(near.argmin())], float(near.min())
        found = judge.verdict((*first, *order, *last))
        if best is None or found.mean < best[0].mean:
            best = found, order
        if on_step is not None:
            on_step(min(tried, TRIED), TRIED, best[0].mean)
        if best[0].passes:
            break
    if best is None:
        return None
    rivals = torch.tensor([[*first, *order, *last] for order in [*_moves(best[1]), *_replacements(best[1], inner)]])
    return best[0], len(rivals) > 0 and bool((judge.rows(rivals)[1].amax(1) <= 1).any())


def _ends(model: LanguageModel, bag: Sequence[int]) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind every text, of those in the bag."""
    architecture = model.architecture
    around: list[int] = list(architecture.tokenizer("")["input_ids"])
    end = architecture.tokenizer.eos_token_id
    if architecture.task == "causal-lm" and end is not None and around[-1:] != [end]:
        around.append(end)
    first, last = (around[:1], around[1:]) if len(around) > 1 else ([], around if around == [end] else [])
    return [token for token in first if token in bag], [token for token in last if token in bag]


def _moves(order: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Two tokens exchanged, a part turned round, or a few neighbours moved elsewhere."""
    changed = set[tuple[int, ...]]()
    for i, j in combinations(range(len(order)), 2):
        changed.add((*order[:i], order[j], *order[i + 1 : j], order[i], *order[j + 1 :]))
        changed.add((*order[:i], *reversed(order[i : j + 1]), *order[j + 1 :]))
        changed.add((*order[:i], order[j], *order[i:j], *order[j + 1 :]))
        for count in range(1, TOGETHER + 1):
            rest = order[:i] + order[i + count :]
            changed.add((*rest[:j], *order[i : i + count], *rest[j:]))
    return changed - {order}


def _replacements(order: tuple[int, ...], inner: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Another token in place of one that stands more than once."""
    for i, old in enumerate(order):
        if order.count(old) > 1:
            yield from ((*order[:i], token, *order[i + 1 :]) for token in inner if token != old)
