"""Which sentences are right: what goes into the layers behind the first attention depends on the whole sentence, or on all of
it up to there, and has to lie in the spans that were seen."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.attacks.dager.spans import Span, excess
from gradleak.observations.layers import layer_inputs
from gradleak.observations.model import LanguageModel
from gradleak.observations.tensors import Tensors

ROWS = 256  # sentences at a time


@dataclass(frozen=True)
class Found:
    """A sentence, and how its rows fit into what was seen.

    distance  the largest relative distance of a row
    excess    the largest ratio of a row's distance to what noise allows: at most 1 where every token passes in all layers
    proven    whether it passes, and nothing else could
    mean      of the distances
    """

    tokens: tuple[int, ...]
    distance: float
    excess: float
    proven: bool
    mean: float = 0.0

    @property
    def passes(self) -> bool:
        """Whether every token passes in all layers."""
        return self.excess <= 1


@dataclass(frozen=True)
class Judge:
    """Spans of the inputs of layers behind the first attention.

    exact     the parameters up to there in float64
    spans     {module: spans of its inputs}
    rounding  {module: relative precision of its inputs themselves}
    """

    model: LanguageModel
    exact: Tensors
    spans: dict[str, list[Span]]
    rounding: dict[str, float]

    @property
    def clearest(self) -> Span:
        """The span with the widest gap."""
        return max((span for found in self.spans.values() for span in found), key=lambda span: span.clearance)

    def rows(self, sentences: Tensor, *, quick: bool = False) -> tuple[Tensor, Tensor]:
        """(distance, ratio to what is allowed) of every token's row, the largest of all layers: (n, length) each.

        quick: in float32.
        """
        parameters, names = self.model.parameters if quick else self.exact, list(self.spans)
        distances, ratios = list[Tensor](), list[Tensor]()
        for part in torch.split(sentences, ROWS):
            seen = layer_inputs(self.model, names, part, parameters=parameters)
            told = [excess(self.spans[name], seen[name], self.rounding[name]) for name in names]
            distances.append(torch.stack([distance for distance, _ in told]).amax(0))
            ratios.append(torch.stack([ratio for _, ratio in told]).amax(0))
        return torch.cat(distances), torch.cat(ratios)

    def ends(self, prefixes: Tensor, limit: float, *, quick: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Which of (n, length) prefixes pass at their last token, with a ratio of at most `limit`: (m,); the distances and the
        ratios of these there: (m,) each.

        Layer by layer: what the first refuses needs no further computation. quick: in float32.
        """
        parameters = self.model.parameters if quick else self.exact
        kept = torch.arange(len(prefixes))
        distance, ratio = torch.zeros(2, len(prefixes), dtype=torch.float64)
        for name, found in self.spans.items():
            parts = torch.split(prefixes[kept], ROWS)
            x = [layer_inputs(self.model, [name], part, parameters=parameters)[name][:, -1] for part in parts]
            far, times = (told.double() for told in excess(found, torch.cat(x), self.rounding[name]))
            distance[kept] = torch.maximum(distance[kept], far)
            ratio[kept] = torch.maximum(ratio[kept], times)
            kept = kept[times <= limit]
            if not len(kept):
                break
        return kept, distance[kept], ratio[kept]

    def verdict(self, tokens: tuple[int, ...]) -> Found:
        """The sentence as it stands."""
        distance, ratio = self.rows(torch.tensor([tokens]))
        most = float(ratio.max())
        return Found(tokens, float(distance.max()), most, most <= 1, float(distance.mean()))

    def corrected(self, tokens: tuple[int, ...], choices: list[list[int]], budget: int) -> Found:
        """The sentence after replacing one token at a time, the worst row's first, as long as that brings the rows nearer.

        choices: token ids per position. budget: replacements that may be tried.
        """
        current = torch.tensor(tokens)
        distance = self.rows(current[None], quick=True)[0][0].square()
        untried = set(range(1, len(tokens)))
        while untried and budget > 0:
            place = max(untried, key=lambda p: float(distance[p]))
            untried.discard(place)
            other = [token for token in choices[place] if token != int(current[place])][:budget]
            if not other:
                continue
            budget -= len(other)
            trials = current.repeat(len(other), 1)
            trials[:, place] = torch.tensor(other)
            rows = self.rows(trials, quick=True)[0].square()
            best = int(rows.mean(1).argmin())
            if float(rows[best].mean()) < float(distance.mean()) * (1 - 1e-6):
                current, distance = trials[best], rows[best]
                untried = set(range(1, len(tokens))) - {place}
                if float(distance.max()) < 1e-6:  # as near as float32 can tell
                    break
        return self.verdict(tuple(current.tolist()))
