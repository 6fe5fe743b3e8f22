"""Every token of the vocabulary at every position against the span of the first layer's inputs, without computing most of
them.

The input of the first layer is norm(u_a + v_p), token plus position. With W = V diag(gamma) its coordinates in the span,
its length and its deviation are sums of a part of the token, a part of the position and one product of the two: three
products of (vocabulary x width) with (width x rank + positions) in place of one per position. What passes this float32
screen is computed again in float64. The vocabulary is streamed in chunks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradleak.attacks.dager.spans import Span, excess
from gradleak.errors import NotObserved
from gradleak.observations.layers import layer_inputs
from gradleak.observations.model import LanguageModel

CHUNK = 4_096  # tokens at a time
STAND_IN = 10  # tokens for a position where none passes
HIDDEN = 3  # such positions in a row that are the end
BLOCK = 32  # positions at a time
SCREEN = 1e-4  # float32 leaves less than this of the squared relative distance of a member


@dataclass(frozen=True)
class Embeddings:
    """Inputs of the first layer as norm(tokens[a] + places[p]), centred where the norm centres.

    tokens  (vocabulary, width) float32, at the first position
    places  (positions, width): what a position adds to that
    gamma, beta, eps, centred  of the normalisation
    """

    tokens: Tensor
    places: Tensor
    gamma: Tensor
    beta: Tensor
    eps: float
    centred: bool

    @classmethod
    def of(cls, model: LanguageModel) -> "Embeddings":
        """Read off the model by watching what enters its first normalisation; checked against what enters its first layer."""
        family = model.architecture.family
        name = family.first_norm()
        norm = model.module.get_submodule(name)
        ids = torch.arange(model.architecture.config.vocab_size)
        first = family.offset
        chunks = [layer_inputs(model, [name], part[:, None], at=first)[name][:, 0] for part in torch.split(ids, CHUNK)]
        tokens = torch.cat(chunks)
        places = torch.zeros(1, tokens.shape[1])
        if family.placed:
            row = torch.zeros(1, model.architecture.positions - first, dtype=torch.long)
            seen = layer_inputs(model, [name], row, at=first)[name][0]
            places = seen - seen[0]
        gamma = model.parameters[f"{name}.weight"].detach()
        beta = model.parameters.get(f"{name}.bias")
        eps = float(getattr(norm, "eps", None) or norm.variance_epsilon)  # type: ignore[arg-type]
        centred = isinstance(norm, nn.LayerNorm)
        if centred:
            tokens = tokens - tokens.mean(1, keepdim=True)
            places = places - places.mean(1, keepdim=True)
        made = cls(tokens, places, gamma, torch.zeros_like(gamma) if beta is None else beta.detach(), eps, centred)
        made._check(model)
        return made

    def inputs(self, ids: Tensor, places: Tensor) -> Tensor:
        """The first layer's inputs of (n,) tokens at (n,) positions, in float64: (n, width)."""
        y = self.tokens[ids].double() + self.places[places].double()
        return self.gamma.double() * y / (y.square().mean(1, keepdim=True) + self.eps).sqrt() + self.beta.double()

    def _check(self, model: LanguageModel) -> None:
        """NotObserved where this model's first inputs are something else than token plus position, normalised."""
        name = model.architecture.family.queries(0)[0]
        length = min(8, model.architecture.positions - model.architecture.family.offset)
        ids = torch.arange(2, 2 + length) % model.architecture.config.vocab_size
        true = layer_inputs(model, [name], ids[None], at=model.architecture.family.offset)[name][0].double()
        places = torch.arange(length) if model.architecture.family.placed else torch.zeros(length, dtype=torch.long)
        own = self.inputs(ids, places)
        if float((own - true).norm() / true.norm()) > 1e-4:
            raise NotObserved(
                "The first layer's inputs are not token plus position, normalised: they cannot be listed."
            )


def candidates(embeddings: Embeddings, found: list[Span], *, rounding: float, most: int) -> list[Tensor]:
    """Token ids that may stand at each position, nearest first, at most `most` each; ends before positions with none.

    Noise may hide the only token of a position: where none passes but others soon do, the nearest stand in.
    """
    kept: list[Tensor] = []
    end, places = 0, embeddings.places
    for start in range(0, len(places), BLOCK):
        block = torch.arange(start, min(start + BLOCK, len(places)))
        passed = _screen(embeddings, found, block, rounding, most)
        for place, ids in zip(block.tolist(), passed, strict=True):
            distance, ratio = excess(found, embeddings.inputs(ids, torch.full_like(ids, place)), rounding)
            near = distance.argsort()
            passes = near[ratio[near] <= 1]
            kept.append(ids[passes] if len(passes) else ids[near[:STAND_IN]])
            end = place + 1 if len(passes) else end
            if place + 1 - end == HIDDEN:
                return kept[:end]
    return kept[:end]


def _screen(e: Embeddings, found: list[Span], block: Tensor, rounding: float, most: int) -> list[Tensor]:
    """Token ids per position of the block that are near every span, up to float32 and to what noise allows."""
    width, count = e.tokens.shape[1], len(block)
    places = e.places[block]
    near: list[list[Tensor]] = [[] for _ in range(count)]
    sizes: list[list[Tensor]] = [[] for _ in range(count)]
    for first in range(0, len(e.tokens), CHUNK):
        tokens = e.tokens[first : first + CHUNK]
        variance = (_square(tokens)[:, None] + 2 * tokens @ places.T + _square(places)) / width + e.eps
        deviation = variance.sqrt()  # (chunk, block)
        worst = torch.zeros_like(deviation)
        passes = torch.ones_like(deviation, dtype=torch.bool)
        for span in found:
            inside = _projected(span.basis @ _factor(span, width), tokens, places, deviation, e)
            total = _length(tokens, places, deviation, e) if span.factor is None else None
            if total is None:
                total = _projected(_factor(span, width), tokens, places, deviation, e)
            left = 1 - inside / total
            limit = SCREEN + (span.worst + rounding) ** 2
            passes &= left <= limit
            worst = torch.maximum(worst, left)
        for column in range(count):
            ids = passes[:, column].nonzero()[:, 0]
            near[column].append(ids + first)
            sizes[column].append(worst[ids, column])
    chosen = []
    for ids, left in zip(map(torch.cat, near), map(torch.cat, sizes), strict=True):
        best = left.argsort()[:most]
        chosen.append(ids[best])
    return chosen


def _factor(span: Span, width: int) -> Tensor:
    return torch.eye(width, dtype=torch.float64) if span.factor is None else span.factor


def _projected(W: Tensor, tokens: Tensor, places: Tensor, deviation: Tensor, e: Embeddings) -> Tensor:
    """|W x|^2 for every token and position: (chunk, block)."""
    own = W.to(tokens)
    A, P, b = tokens @ (own * e.gamma).T, places @ (own * e.gamma).T, own @ e.beta
    squares = _square(A)[:, None] + 2 * A @ P.T + _square(P)
    return squares / deviation**2 + 2 * ((A @ b)[:, None] + P @ b) / deviation + b.square().sum()


def _length(tokens: Tensor, places: Tensor, deviation: Tensor, e: Embeddings) -> Tensor:
    """|x|^2 for every token and position: (chunk, block)."""
    A, P = tokens * e.gamma, places * e.gamma
    squares = _square(A)[:, None] + 2 * A @ P.T + _square(P)
    return squares / deviation**2 + 2 * ((A @ e.beta)[:, None] + P @ e.beta) / deviation + e.beta.square().sum()


def _square(x: Tensor) -> Tensor:
    return x.square().sum(-1)
