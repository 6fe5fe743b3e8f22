"""One text out of the LoRA factors of a transformer although it has more tokens than the rank: likely, not proven. This is our
own attack; it reads an adapter as DAGER does (Petrov et al. 2024, arXiv:2405.15586).

Sees      Observation of a language model with an Adapter of one text as its release: the gradient of the factors B or their
          change; of the first block query, key and value (any of them). Labels are tried
Recovers  one text; the cosine of its gradient with the release suggests how much of it is right
Solves    argmax over texts of the mean cosine between the gradients of their factors B and the release
Differs   where n tokens fill the rank r, DAGER's check refuses nobody. But the directions are not filled evenly:
          B^T B = sum_ts (delta_t . delta_s) A x_t (A x_s)^T leaves some nearly empty, and every module has another A. So
          tokens are ranked by how little of A x points where B^T B is small, against random tokens; a coordinate descent over
          tokens, exchanges, insertions and deletions starts from the best ranked at each position
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.attacks.attack import Effort, check_sees
from gradleak.attacks.dager.spans import FORWARD, excess, spans_of
from gradleak.attacks.dager.vocabulary import CHUNK, Embeddings
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import NotObserved
from gradleak.modalities.language_models import LanguageArchitecture
from gradleak.observations.adapter import Adapter
from gradleak.observations.model import LanguageModel
from gradleak.observations.observation import TextObservation
from gradleak.observations.release import Release, Sketch
from gradleak.observations.transformer import layout_of
from gradleak.observations.work import ROOM, work_of

# 1 is the likelihood ratio of Gaussians. From 0.75 to 1.75, the median rank of true tokens among 420 changes by 3 at most (five
# texts of the package each through a small BERT, GPT-2 and Llama, rank 10), and 3 is worse.
POWER = 1.5
EXACT = 1e-6  # rounding: gradients of float32 are known to 1e-3 at worst, whose directions differ by its square
RANDOM = (
    4_000  # random tokens that stand for all others: their covariance at rank 16 is known to sqrt(16 / 4,000) = 6 %
)
TEXTS = 64  # at a time, at most, as far as there is room: memory alone depends on it
PROBE = 32  # tokens of a text by which one is timed, about


@dataclass(frozen=True)
class Searched:
    """A text (length,), the label that it was given, and 1 - the mean cosine of its gradients with the released ones."""

    tokens: Tensor
    label: int
    distance: float


@dataclass(frozen=True, kw_only=True)
class PastTheRank:
    """Budgets only.

    choices     tokens weighed at each position
    sweeps      times that every position is reconsidered, at most
    starts      lengths and labels from which the search begins
    insertions  tokens that are tried between two others
    longest     longest text that is tried, in multiples of the rank
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Adapter,)
    modality: ClassVar[str] = LanguageArchitecture.modality

    choices: int = 20
    sweeps: int = 6
    starts: int = 3
    insertions: int = 10
    longest: int = 3

    def effort(self, observation: TextObservation) -> Effort:
        """The texts that are tried, by their tokens."""
        _, first = seen(observation, torch.Generator().manual_seed(0))
        rank, longest = self.sizes(observation, first)
        classes = observation.model.architecture.classes
        texts = float(longest - rank + 1) * classes + longest * self.choices * (self.starts + self.sweeps - 1)
        texts += (self.sweeps - 1) * longest * (longest / 2 + 1 + self.insertions)
        single = longest / PROBE
        return Effort(0, single, texts * single / observation.release.steps())

    def sizes(self, observation: TextObservation, first: Sequence[Sketch]) -> tuple[int, int]:
        """The rank, and the longest text that is tried."""
        rank = min(sketch.measured.shape[1] for sketch in first)
        return rank, min(self.longest * rank, layout_of(observation.model).positions)

    def __call__(
        self, observation: TextObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved for what is no adapter of one text, or has fewer tokens than its rank."""
        model, (embeddings, first) = observation.model, seen(observation, generator)
        sketches = [sketch for sketch in observation.sketches() if sketch.side == "right"]
        rank, longest = self.sizes(observation, first)
        likely = ranked(embeddings, first, longest, self.choices, generator)  # (longest, choices)
        target = _Target(model, sketches)
        starts = _starts(target, likely, rank)[: self.starts]
        text = min((_sweep(target, likely, start, generator) for start in starts), key=lambda text: text.distance)
        for sweep in range(1, self.sweeps):
            before = text
            text = _sweep(target, likely, text, generator)
            text = _moved(target, likely, text, self.insertions)
            if on_step is not None:
                on_step(sweep + 1, self.sweeps, text.distance)
            if text is before:
                break
        return _result(text, rank)


def seen(observation: TextObservation, generator: torch.Generator) -> tuple[Embeddings, list[Sketch]]:
    """What the first layer may read, and what its factors B tell; NotObserved as `PastTheRank`."""
    check_sees(PastTheRank, observation)
    model, layout = observation.model, layout_of(observation.model)
    first = [sketch for sketch in observation.sketches(layout.queries(0)) if sketch.side == "right"]
    if not first:
        raise NotObserved("No LoRA factor of the first block's query, key or value was released.")
    if model.architecture.task == "masked-lm":
        raise NotObserved("What a masked language model was to predict is unknown: no text can be tried.")
    if observation.batch_size != 1:
        raise NotObserved("This is for one text: the tokens of several cannot be told apart by their ranking.")
    embeddings = Embeddings.of(model)
    spans = spans_of(observation, layout.queries(0))
    if bool((excess(spans, _random(embeddings, RANDOM, 1, generator), FORWARD)[1] > 1).double().mean() > 0.5):
        raise NotObserved("The text has fewer tokens than the rank: dager tells exactly which.")
    return embeddings, first


def _result(text: Searched, rank: int) -> Reconstruction:
    tokens, exact = tuple(text.tokens.tolist()), text.distance < EXACT
    evidence = (
        "explains the release to rounding"
        if exact
        else f"has a cosine of {1 - text.distance:.3f} with the release: likely in parts, not proven"
    )
    status = f"The tokens fill the rank ({rank}), so that no check refuses any. The text whose gradient is nearest {evidence}."
    outcome, bag = Outcome.SOLVED if exact else Outcome.GUESSED, tuple(sorted(set(tokens)))
    return Reconstruction((tokens,), None, max(text.distance, 0.0), status, outcome, (exact,), bag)


def ranked(
    embeddings: Embeddings, sketches: Sequence[Sketch], longest: int, keep: int, generator: torch.Generator
) -> Tensor:
    """The most likely tokens at each of the first positions, best first: (longest, keep)."""
    e, count = embeddings, len(embeddings.tokens)
    x = _random(e, RANDOM, longest, generator)
    maps, weights = [], []
    for A, measured in ((sketch.through.double(), sketch.measured.double()) for sketch in sketches):
        f = x @ A.T
        L = torch.linalg.cholesky(f.T @ f / len(f))
        whitened = torch.linalg.solve_triangular(L, measured.T, upper=False)
        w, U = torch.linalg.eigh(whitened @ whitened.T)
        maps.append(U.T @ torch.linalg.solve_triangular(L, A, upper=False))
        weights.append((w / w.sum()).clamp_min(1e-14) ** -POWER)
    rows = torch.cat(maps).float()  # (sum of ranks, width)
    tokens, places = (e.through(part, rows) for part in (e.tokens, e.places[:longest]))
    shift = rows @ e.shift
    chosen = []
    for place in range(longest):
        at = place if len(places) > 1 else 0
        scores = []
        for start in range(0, count, CHUNK):
            part = slice(start, start + CHUNK)
            deviation = e.deviation(e.tokens[part], e.places[at : at + 1])
            Ax = torch.split((tokens[part] + places[at]) / deviation + shift, [len(w) for w in weights], dim=1)
            scores.append(
                sum((F.normalize(f, dim=1).square() @ w.float()).log() for f, w in zip(Ax, weights, strict=True))
            )
        chosen.append(torch.cat(scores).argsort()[:keep])
    return torch.stack(chosen)


def _random(embeddings: Embeddings, count: int, longest: int, generator: torch.Generator) -> Tensor:
    """The first layer's inputs for random tokens at random positions before `longest`: (count, width), float64."""
    ids = torch.randint(len(embeddings.tokens), (count,), generator=generator)
    return embeddings.inputs(ids, torch.randint(min(longest, len(embeddings.places)), (count,), generator=generator))


class _Target:
    """The released gradients of the factors B, with which those of texts are compared."""

    def __init__(self, model: LanguageModel, sketches: Sequence[Sketch]):
        self.model = model
        self.of_a_token: float | None = None  # bytes
        self.released = [(sketch.module, sketch.through, sketch.measured) for sketch in sketches]

    def distances(self, texts: Tensor, label: int) -> Tensor:
        """1 - the mean cosine over modules, of each of the texts (count, length) alone: (count,)."""
        length = texts.shape[1]
        if self.of_a_token is None:
            self.of_a_token = work_of(partial(self._some, texts[:1], label)).bytes / length
        chunk = min(TEXTS, max(1, int(ROOM / (self.of_a_token * length))))
        return torch.cat([self._some(part, label) for part in torch.split(texts, chunk)])

    def _some(self, texts: Tensor, label: int) -> Tensor:
        model, layers = self.model, dict[str, tuple[Tensor, Tensor]]()  # inputs and outputs

        def keep(name: str) -> Any:
            return lambda module, args, out: layers.__setitem__(name, (args[0], out))

        handles = [model.module.get_submodule(n).register_forward_hook(keep(n)) for n, _, _ in self.released]
        weights = [f"{name}.weight" for name, _, _ in self.released]  # so that autograd follows their outputs
        parameters = {
            **{name: model.parameters[name].detach().requires_grad_() for name in weights},
        }
        try:
            logits = model.logits(parameters, texts.tolist())
        finally:
            for handle in handles:
                handle.remove()
        if model.architecture.task == "classification":
            loss = F.cross_entropy(logits, torch.full((len(texts),), label), reduction="sum")
        else:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), texts[:, 1:].flatten(), reduction="sum")
        deltas = torch.autograd.grad(loss, [layers[name][1] for name, _, _ in self.released])
        cosines = []
        for (name, A, measured), delta in zip(self.released, deltas, strict=True):
            B = torch.einsum("kto,ktr->kor", delta, layers[name][0].detach() @ A.T)
            cosines.append(torch.cosine_similarity(B.flatten(1).double(), measured.flatten()[None].double(), dim=1))
        return 1 - torch.stack(cosines).mean(0)


def _starts(target: _Target, likely: Tensor, rank: int) -> list[Searched]:
    """The best ranked tokens at every length and with every label, those with the nearest gradients first."""
    model, ends = target.model, _ends(target.model)
    labels = range(model.architecture.config.num_labels) if model.architecture.task == "classification" else (0,)
    tried = []
    for length in range(min(rank, len(likely)), len(likely) + 1):
        text = likely[:length, 0].clone()
        if ends:
            text[0], text[-1] = ends
        tried += [Searched(text, label, float(target.distances(text[None], label)[0])) for label in labels]
    return sorted(tried, key=lambda text: text.distance)


def _sweep(target: _Target, likely: Tensor, text: Searched, generator: torch.Generator) -> Searched:
    """Every position once, in random order, each with the token that brings the gradient nearest."""
    first, last = (1, len(text.tokens) - 1) if _ends(target.model) else (0, len(text.tokens))
    for place in (first + torch.randperm(last - first, generator=generator)).tolist():
        trials = text.tokens.repeat(likely.shape[1], 1)
        trials[:, place] = likely[place]
        text = _nearest(target, text, trials)
    return text


def _moved(target: _Target, likely: Tensor, text: Searched, insertions: int) -> Searched:
    """The nearest of the texts with two tokens exchanged, one left out, or a likely one put in; or the text itself."""
    tokens = text.tokens.tolist()
    first, last = (1, len(tokens) - 1) if _ends(target.model) else (0, len(tokens))
    exchanged, longer = [], []
    for i in range(first, last):
        exchanged += [
            [*tokens[:i], tokens[j], *tokens[i + 1 : j], tokens[i], *tokens[j + 1 :]] for j in range(i + 1, last)
        ]
    if len(tokens) < len(likely):
        longer = [
            [*tokens[:i], new, *tokens[i:]] for i in range(first, last + 1) for new in likely[i, :insertions].tolist()
        ]
    shorter = [[*tokens[:i], *tokens[i + 1 :]] for i in range(first, last)]
    for trials in (exchanged, shorter, longer):
        if trials and trials[0]:
            text = _nearest(target, text, torch.tensor(trials))
    return text


def _nearest(target: _Target, text: Searched, trials: Tensor) -> Searched:
    """The nearest of the trials (count, length), or the text itself."""
    distances = target.distances(trials, text.label)
    best = int(distances.argmin())
    nearer = float(distances[best]) < text.distance
    return Searched(trials[best], text.label, float(distances[best])) if nearer else text


def _ends(model: LanguageModel) -> list[int]:
    """The special tokens at the beginning and the end of every text, if the tokenizer sets them."""
    ends: list[int] = model.architecture.tokenizer("")["input_ids"]
    return ends if len(ends) == 2 else []
