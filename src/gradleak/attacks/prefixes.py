"""Sentences of a decoder, token by token: what goes into a layer behind the first attention at a position depends on the tokens
up to there, so a prefix is right when that lies in the span that was seen. No product over positions arises."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradleak.attacks.judge import Judge

REPEATS = 4  # times that a text may begin with one token


def grow(judge: Judge, candidates: Sequence[Tensor], *, widest: int) -> list[tuple[tuple[int, ...], float]]:
    """Every sentence that passes at each of its positions and cannot be continued, with its largest distance.

    candidates: token ids per position, or one set for all of them. widest: prefixes kept, nearest first.
    """
    model = judge.model
    beam: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    done: list[tuple[tuple[int, ...], float]] = []
    for place in range(model.positions):
        if model.family.placed and place >= len(candidates):
            break
        ids = candidates[place if model.family.placed else 0].tolist()
        longer = [((*prefix, token), far) for prefix, far in beam for token in ids]
        longer = [entry for entry in longer if len(entry[0]) <= REPEATS or len(set(entry[0])) > 1]
        kept, continued = [], set[tuple[int, ...]]()
        passed, distance = judge.ends(torch.tensor([prefix for prefix, _ in longer]))
        for i, d in zip(passed.tolist(), distance.tolist(), strict=True):
            prefix, far = longer[i]
            kept.append((prefix, max(far, d)))
            continued.add(prefix[:-1])
        done += [entry for entry in beam if entry[0] not in continued and entry[0]]
        beam = sorted(kept, key=lambda entry: entry[1])[:widest]
        if not beam:
            break
    return _whole(done + beam)


def _whole(found: list[tuple[tuple[int, ...], float]]) -> list[tuple[tuple[int, ...], float]]:
    """Without beginnings of others, and without one token over and over: without positions in the first layer's inputs,
    its repetitions look like the first."""
    plain = {tokens[:1] if len(set(tokens)) == 1 else tokens: far for tokens, far in found}
    return [
        (tokens, far)
        for tokens, far in plain.items()
        if not any(len(other) > len(tokens) and other[: len(tokens)] == tokens for other in plain)
    ]
