"""Sentences of an encoder, in polynomial time: who shares the sentence of a token whose attention's output is known (path.py).

The output for token i is, in each head h, an average over the tokens s of its sentence,

    o_i = sum_s w_s e_is v_s / sum_s w_s e_is,   e_is = exp(q_i . k_s / sqrt(width of a head)),

with w_s = 1 for members and 0 for others. Queries, keys and values of every candidate are known, and so is o_i:
sum_s w_s e_is (v_s - o_i) = 0 is linear in w, free of the normaliser, and the same for all tokens of the sentence.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.attacks.dager.judge import Judge, Sentence
from gradleak.attacks.dager.path import Path
from gradleak.attacks.dager.vocabulary import Pairs
from gradleak.attacks.search.descend import OnStep
from gradleak.observations.transformer import layout_of

# How these were chosen: path.py, at STEPS.
AT_ONCE = 1_024  # candidates whose outputs are computed before sentences are sought
TWICE = 2  # proposals that may hold a token before it is no focus any more, until more outputs are known
TOGETHER = 8  # tokens of a sentence whose equations are solved together
TURNS = 5  # times that the members of a sentence are solved for, with more of its tokens each time
GAPS = 5  # positions of a sentence that may be filled before every candidate's output is known
BEYOND = 4  # positions behind the last member that may be filled, where no token closes the sentence
UNSURE = 0.2  # a weight further than this from 1: the candidates of that position are weighed once more


@dataclass(frozen=True)
class Attention:
    """The candidates with their queries, keys and values in the first layer: (heads, m, width of a head) each."""

    pairs: Pairs
    close: int | None  # the token that ends a sentence
    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def of(cls, judge: Judge, pairs: Pairs) -> "Attention":
        """For a block that `Path` knows: query, key and value are layers of their own."""
        architecture, layers = judge.model.architecture, layout_of(judge.model).queries(0)
        heads = architecture.config.num_attention_heads
        qkv = (pairs.x @ judge.exact[f"{layer}.weight"].T + judge.exact[f"{layer}.bias"] for layer in layers)
        q, k, v = (torch.unflatten(part, 1, (heads, -1)).transpose(0, 1) for part in qkv)
        return cls(pairs, architecture.tokenizer.sep_token_id, q, k, v)

    def system(self, i: int, o: Tensor, others: Tensor) -> Tensor:
        """A (width, others) with A w = 0 for the sentence of candidate i, whose output is o (width,)."""
        score = (self.k[:, others] @ self.q[:, i, :, None])[..., 0] / self.q.shape[2] ** 0.5  # (heads, others)
        e = score.softmax(1)
        A: Tensor = e[:, None] * (self.v[:, others].mT - o.reshape(len(self.q), -1, 1))
        return A.flatten(0, 1)

    def sentence(self, focus: int, outputs: dict[int, Tensor], most: int) -> tuple[int, ...] | None:
        """The sentence of the candidate `focus`: its members among those with known outputs, then whoever fills the gaps; None
        where there are more than `most` of these."""
        ids, places = self.pairs.ids, self.pairs.places
        others, together = torch.tensor(list(outputs)), [focus]
        for turn in range(TURNS):
            sure = torch.isin(others, torch.tensor(together))
            w = members([self.system(i, outputs[i], others) for i in together], sure)
            likely = self._one_per_place(others, w, focus)
            # An output may be that of the same token in another sentence: those whose equations are explained best go on.
            rest = {i: _unexplained(self.system(i, outputs[i], others), w) for i in likely if i in outputs}
            together = sorted(rest, key=lambda i: (i != focus, rest[i]))[:TOGETHER]
            if turn == 0:
                continue
            settled = {int(places[i]) for i, weight in likely.items() if turn == 1 or abs(weight - 1) < UNSURE}
            closed = any(int(ids[i]) == self.close and int(places[i]) in settled for i in likely)
            gaps = sorted(set(range(max(settled) + (1 if closed else 1 + BEYOND))) - settled)
            if not gaps:
                break
            if len(gaps) > most:
                return None
            fillers = torch.isin(places, torch.tensor(gaps)).nonzero()[:, 0]
            others = torch.unique(torch.cat([torch.tensor(list(likely)), fillers]))
        return self._rounded(list(likely), focus)

    def _one_per_place(self, others: Tensor, w: Tensor, focus: int) -> dict[int, float]:
        """The members and their weights: the best of each position with more than half a membership, and the focus."""
        best: dict[int, tuple[float, int]] = {}
        for i, weight in zip(others.tolist(), w.tolist(), strict=True):
            place = int(self.pairs.places[i])
            if weight > best.get(place, (0.5, 0))[0]:
                best[place] = (weight, i)
        best[int(self.pairs.places[focus])] = (1.0, focus)
        return {i: weight for weight, i in best.values()}

    def _rounded(self, likely: Sequence[int], focus: int) -> tuple[int, ...]:
        """The members up to the closing token behind the focus; a position without one takes its likeliest candidate."""
        ids, places = self.pairs.ids, self.pairs.places
        member, tokens = {int(places[i]): int(ids[i]) for i in likely}, list[int]()
        for place in range(max(member) + 1):
            tokens.append(member[place] if place in member else int(ids[places == place][0]))
            if tokens[-1] == self.close and place >= int(places[focus]):
                break
        return tuple(tokens)


def members(systems: Sequence[Tensor], sure: Tensor) -> Tensor:
    """w (others,) >= 0 with A w ~ 0 for every system A (width, others), and w = 1 where it is sure (others,) bool."""
    from scipy.optimize import nnls

    A = torch.cat(list(systems))
    constant = A[:, sure].sum(1, keepdim=True)
    R = torch.linalg.qr(torch.cat([A[:, ~sure], constant], 1), mode="r").R
    w = torch.ones(A.shape[1], dtype=torch.float64)
    w[~sure] = torch.from_numpy(nnls(R[:, :-1].numpy(), -R[:, -1].numpy())[0])
    return w


def _unexplained(A: Tensor, w: Tensor) -> float:
    """How far equations A w = 0 are from holding, relative to their terms."""
    terms = A * w.double()
    return float(terms.sum(1).norm() / terms.norm())


def assemble(
    judge: Judge, pairs: Pairs, path: Path | None, *, batch_size: int | None, budget: int, on_step: OnStep | None = None
) -> list[Sentence]:
    """The sentences of the batch: those that pass first, then the nearest guesses, up to the batch size where it is known.

    pairs: likeliest first. path: from the attention's output to the end of the block; None where that was not released.
    """
    only = pairs.only_sentence()
    if only is not None:
        alone = judge.verdict(only)
        if alone.passes or path is None or batch_size == 1:
            return [alone]
    if path is None:
        return []
    choices, attention = pairs.by_place(), Attention.of(judge, pairs)
    outputs, judged = dict[int, Tensor](), dict[tuple[int, ...], Sentence]()
    parts = torch.split(torch.arange(len(pairs)), AT_ONCE)
    for number, part in enumerate(parts, 1):
        o, near = path.outputs(pairs.x[part])
        outputs |= {int(i): output for i, output, sure in zip(part, o, near, strict=True) if bool(sure)}
        proposed, passing = Counter[tuple[int, int]](), [s for s in judged.values() if s.passes]
        for focus in outputs:
            place, token = int(pairs.places[focus]), int(pairs.ids[focus])
            covered = any(sentence.tokens[place : place + 1] == (token,) for sentence in passing)
            if covered or place == 0 or proposed[place, token] >= TWICE:
                continue
            tokens = attention.sentence(focus, outputs, GAPS if number < len(parts) else len(choices))
            proposed.update(enumerate(tokens or ()))
            if tokens is None or tokens in judged:
                continue
            judged[tokens] = judge.verdict(tokens)
            if judged[tokens].passes:
                passing.append(judged[tokens])
                if len(passing) == batch_size:
                    return passing
        if on_step is not None:
            on_step(number, len(parts), 1 - len(passing) / (batch_size or max(len(passing), 1)))
    for guess in [s for s in _best(list(judged.values()), batch_size) if not s.passes]:
        better = judge.corrected(guess.tokens, choices, budget)
        judged[better.tokens] = better
    return _best(list(judged.values()), batch_size)


def _best(judged: Sequence[Sentence], batch_size: int | None) -> list[Sentence]:
    """Those that pass, then as many guesses as are missing: the nearest that share less than half of their tokens' places
    with any before, then the nearest of the rest."""
    passing, distinct = [s for s in judged if s.passes], list[Sentence]()
    guesses = sorted((s for s in judged if not s.passes), key=lambda guess: guess.mean)
    missing = max((batch_size or 0) - len(passing), 0)
    for guess in guesses:
        if len(distinct) < missing and all(_overlap(guess, other) < 0.5 for other in [*passing, *distinct]):
            distinct.append(guess)
    return passing + (distinct + [guess for guess in guesses if guess not in distinct])[:missing]


def _overlap(a: Sentence, b: Sentence) -> float:
    return sum(map(int.__eq__, a.tokens, b.tokens)) / max(len(a.tokens), 1)
