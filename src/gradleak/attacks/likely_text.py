"""One text out of a gradient that noise, rounding, pruning or signs have blurred: likely, not proven. This is our own attack; it reads a
gradient as DAGER does (Petrov et al. 2024, arXiv:2405.15586), and weighs where DAGER decides.

Sees      Gradient or Update of a language model, one text: query, key and value of the first block; behind its attention the output
          projection and the perceptron's first layer, as far as they are there. Embeddings' gradients and labels are not used.
          Which defense stands between need not be known
Recovers  one text
Solves    min over texts of the sum over layers l and tokens t of log (f^T R_l^-p f / f^T f): x_lt, what enters the layer, is
          whitened into f by the covariance of random texts' inputs, R_l is G_l^T G_l of the layer's gradient, whitened too and of
          trace 1. G_l = Delta^T X + whatever the defense has added, so that R is large along members and as large as the defense
          anywhere else: 1 / (f^T R^-1 f) is Capon's spectrum (Proc. IEEE 57:1408, 1969), the most that f can have contributed
Differs   no end of a span and no tolerance are sought, so that none can be broken. All tokens are ranked at every position by the first
          layer; from the best ranked, each position in turn takes another token, or exchanges its token with another position, at
          random with the odds of a falling temperature, then the best
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gradleak.attacks.attack import check_sees
from gradleak.attacks.dager.vocabulary import CHUNK, Embeddings, lengths
from gradleak.attacks.nearest_label import nearest_label
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import NotObserved
from gradleak.modalities.language_models import LanguageArchitecture
from gradleak.observations.layers import layer_inputs
from gradleak.observations.model import LanguageModel
from gradleak.observations.observation import TextObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.transformer import layout_of

POWER = 1.5  # as in past_the_rank.py: 1 is the likelihood ratio of Gaussians, and ranks three true tokens in four as well or worse
FLOOR = 1e-4  # of the mean of a spectrum: what float32 leaves of the directions that no token fills
RANDOM = (
    96  # tokens of a random text: as long as the longest that is tried, so that their covariance knows every position
)
PER_DIMENSION = 6  # random rows per dimension, so that a covariance is known to sqrt(1 / 6) in its worst direction
TEXTS = 128  # at a time: memory alone depends on it
# Of the energy, a sum over tokens of the mean over layers. A wrong token costs about 1 more than a true one.
WARM, COLD = 0.1, 0.02
NEAR = 1.5  # of the cost in the first layer alone: what is dearer than the best by more is not tried


@dataclass(frozen=True)
class Spectrum:
    """What a layer's gradient tells of a direction: W (width, width) and white (width, width), with log |W x|^2 - log |white x|^2 the lower,
    the likelier x has entered the layer."""

    W: Tensor
    white: Tensor

    @classmethod
    def of(cls, measured: Tensor, random: Tensor) -> "Spectrum":
        """measured: the gradient (rows, width). random: what random texts make enter the layer (n, width)."""
        x, M = random.double(), measured.double()
        C = x.T @ x / len(x)
        ridge = (
            1e-6 * C.diagonal().mean() * torch.eye(len(C), dtype=C.dtype)
        )  # of float32's rounding: C itself may be singular
        white = torch.linalg.inv(torch.linalg.cholesky(C + ridge))
        w, U = torch.linalg.eigh((M @ white.T).T @ (M @ white.T))
        w = w.clamp_min(0) / w.sum() + FLOOR / len(w)
        return cls((w ** (-POWER / 2))[:, None] * (U.T @ white), white)

    def unlikely(self, x: Tensor) -> Tensor:
        """How unlikely rows (..., width) are: (...)."""
        inside, whole = ((x @ part.T.to(x)).square().sum(-1) for part in (self.W, self.white))
        return inside.log() - whole.clamp_min(1e-30).log()


@dataclass(frozen=True, kw_only=True)
class LikelyText:
    """Budgets only.

    choices  tokens weighed at each position
    sweeps   times that every position is reconsidered, the last two of them without chance
    longest  longest text that is tried
    lengths  of texts that are told apart by the whole gradient, before the search
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update)
    modality: ClassVar[str] = LanguageArchitecture.modality

    choices: int = 40
    sweeps: int = 5
    longest: int = 96
    lengths: int = 1

    def __call__(
        self, observation: TextObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved for several texts, for masked ones, without the first block's projections, and where the first layer
        sees no positions."""
        check_sees(self, observation)
        model, layout = observation.model, layout_of(observation.model)
        if observation.batch_size not in (None, 1):
            raise NotObserved("This is for one text: of several, spectra do not tell which tokens belong together.")
        if model.architecture.task == "masked-lm":
            raise NotObserved("What a masked language model was to predict is unknown: no text can be replayed.")
        if not layout.placed:
            raise NotObserved("The first layer sees no positions: every order of the same words is as likely there.")
        spectra = spectra_of(observation, generator)
        first = layout.queries(0)[0]
        if first not in spectra:
            raise NotObserved("Neither query, key nor value of the first block was released.")

        # Every token at every position, by the first layer
        costs = self.ranked(Embeddings.of(model), spectra[first])  # (vocabulary, positions)
        starts = [started(costs, length, ends_of(model)) for length in self.likely_lengths(costs, ends_of(model))]
        block = {name: t for name, t in observation.released.items() if name.startswith(f"{layout.block(0)}.")}
        inner = replace(observation, released=block)  # embeddings' gradients would be most of the work
        text = min(starts, key=lambda start: nearest_label(inner, start)[0]) if len(starts) > 1 else starts[0]

        # The text as a whole, by all layers
        for sweep, temperature in enumerate(cooling(self.sweeps)):
            before = text
            text, cost = swept(model, spectra, text, costs, self.choices, temperature, generator)
            if on_step is not None:
                on_step(sweep + 1, self.sweeps, cost)
            if not temperature and torch.equal(text, before):
                break
        residual, label = nearest_label(observation, text)
        status = (
            f"What stands between hides what single tokens would show. The likeliest text of {len(text)} tokens explains the release to "
            f"{residual:.2g} of its size: a guess, right in parts or as a whole."
        )
        value = tuple(text.tolist())
        bag = tuple(sorted(set(value)))
        return Reconstruction((value,), label, residual, status, Outcome.GUESSED, (False,), bag)

    def ranked(self, e: Embeddings, spectrum: Spectrum) -> Tensor:
        """What every token costs at each position, in the first layer alone: (vocabulary, positions)."""
        places, costs = e.places[: self.longest].double(), list[Tensor]()
        for part in torch.split(e.tokens, CHUNK):
            tokens = part.double()
            deviation = e.deviation(tokens, places)
            inside, whole = (lengths(W, tokens, places, deviation, e) for W in (spectrum.W, spectrum.white))
            costs.append((inside.clamp_min(1e-30).log() - whole.clamp_min(1e-30).log()).float())
        return torch.cat(costs)

    def likely_lengths(self, costs: Tensor, ends: tuple[int, ...]) -> list[int]:
        """Where the closing token is likeliest; or where the cost of the likeliest token changes its level."""
        if ends:
            return [int(place) + 3 for place in costs[ends[-1], 2:].argsort()[: self.lengths]]
        least = costs.amin(0)
        parts = [(least[:i], least[i:]) for i in range(1, len(least))]
        rest = [sum(float(part.var(correction=0)) * len(part) for part in both) for both in parts]
        return [
            int(change) + 1 for change in torch.tensor(rest).argsort()[: self.lengths]
        ]  # least that two levels leave


def spectra_of(observation: TextObservation, generator: torch.Generator) -> dict[str, Spectrum]:
    """{module: the spectrum of its inputs}, of the first layer and of those behind its attention that were released."""
    model, layout = observation.model, layout_of(observation.model)
    groups = {layout.queries(0)[0]: layout.queries(0), layout.output: (layout.output,)}
    groups |= {layout.hidden[0]: layout.hidden} if layout.mixed else {}
    measured = dict[str, Tensor]()
    for name, modules in groups.items():
        parts = [s.measured for s in observation.sketches(modules) if s.factor is None and bool(s.measured.any())]
        if parts:
            measured[name] = torch.cat(parts)
    length = min(RANDOM, layout.positions)
    count = -(-PER_DIMENSION * max((M.shape[1] for M in measured.values()), default=1) // length)
    texts = torch.randint(model.architecture.config.vocab_size, (count, length), generator=generator)
    if ends := ends_of(model):
        texts[:, 0], texts[:, -1] = ends[0], ends[-1]
    inputs = inputs_of(model, list(measured), texts) if measured else {}
    return {name: Spectrum.of(M, inputs[name].flatten(0, 1)) for name, M in measured.items()}


def inputs_of(model: LanguageModel, names: Sequence[str], texts: Tensor) -> dict[str, Tensor]:
    """What enters these layers: {name: (texts, length, width)}."""
    parts = [layer_inputs(model, names, part) for part in torch.split(texts, TEXTS)]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def energy(model: LanguageModel, spectra: dict[str, Spectrum], texts: Tensor) -> Tensor:
    """How unlikely texts (n, length) are: the sum over tokens of the mean over layers, (n,)."""
    rows = list[Tensor]()
    for part in torch.split(texts, TEXTS):
        inputs = layer_inputs(model, list(spectra), part)
        rows.append(torch.stack([spectrum.unlikely(inputs[name]) for name, spectrum in spectra.items()]).mean(0))
    return torch.cat(rows).sum(1)


def swept(
    model: LanguageModel,
    spectra: dict[str, Spectrum],
    text: Tensor,
    costs: Tensor,
    choices: int,
    temperature: float,
    generator: torch.Generator,
) -> tuple[Tensor, float]:
    """The text (length,) after each position, in random order, has taken one of its choices or another position's token, and its energy.
    What costs much more in the first layer than the best there is not tried."""
    ends, least = ends_of(model), costs.amin(0)
    first, last = (1, len(text) - 1) if ends else (0, len(text))
    cost = torch.inf
    for place in (first + torch.randperm(last - first, generator=generator)).tolist():
        best = costs[:, place].topk(min(choices, len(costs)), largest=False)
        near = best.indices[best.values <= least[place] + NEAR]
        trials = text.repeat(1 + len(near), 1)
        trials[1:, place] = near
        exchanged = [trials]
        for other in range(first, last):
            there, here = costs[text[place], other] - least[other], costs[text[other], place] - least[place]
            if other != place and max(float(there), float(here)) <= NEAR:
                exchanged.append(text[None].clone())
                exchanged[-1][0, [place, other]] = text[[other, place]]
        trials = torch.cat(exchanged)
        if len(trials) == 2 and torch.equal(trials[0], trials[1]):
            continue
        found = energy(model, spectra, trials).double()
        odds = torch.softmax((found.min() - found) / temperature, 0) if temperature else None
        chosen = int(found.argmin()) if odds is None else int(torch.multinomial(odds, 1, generator=generator))
        text, cost = trials[chosen], float(found[chosen])
    return text, cost


def cooling(sweeps: int) -> list[float]:
    """Temperatures of the sweeps: from warm to cold in equal ratios, then twice none."""
    chance = max(sweeps - 2, 0)
    return [WARM * (COLD / WARM) ** (k / max(chance - 1, 1)) for k in range(chance)] + [0.0] * min(sweeps, 2)


def started(costs: Tensor, length: int, ends: tuple[int, ...]) -> Tensor:
    """The likeliest token at each of so many positions, between the special tokens."""
    text = costs[:, :length].argmin(0)
    if ends:
        text[0], text[-1] = ends[0], ends[-1]
    return text


def ends_of(model: LanguageModel) -> tuple[int, ...]:
    """The special tokens at the beginning and the end of every text, where the tokenizer sets both."""
    ends: list[int] = model.architecture.tokenizer("")["input_ids"]
    return tuple(ends) if len(ends) == 2 else ()
