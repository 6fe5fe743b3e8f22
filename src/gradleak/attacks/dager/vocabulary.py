"""Which tokens may stand where: the whole vocabulary at every position against the span of the first layer's inputs.

The first layer's input is norm(u_a + v_p), token plus position; or, where it does not depend on the position, whatever the model
makes of the token. With W = V diag(gamma), its coordinates in the span, its length and its deviation are sums of a part of the
token, a part of the position, and one product of the two. Three products
of (vocabulary x width) with (width x rank + positions) replace one per position. What passes this screen in float32 is
computed again in float64. The vocabulary is streamed in chunks.

Tokens that recur at several positions make every token pass at every position. `likeliest` ranks such candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.attacks.dager.spans import Span, excess
from gradleak.errors import NotObserved
from gradleak.observations.layers import layer_inputs
from gradleak.observations.model import LanguageModel
from gradleak.observations.observation import TextObservation
from gradleak.observations.transformer import layout_of, normalisation

CHUNK, BLOCK = (
    4_096,
    32,
)  # tokens and positions at a time: memory alone depends on them (docs/findings/text.md, "Memory")
SCREEN = 1e-4  # rounding of float32 to a squared distance: 840 eps, for sums of up to 840 terms
TOKENS = 32  # random tokens a sentence; eight sentences make the 256 rows of docs/findings/text.md, "What is proven"


@dataclass(frozen=True)
class Embeddings:
    """Inputs of the first layer: x = scale (y / s) + shift with y = tokens[a] + places[p] and s^2 = mean(y^2) + eps.

    tokens  (vocabulary, inner) float32, at the first position; centred where the norm centres. Where positions are not seen,
            x itself
    places  (positions, inner): what a position adds to that
    scale   (inner,), times each coordinate; or (width, inner), where a linear layer follows the norm
    shift   (width,)
    eps     of the norm; None where there is none: s = 1
    """

    tokens: Tensor
    places: Tensor
    scale: Tensor
    shift: Tensor
    eps: float | None

    @classmethod
    def of(cls, model: LanguageModel) -> "Embeddings":
        """Read off what enters the module whose input is token plus position. NotObserved where the first layer reads something
        else than such a sum, normalised."""
        layout, config = layout_of(model), model.architecture.config
        name, query = layout.embedded, layout.queries(0)[0]
        chunks = torch.split(torch.arange(config.vocab_size)[:, None], CHUNK)
        tokens = torch.cat([layer_inputs(model, [name], ids)[name][:, 0] for ids in chunks])
        places = torch.zeros(1, tokens.shape[1])
        if layout.placed:
            row = torch.full((1, layout.positions), int(config.pad_token_id == 0))  # RoBERTa does not count padding
            inputs = layer_inputs(model, [name], row)[name][0]
            places = inputs - inputs[0]
        if name == query:
            return cls(tokens, places, torch.ones(tokens.shape[1]), torch.zeros(tokens.shape[1]), None)
        centred, scale, shift, eps = normalisation(model, tokens.shape[1])
        if centred:
            tokens, places = (part - part.mean(1, keepdim=True) for part in (tokens, places))
        embeddings = cls(tokens, places, scale, shift, eps)
        ids = torch.arange(2, 2 + min(8, layout.positions)) % config.vocab_size
        true = layer_inputs(model, [query], ids[None])[query][0].double()
        listed = embeddings.inputs(ids, torch.arange(len(ids)))
        if float((listed - true).norm() / true.norm()) > 1e-4:  # float32 leaves 1e-6
            raise NotObserved(
                "The first layer's inputs are not token plus position, normalised: they cannot be listed."
            )
        return embeddings

    def inputs(self, ids: Tensor, places: Tensor) -> Tensor:
        """The first layer's inputs of (n,) tokens at (n,) positions, in float64: (n, width)."""
        y = self.tokens[ids].double() + self.places[places].double()
        s = 1.0 if self.eps is None else (y.square().mean(1, keepdim=True) + self.eps).sqrt()
        return self.through(y) / s + self.shift.double()

    def through(self, part: Tensor, W: Tensor | None = None) -> Tensor:
        """What parts of the sums (n, inner) add to s W (x - shift), for W (k, width), or the identity: (n, k)."""
        scale = self.scale.to(part)
        if W is None:
            return part * scale if scale.ndim == 1 else part @ scale.T
        return part @ (W * scale if scale.ndim == 1 else W @ scale).T

    def deviation(self, tokens: Tensor, places: Tensor) -> Tensor:
        """s of every token (n, inner) at every place (m, inner): (n, m)."""
        if self.eps is None:
            return tokens.new_ones(len(tokens), len(places))
        return (_squares(tokens, places) / tokens.shape[1] + self.eps).sqrt()


def random_tokens(model: LanguageModel, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random tokens at the first positions, (n,) each: they have no reason to pass any check."""
    count = min(TOKENS, layout_of(model).positions)
    ids = torch.randint(model.architecture.config.vocab_size, (count,), generator=generator)
    return ids, torch.arange(count) if layout_of(model).placed else torch.zeros(count, dtype=torch.long)


def candidates(
    embeddings: Embeddings, spans: Sequence[Span], *, rounding: float, most: int, stand_ins: int = 10, hidden: int = 3
) -> list[Tensor]:
    """Token ids that may stand at each position, nearest first, at most `most` each; ends before positions with none.

    Noise may hide the only token of a position. Where none passes, the nearest `stand_ins` are candidates, unless none passes
    at `hidden` positions in a row: there the texts have ended. 5 to 20, and 2 to 6, change none of 18 small sentences.
    """
    allowed: list[Tensor] = []
    end, places = 0, embeddings.places
    for block in torch.split(torch.arange(len(places)), BLOCK):
        screened = _screen(embeddings, spans, block, rounding, most)
        for place, ids in zip(block.tolist(), screened, strict=True):
            distance, ratio = excess(spans, embeddings.inputs(ids, torch.full_like(ids, place)), rounding)
            near = distance.argsort()
            passing = near[ratio[near] <= 1]
            allowed.append(ids[passing] if len(passing) else ids[near[:stand_ins]])
            end = place + 1 if len(passing) else end
            if place + 1 - end == hidden:
                return allowed[:end]
    return allowed[:end]


def _screen(e: Embeddings, spans: Sequence[Span], block: Tensor, rounding: float, most: int) -> list[Tensor]:
    """Token ids per position of the block that are near every span, up to float32 and to what noise allows."""
    places, outside = e.places[block], list[Tensor]()
    for tokens in torch.split(e.tokens, CHUNK):
        deviation = e.deviation(tokens, places)  # (chunk, block)
        worst = torch.zeros_like(deviation)
        for span in spans:
            basis = span.basis if span.factor is None else span.basis @ span.factor
            inside, total = (lengths(W, tokens, places, deviation, e) for W in (basis, span.factor))
            distance = 1 - inside / total
            refused = distance > SCREEN + (span.worst + rounding) ** 2
            worst = torch.maximum(worst, distance).masked_fill(refused, torch.inf)
        outside.append(worst)
    near = list[Tensor]()
    for column in torch.cat(outside).T:
        ids = column.isfinite().nonzero()[:, 0]
        near.append(ids[column[ids].argsort()[:most]])
    return near


def lengths(W: Tensor | None, tokens: Tensor, places: Tensor, deviation: Tensor, e: Embeddings) -> Tensor:
    """|W x|^2 for every token and position, W the identity where it is None: (chunk, block)."""
    W = None if W is None else W.to(tokens)
    shift = e.shift.to(tokens)
    A, P, b = e.through(tokens, W), e.through(places, W), shift if W is None else W @ shift
    return _squares(A, P) / deviation**2 + 2 * ((A @ b)[:, None] + P @ b) / deviation + b.square().sum()


def _squares(A: Tensor, P: Tensor) -> Tensor:
    """|a + p|^2 for every row a of A and p of P."""
    return A.square().sum(1)[:, None] + 2 * A @ P.T + P.square().sum(1)


@dataclass(frozen=True)
class Pairs:
    """Candidates (token, position): ids (m,), places (m,), what enters the first layer (m, width) in float64."""

    ids: Tensor
    places: Tensor
    x: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def by_place(self) -> list[list[int]]:
        """Token ids per position, in the order of the candidates."""
        return [self.ids[self.places == place].tolist() for place in range(int(self.places.max()) + 1)]

    def only_sentence(self) -> tuple[int, ...] | None:
        """The only sentence there can be, when each position has one candidate."""
        order = self.places.argsort()
        alone = torch.equal(self.places[order], torch.arange(len(self)))
        return tuple(self.ids[order].tolist()) if alone else None


def likeliest(
    observation: TextObservation, embeddings: Embeddings, allowed: Sequence[Tensor], rank: int, most: int
) -> Pairs:
    """The candidates of all positions; if these are more than the rank of the first layer's inputs, `most` of them, ranked by
    their share of their position's deltas."""
    ids = torch.cat(list(allowed))
    places = torch.cat([torch.full_like(part, place) for place, part in enumerate(allowed)])
    pairs = Pairs(ids, places, embeddings.inputs(ids, places))
    layout = layout_of(observation.model)
    whole = [sketch.measured for sketch in observation.sketches(layout.queries(0)) if sketch.factor is None]
    if not layout.placed or not whole or len(pairs) <= rank:
        return pairs
    best = shares(embeddings, pairs, torch.cat(whole)).argsort(descending=True)[:most]
    return Pairs(ids[best], places[best], pairs.x[best])


def shares(embeddings: Embeddings, pairs: Pairs, measured: Tensor) -> Tensor:
    """How much of each position's sum of deltas is that of the token: (m,), near 1 where a token stands once in the batch.

    dL/dW = sum_i delta_i x_i^T with x_i = scale (u_a + v_p) / s_i + shift is solved for the sums of delta_i / s_i per token and
    per position. A position's sum is that of the tokens that stand there.

    measured: gradients of the first layer's query, key and value (rows, width), stacked.
    """
    tokens, which = torch.unique(pairs.ids, return_inverse=True)
    count = int(pairs.places.max()) + 1
    parts = (embeddings.tokens[tokens].double(), embeddings.places[:count].double())
    design = torch.cat([*map(embeddings.through, parts), embeddings.shift[None].double()])
    sums = torch.linalg.lstsq(design.T, measured.double().T, driver="gelsd").solution  # (tokens + positions + 1, rows)
    of_tokens, of_places = sums[: len(tokens)], sums[len(tokens) : -1]
    # The tokens' embeddings contain the first position's part: the sums of both are determined up to what is common to all.
    share = of_places @ torch.linalg.pinv(of_tokens, rtol=1e-6)  # (positions, tokens); 1e-6: the rounding of float32
    per_pair: Tensor = share[pairs.places, which]
    return per_pair
