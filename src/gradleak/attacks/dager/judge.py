"""Whether a sentence is right. The inputs of the layers behind the first attention depend on the whole sentence, in a decoder on
all of it up to there. They have to lie in the spans which the gradients of these layers show."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradleak.attacks.dager.spans import Span, excess, spans_of, telling
from gradleak.attacks.dager.vocabulary import random_tokens
from gradleak.attacks.reconstruction import Outcome
from gradleak.observations.layers import layer_inputs
from gradleak.observations.model import LanguageModel
from gradleak.observations.observation import TextObservation
from gradleak.observations.tensors import Tensors
from gradleak.observations.transformer import layout_of

ROWS = 256  # sentences at a time: memory alone depends on it
# A proof needs a margin of 10 between 256 random rows and what passes: docs/findings/text.md, "What is proven". Two of the rows
# may come nearer, because the first token of a decoder's random sentence may be a true one: "Decoders" there.
MARGIN, SENTENCES, LUCKY = 10.0, 8, 2


@dataclass(frozen=True)
class Sentence:
    """Token ids, and how their rows fit into the spans behind the first attention.

    distance  the largest relative distance of a row
    excess    the largest ratio of a row's distance to what noise allows
    outcome   SOLVED: every row passes, and nothing else could. CLOSE: every row passes. GUESSED: it fits best as a whole,
              where noise hides single tokens. STUCK: a row is outside what noise allows
    mean      of the distances
    """

    tokens: tuple[int, ...]
    distance: float
    excess: float
    outcome: Outcome
    mean: float = 0.0

    @property
    def passes(self) -> bool:
        """Whether every token passes in all layers."""
        return self.outcome in (Outcome.SOLVED, Outcome.CLOSE)


@dataclass(frozen=True)
class Judge:
    """Spans of the inputs of layers behind the first attention.

    exact       the parameters up to there in float64
    spans       {module: spans of its inputs}
    rounding    {module: relative precision of its inputs themselves}
    convincing  whether random sentences fail so clearly that passing is a proof
    """

    model: LanguageModel
    exact: Tensors
    spans: dict[str, list[Span]]
    rounding: dict[str, float]
    convincing: bool = False

    @classmethod
    def of(
        cls, observation: TextObservation, rank: int, rounding: dict[str, float], generator: torch.Generator
    ) -> "Judge":
        """Of the layers whose spans can tell sentences apart, tested on random ones.

        rank: of the first layer's inputs. A span of lower rank lacks members.
        """
        model, exact, spans = observation.model, _exact(observation.model), dict[str, list[Span]]()
        random = torch.stack([random_tokens(model, generator)[0] for _ in range(SENTENCES)])
        inputs = layer_inputs(model, list(rounding), random, parameters=exact)
        for name, modules in layers_behind(model).items():
            whole = [span for span in spans_of(observation, modules) if span.rank >= min(rank, span.basis.shape[1])]
            if kept := telling(whole, inputs[name].flatten(0, 1), rounding[name]):
                spans[name] = kept
        judge = cls(model, exact, spans, rounding)
        if not spans:
            return judge
        ratios = judge.rows(random)[1].flatten().sort().values
        return replace(judge, convincing=float(ratios[LUCKY]) > MARGIN)

    @property
    def clearest(self) -> Span:
        """The span with the widest gap."""
        return max((span for spans in self.spans.values() for span in spans), key=lambda span: span.clearance)

    def rows(self, sentences: Tensor, *, quick: bool = False) -> tuple[Tensor, Tensor]:
        """(distance, ratio to what is allowed) of every token's row, the largest of all layers: (n, length) each.

        quick: in float32.
        """
        parameters, names = self.model.parameters if quick else self.exact, list(self.spans)
        distances, ratios = list[Tensor](), list[Tensor]()
        for part in torch.split(sentences, ROWS):
            inputs = layer_inputs(self.model, names, part, parameters=parameters)
            layers = [excess(self.spans[name], inputs[name], self.rounding[name]) for name in names]
            distances.append(torch.stack([distance for distance, _ in layers]).amax(0))
            ratios.append(torch.stack([ratio for _, ratio in layers]).amax(0))
        return torch.cat(distances), torch.cat(ratios)

    def ends(self, prefixes: Tensor, limit: float, *, quick: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Which of (n, length) prefixes pass at their last token, with a ratio of at most `limit`: (m,); the distances and the
        ratios of these there: (m,) each.

        Layer by layer: what the first refuses needs no further computation. quick: in float32.
        """
        parameters = self.model.parameters if quick else self.exact
        kept = torch.arange(len(prefixes))
        distance, ratio = torch.zeros(2, len(prefixes), dtype=torch.float64)
        for name, spans in self.spans.items():
            parts = torch.split(prefixes[kept], ROWS)
            x = [layer_inputs(self.model, [name], part, parameters=parameters)[name][:, -1] for part in parts]
            distances, ratios = (numbers.double() for numbers in excess(spans, torch.cat(x), self.rounding[name]))
            distance[kept] = torch.maximum(distance[kept], distances)
            ratio[kept] = torch.maximum(ratio[kept], ratios)
            kept = kept[ratios <= limit]
            if not len(kept):
                break
        return kept, distance[kept], ratio[kept]

    def passing(self, certain: bool = True) -> Outcome:
        """The outcome of a sentence that passes."""
        return Outcome.SOLVED if certain and self.convincing else Outcome.CLOSE

    def verdict(self, tokens: tuple[int, ...]) -> Sentence:
        """The sentence as it stands."""
        distance, ratio = self.rows(torch.tensor([tokens]))
        most = float(ratio.max())
        outcome = self.passing() if most <= 1 else Outcome.STUCK
        return Sentence(tokens, float(distance.max()), most, outcome, float(distance.mean()))

    def corrected(self, tokens: tuple[int, ...], choices: Sequence[Sequence[int]], budget: int) -> Sentence:
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
            if float(rows[best].mean()) < float(distance.mean()) * (1 - 1e-6):  # by more than float32 rounds
                current, distance = trials[best], rows[best]
                untried = set(range(1, len(tokens))) - {place}
                if float(distance.max()) < 1e-6:  # squares: every row agrees to three digits
                    break
        return self.verdict(tuple(current.tolist()))


def layers_behind(model: LanguageModel) -> dict[str, tuple[str, ...]]:
    """Layers behind the first attention whose inputs depend on the sentence: {module: those that read the same input}."""
    layout = layout_of(model)
    layers = [(layout.output,), layout.hidden if layout.mixed else (), layout.queries(1)]
    return {modules[0]: modules for modules in layers if modules}


def _exact(model: LanguageModel) -> Tensors:
    """The parameters up to the second block in float64."""
    layout = layout_of(model)
    near = tuple(f"{layout.block(number)}." for number in (0, 1))
    return {
        name: parameter.double()
        for name, parameter in model.parameters.items()
        if name.startswith(near) or not any(part.isdigit() for part in name.split("."))
    }
