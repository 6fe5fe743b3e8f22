"""An order for a bag of tokens, by the gradient that it would give. Own.

Where nothing behind the first attention was released, DAGER's tokens are certain and its sentences are not: without positions in
the first layer's inputs their order, with positions which of them go together. Exchanges of tokens, and of ends of sentences, are
kept as long as they bring the gradient of the whole nearer to the release. At the true sentences it agrees to rounding. A
causal language model's own loss gives a second start.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.func import functional_call

from gradleak.modalities.modality import Tokens
from gradleak.observations.model import LanguageModel
from gradleak.observations.observation import TextObservation
from gradleak.observations.tensors import flatten
from gradleak.observations.transformer import layout_of

BEAM = 64  # orders that are continued: more than the 24 of four tokens, for which the search is exact (test_dager.py)
EXACT = 1e-5  # rounding: float32 leaves 1e-7 at the true sentences (docs/findings/text.md, "Order alone")


@dataclass(frozen=True)
class Ordered:
    """Sentences, the labels they were given, and ||simulated - released|| / ||released|| in the first block."""

    sentences: Tokens
    labels: tuple[int, ...]
    distance: float = torch.inf


def ordered(
    observation: TextObservation, choices: list[list[int]], *, generator: torch.Generator, budget: int
) -> Ordered:
    """The sentences whose gradient comes nearest.

    choices: tokens per position, likeliest first; one list of all of them where the first layer's inputs have no positions,
    for a single text. budget: gradients that may be computed.
    """
    architecture, layout = observation.model.architecture, layout_of(observation.model)
    first = {name: tensor for name, tensor in observation.released.items() if name.startswith(f"{layout.block(0)}.")}
    observation = replace(observation, released=first)  # the embeddings' gradients would be most of the work
    starts: list[Tokens] = [(tuple(choices[0]),)]
    if layout.placed:
        starts = [_dealt(choices, observation.batch_size or 1, architecture.tokenizer.sep_token_id)]
    elif architecture.task == "causal-lm" and layout.causal:
        starts.append((fluent(observation.model, choices[0]),))
    ends = [_descended(observation, start, choices, generator, iter(range(budget // len(starts)))) for start in starts]
    return min(ends, key=lambda end: end.distance)


def closed(model: LanguageModel, sentences: Sequence[tuple[int, ...]]) -> Tokens:
    """With the end-of-text token behind each, which a decoder only predicts."""
    predicted = model.architecture.task == "causal-lm" and layout_of(model).causal
    end = model.architecture.tokenizer.eos_token_id if predicted else None
    return tuple(tokens if end is None else (*tokens, end) for tokens in sentences)


def fluent(model: LanguageModel, tokens: Sequence[int]) -> tuple[int, ...]:
    """The order of these tokens that a causal language model itself finds likeliest, by beam search."""
    beam: list[tuple[tuple[int, ...], float]] = [((token,), 0.0) for token in tokens]
    end = model.architecture.tokenizer.eos_token_id
    for length in range(1, len(tokens) + 1):
        ids = torch.tensor([prefix for prefix, _ in beam])
        with torch.no_grad():
            logits = functional_call(model.module, model.parameters, (), {"input_ids": ids}).logits[:, -1]
        likelihood = torch.log_softmax(logits, dim=-1)
        if length == len(tokens):
            scores = [
                score + (float(row[end]) if end is not None else 0.0)
                for (_, score), row in zip(beam, likelihood, strict=True)
            ]
            return beam[max(range(len(beam)), key=scores.__getitem__)][0]
        longer = [
            ((*prefix, token), score + float(row[token]))
            for (prefix, score), row in zip(beam, likelihood, strict=True)
            for token in tokens
            if token not in prefix
        ]
        beam = sorted(longer, key=lambda entry: -entry[1])[:BEAM]
    return ()


def _descended(
    observation: TextObservation,
    start: Tokens,
    choices: list[list[int]],
    generator: torch.Generator,
    budget: Iterator[int],
) -> Ordered:
    """Moves from there as long as one comes nearer."""
    architecture = observation.model.architecture
    placed, classes = layout_of(observation.model).placed, 1
    if architecture.task == "classification":
        classes = architecture.config.num_labels
    current = Ordered(start, (0,) * len(start))
    current = _nearest(observation, current, _labellings(current, classes), budget)
    while current.distance > EXACT:
        before = current
        for kind in (
            [*_labellings(current, classes), *_exchanges(current, placed)],
            _changes(current, choices, placed),
        ):
            moves = list(kind)
            shuffled = [moves[i] for i in torch.randperm(len(moves), generator=generator).tolist()]
            current = _nearest(observation, current, shuffled, budget, first=True)
            if current is not before:
                break
        else:
            break
    return current


def _nearest(
    observation: TextObservation,
    current: Ordered,
    moves: Sequence[Ordered],
    budget: Iterator[int],
    *,
    first: bool = False,
) -> Ordered:
    """The best of these, or the first that is better; the current one if none is, or the budget is spent."""
    best = current
    for move, _ in zip(moves, budget, strict=False):
        distance = _distance(observation, move)
        if distance < best.distance:
            best = replace(move, distance=distance)
            if first:
                break
    return best


def _distance(observation: TextObservation, move: Ordered) -> float:
    tokens, task = closed(observation.model, move.sentences), observation.model.architecture.task
    if task == "causal-lm" and max(map(len, tokens)) < 2:
        return torch.inf
    gradient = observation.simulate(tokens, torch.tensor(move.labels) if task == "classification" else None)
    released = flatten(observation.released)
    return float((flatten({name: gradient[name] for name in observation.released}) - released).norm() / released.norm())


def _labellings(current: Ordered, classes: int) -> list[Ordered]:
    """One label changed, and none."""
    labels = [current.labels]
    labels += [
        (*current.labels[:i], new, *current.labels[i + 1 :])
        for i, old in enumerate(current.labels)
        for new in range(classes)
        if new != old
    ]
    return [Ordered(current.sentences, changed) for changed in labels]


def _exchanges(current: Ordered, placed: bool) -> Iterator[Ordered]:
    """The same tokens in another order: two sentences exchange a token or their ends; without positions, tokens move in a
    sentence."""
    rows = current.sentences
    for s in range(len(rows)):
        for t in range(s):
            a, b = rows[s], rows[t]
            for p in range(1, min(len(a), len(b))):
                yield _with(current, {s: a[:p] + b[p:], t: b[:p] + a[p:]})
                yield _with(current, {s: (*a[:p], b[p], *a[p + 1 :]), t: (*b[:p], a[p], *b[p + 1 :])})
    if placed:
        return
    row = rows[0]
    for i in range(len(row)):
        rest = row[:i] + row[i + 1 :]
        yield from (_with(current, {0: (*rest[:j], row[i], *rest[j:])}) for j in range(len(row)) if j != i)
        yield from (_with(current, {0: (*row[:j], row[i], *row[j + 1 : i], row[j], *row[i + 1 :])}) for j in range(i))


def _changes(current: Ordered, choices: list[list[int]], placed: bool) -> Iterator[Ordered]:
    """Tokens that occur more or less often: at their position, or wherever they fit."""
    for s, row in enumerate(current.sentences):
        if placed:
            for p, ids in enumerate(choices[: len(row) + 1]):
                yield from (
                    _with(current, {s: (*row[:p], token, *row[p + 1 :])}) for token in ids if row[p : p + 1] != (token,)
                )
            if len(row) > 1:
                yield _with(current, {s: row[:-1]})
            continue
        for token in choices[0]:
            yield from (_with(current, {s: (*row[:j], token, *row[j:])}) for j in range(len(row) + 1))
        for j, token in enumerate(row):
            if row.count(token) > 1:
                yield _with(current, {s: row[:j] + row[j + 1 :]})


def _with(current: Ordered, changed: dict[int, tuple[int, ...]]) -> Ordered:
    rows = tuple(changed.get(number, row) for number, row in enumerate(current.sentences))
    return Ordered(rows, current.labels)


def _dealt(choices: list[list[int]], count: int, close: int | None) -> Tokens:
    """Tokens dealt out position by position; a text ends with its closing token, or where there are fewer tokens than texts."""
    rows: list[list[int]] = [[] for _ in range(count)]
    open_ = list(range(count))
    for place, ids in enumerate(choices):
        likely = ids[: len(open_)]
        plain = [token for token in likely if token != close]
        ends = place > 0 and (close in likely if close is not None else len(plain) < len(open_))
        if ends and close is not None:
            complete = len(open_) if place == len(choices) - 1 else 1
            for number in open_[:complete]:
                rows[number].append(close)
            open_ = open_[complete:]
        elif ends:
            open_ = open_[: len(plain)]
        for i, number in enumerate(open_):
            if plain:
                rows[number].append(plain[min(i, len(plain) - 1)])
    return tuple(tuple(row) for row in rows if row)
