"""DSiRe: how many samples trained this adapter? (Salama et al. 2024, Dataset Size Recovery from LoRA Weights, arXiv:2406.19395)

Sees      an Adapter, and a zoo: adapters that the attacker trained on the same base model with known numbers of samples
Recovers  N, the number of private samples, with an interval
Solves    sigma_l = singular values of layer l's change, s (B A - B0 A0). Each layer answers the N of its nearest
          neighbour in the zoo; the most frequent answer wins: `Estimate.votes`
Differs   sigma_l enters by its logarithm, cut at 1e-6 of its largest value: N shows in how fast it falls off.
          `Estimate.size` is not the vote but a regression of log N on all layers at once: nearest neighbours among
          discriminant coordinates (whitened by the Ledoit-Wolf covariance within one N). Its interval is CV+ (Barber et
          al. 2021, Predictive inference with the jackknife+), and what is unlike the zoo is told apart by a
          cross-conformal p-value (Vovk 2015, Cross-conformal predictors).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.func import vmap

from gradleak.attacks.attack import Effort, check_sees, refusal
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import BadInput, NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.adapter import Adapter
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import Recipe
from gradleak.observations.work import side_by_side

FLOOR = 1e-6  # singular values below this part of the largest are the rounding of float32
NEIGHBOURS = 8  # of the regression
FEWEST = 5  # adapters per size: a covariance within sizes, and held-out folds, need several
RARE = 0.02  # p-value below which an adapter is unlike the zoo
SLACK = 1e-9  # in log N: an interval around an exact answer has no width, and must not miss it by rounding

Layout = dict[str, tuple[tuple[int, ...], tuple[int, ...]]]  # {module: shapes of A and B}


@dataclass(frozen=True)
class Estimate:
    """How many samples trained an adapter.

    size       the regression's answer, rounded
    low, high  the interval that holds the true N in `level` of all cases, if the adapter was trained like the zoo: an
               average over the zoo's sizes, not a promise for each of them (large ones are missed more often)
    votes      {N: number of layers whose nearest neighbour has it}
    likeness   p-value of "trained like the zoo", from the spectrum alone
    in_range   False when likeness is below 2 %, or when the stated recipe or precision is not the zoo's: the numbers
               then mean nothing. An N beyond the zoo's sizes need not show, and is answered with the nearest of them
    """

    size: int
    low: float
    high: float
    level: float
    votes: dict[int, int]
    likeness: float
    in_range: bool
    sentence: str

    @property
    def voted(self) -> int:
        """The answer of the paper: what most layers say, the smaller where two tie."""
        return min(self.votes, key=lambda size: (-self.votes[size], size))


@dataclass(frozen=True, kw_only=True)
class DatasetSize:
    """A fitted zoo. Call it with an adapter.

    level      how often the interval holds the true N
    norm       whether the length of the change is evidence, or only the shape of each layer's spectrum. The length
               depends on the learning rate; in one SGD step the shape does not
    layout, recipe, precision   what all adapters of the zoo share
    sizes      (n,) the zoo's N
    spectra    {module: (n, number of singular values)} as `log_spectra` gives them
    whole      the regression on the whole zoo
    parts      the regressions on the zoo without each fold
    fold       (n,) the part that has not seen adapter i
    residual   (n,) |log N_i - what that part answers|
    distance   (n,) how far from all sizes that part finds it
    """

    level: float
    norm: bool
    layout: Layout
    recipe: Recipe | None
    precision: str
    sizes: Tensor = field(repr=False)
    spectra: Tensors = field(repr=False)
    whole: "Regression" = field(repr=False)
    parts: list["Regression"] = field(repr=False)
    fold: Tensor = field(repr=False)
    residual: Tensor = field(repr=False)
    distance: Tensor = field(repr=False)

    @classmethod
    def fit(
        cls,
        adapters: Sequence[PictureObservation],
        sizes: Tensor,
        *,
        level: float = 0.9,
        norm: bool = True,
        folds: int = 10,
    ) -> Self:
        """Learn from adapters trained on `sizes` (n,) samples each, under one recipe, rank and base model.

        Raises BadInput for an empty zoo, fewer than two sizes, fewer than five adapters of a size, an N below one, or
        adapters that differ in modules, ranks, recipe or precision.
        """
        if not adapters or len(adapters) != len(sizes):
            raise BadInput(f"The zoo has {len(adapters)} adapters and {len(sizes)} sizes: give one size per adapter.")
        if not 0 < level < 1 or folds < 2:
            raise BadInput("An interval needs a level between 0 and 1, and two folds or more.")
        counts = Counter(int(n) for n in sizes)
        if len(counts) < 2 or min(counts) < 1 or min(counts.values()) < FEWEST:
            given = ", ".join(f"{count} of size {n}" for n, count in sorted(counts.items()))
            raise BadInput(f"A zoo needs two sizes or more, from 1 up, and {FEWEST} adapters of each; here: {given}.")
        first = adapters[0]
        layout = layout_of(first)
        for adapter in adapters:
            check_layout(adapter, layout)
            if (adapter.adapter.recipe, adapter.precision) != (first.adapter.recipe, first.precision):
                raise BadInput("The adapters of a zoo share one recipe and one precision: fit one zoo for each.")
        each = [log_spectra(adapter, norm=norm) for adapter in adapters]
        spectra = {module: torch.stack([one[module] for one in each]) for module in each[0]}
        X, y = torch.cat(list(spectra.values()), dim=1), sizes.double().log()
        fold = torch.zeros(len(y), dtype=torch.long)
        for n in counts:  # every fold holds some of every size
            fold[sizes == n] = torch.arange(counts[n]) % min(folds, min(counts.values()))
        parts, residual, distance = [], torch.empty_like(y), torch.empty_like(y)
        for k in range(int(fold.max()) + 1):
            parts.append(part := Regression.fit(X[fold != k], y[fold != k]))
            residual[fold == k] = (y[fold == k] - part.predict(X[fold == k])).abs()
            distance[fold == k] = part.distance(X[fold == k])
        return cls(
            level=level,
            norm=norm,
            layout=layout,
            recipe=first.adapter.recipe,
            precision=first.precision,
            sizes=sizes,
            spectra=spectra,
            whole=Regression.fit(X, y),
            parts=parts,
            fold=fold,
            residual=residual,
            distance=distance,
        )

    def __call__(self, adapter: PictureObservation) -> Estimate:
        """Raises BadInput when the adapter has other modules or ranks than the zoo."""
        check_layout(adapter, self.layout)
        spectrum = log_spectra(adapter, norm=self.norm)
        x = torch.cat(list(spectrum.values()))[None]
        votes = Counter(
            int(self.sizes[(zoo - spectrum[module]).norm(dim=1).argmin()]) for module, zoo in self.spectra.items()
        )
        size = round(math.exp(float(self.whole.predict(x))))
        low, high = (math.exp(bound) for bound in self.interval(x))
        likeness = self.likeness(x)
        doubts = {
            "its recipe is not the zoo's": adapter.adapter.recipe not in (None, self.recipe),
            "its precision is not the zoo's": adapter.precision != self.precision,
            f"its spectrum is unlike the zoo's (p = {likeness:.3f})": likeness < RARE,
        }
        sentence = (
            f"Trained on {size} sample{'s' * (size > 1)}, {self.level:.0%} interval {low:.1f} to {high:.1f}; "
            f"{votes[size]} of {len(self.spectra)} layers vote for {size}."
        )
        if any(doubts.values()):
            reasons = " and ".join(reason for reason, holds in doubts.items() if holds)
            sentence = f"Out of range, not to be relied on, as {reasons}. {sentence}"
        return Estimate(size, low, high, self.level, dict(votes), likeness, not any(doubts.values()), sentence)

    def interval(self, x: Tensor) -> tuple[float, float]:
        """CV+ for log N: quantiles over the zoo of mu_-k(i)(x) -+ residual_i; x (1, features)."""
        centre = torch.cat([part.predict(x) for part in self.parts])[self.fold]  # (n,)
        rank = min(math.ceil(self.level * (len(centre) + 1)), len(centre))
        low = -(self.residual - centre).sort().values[rank - 1]
        high = (self.residual + centre).sort().values[rank - 1]
        return float(low) - SLACK, float(high) + SLACK

    def likeness(self, x: Tensor) -> float:
        """Cross-conformal p-value: how many of the zoo, when held out, are as far from every size as x (1, features)."""
        distance = torch.cat([part.distance(x) for part in self.parts])[self.fold]
        return (1 + int((self.distance >= distance).sum())) / (1 + len(distance))


@dataclass(frozen=True)
class Regression:
    """log N by nearest neighbours among discriminant coordinates.

    centre, scale  (features,) of the zoo
    whiten         (features, features) to unit covariance within each size
    means          (sizes, features) of each size, whitened
    directions     (features, sizes - 1) that the means span
    coordinates    (n, sizes - 1) of the zoo
    y              (n,) log N
    """

    centre: Tensor
    scale: Tensor
    whiten: Tensor
    means: Tensor
    directions: Tensor
    coordinates: Tensor
    y: Tensor

    @classmethod
    def fit(cls, X: Tensor, y: Tensor) -> Self:
        """X (n, features), y (n,) log N: a linear discriminant analysis with N as the class."""
        from sklearn.covariance import ledoit_wolf

        centre, scale = X.mean(0), X.std(0).clamp_min(1e-9)
        Z = (X - centre) / scale
        values, which = torch.unique(y, return_inverse=True)
        means = torch.stack([Z[which == k].mean(0) for k in range(len(values))])
        covariance, _ = ledoit_wolf((Z - means[which]).numpy(), assume_centered=True)
        variances, axes = torch.linalg.eigh(torch.as_tensor(covariance))
        whiten = axes * variances.clamp_min(1e-12).rsqrt()
        means = means @ whiten
        weight = which.bincount()[:, None].sqrt()
        spread = weight * (means - Z.mean(0) @ whiten)
        directions = torch.linalg.svd(spread, full_matrices=False).Vh[: len(values) - 1].T
        return cls(centre, scale, whiten, means, directions, Z @ whiten @ directions, y)

    def predict(self, X: Tensor) -> Tensor:
        """(m, features) -> (m,) log N: the mean of the neighbours, weighted by 1 / distance."""
        distances = torch.cdist(self._whitened(X) @ self.directions, self.coordinates)
        near, index = distances.topk(min(NEIGHBOURS, len(self.y)), largest=False)
        weights = 1 / near.clamp_min(1e-9)
        answer: Tensor = (weights * self.y[index]).sum(1) / weights.sum(1)
        return answer

    def distance(self, X: Tensor) -> Tensor:
        """(m, features) -> (m,) Mahalanobis distance to the nearest size's mean."""
        return torch.cdist(self._whitened(X), self.means).amin(1)

    def _whitened(self, X: Tensor) -> Tensor:
        return (X - self.centre) / self.scale @ self.whiten


def log_spectra(adapter: PictureObservation, *, norm: bool = True) -> Tensors:
    """{module: log singular values}, in falling order, cut at 1e-6 of the first; double precision.

    Without `norm`, each layer's are divided by its largest, which is left out, and so is a layer that has only one.
    """
    spectra = {}
    for module in sorted(adapter.adapter.scaling):
        sigma = singular_values(adapter, module)
        logs = sigma.clamp_min(float(sigma[0]) * FLOOR).clamp_min(torch.finfo(sigma.dtype).tiny).log()
        if norm or len(logs) > 1:
            spectra[module] = logs if norm else logs[1:] - logs[0]
    if not spectra:
        raise BadInput("Every layer has one singular value, which is all norm: leave the norm in (norm=True).")
    return spectra


def singular_values(adapter: PictureObservation, module: str) -> Tensor:
    """Those of the change of a weight, s (B A - B0 A0), from the factors: nothing of the weight's size is formed.

    B A - B0 A0 = [B, -B0] [A; A0] = Qb (Rb Ra^T) Qa^T, so that they are those of Rb Ra^T, at most 2r x 2r.
    """
    A0, B0 = (adapter.adapter.start[f"{module}.{factor}"].double().flatten(1) for factor in ("lora_A", "lora_B"))
    A, B = (
        start + adapter.released[f"{module}.{factor}"].double().flatten(1)
        if f"{module}.{factor}" in adapter.released
        else start
        for factor, start in (("lora_A", A0), ("lora_B", B0))
    )
    if bool(A0.any()) and bool(B0.any()):
        A, B = torch.cat([A, A0]), torch.cat([B, -B0], dim=1)
    Ra, Rb = (torch.linalg.qr(tall, mode="r").R for tall in (A.T, B))
    sigma: Tensor = torch.linalg.svdvals(adapter.adapter.scaling[module] * Rb @ Ra.T)
    return sigma


def layout_of(adapter: PictureObservation) -> Layout:
    """The shapes of every module's factors."""
    return {
        module: (
            tuple(adapter.adapter.start[f"{module}.lora_A"].shape),
            tuple(adapter.adapter.start[f"{module}.lora_B"].shape),
        )
        for module in sorted(adapter.adapter.scaling)
    }


def check_layout(adapter: PictureObservation, layout: Layout) -> None:
    """BadInput naming the first module in which an adapter differs from the zoo."""
    own = layout_of(adapter)
    for module in sorted(own.keys() | layout.keys()):
        if module not in own or module not in layout:
            raise BadInput(f"Only one of the adapter and the zoo adapts {module}: make a zoo with the same modules.")
        if own[module] != layout[module]:
            ranks = f"rank {own[module][0][0]} and the zoo's {layout[module][0][0]}"
            raise BadInput(f"The adapter of {module} has {ranks}, or other sizes: make a zoo like the adapter.")


@dataclass(frozen=True, kw_only=True)
class SampleCount:
    """The number of samples behind an adapter, against a zoo made of public pictures with its own start and recipe.

    largest  number of samples in the zoo; more are answered with it
    copies   adapters of each number
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Adapter,)
    modality: ClassVar[str] = Architecture.modality

    largest: int = 6
    copies: int = 12
    zoo: DatasetSize | None = field(default=None, repr=False)

    def effort(self, observation: PictureObservation) -> Effort:
        """An adapter trained on every number of samples, so many times each."""
        samples = self.copies * self.largest * (self.largest + 1) / 2
        batch = observation.batch_size or 1
        return Effort(0, self.largest / batch, samples / batch)

    def prepared(self, observation: PictureObservation, public: Pictures, *, generator: torch.Generator) -> Self:
        """With its zoo. Without a recipe the length of the change says nothing, and only the shapes of the spectra count."""
        if refusal(self, observation):
            return self
        classes = observation.model.architecture.classes
        adapters, sizes = list[PictureObservation](), list[int]()
        for n in range(1, self.largest + 1):
            rows = torch.randint(len(public.labels), (self.copies, n), generator=generator)
            images, labels = public.images[rows], public.labels[rows] % classes  # (copies, n, ...)
            chunk = side_by_side(partial(observation.simulate, images[0], labels[0]), self.copies)
            changes = vmap(observation.simulate, chunk_size=chunk)(images, labels)
            for i in range(self.copies):
                released = {name: tensor[i].detach() for name, tensor in changes.items()}
                adapters.append(replace(observation, released=released, batch_size=n, labels=None))
                sizes.append(n)
        norm = observation.adapter.recipe is not None
        return replace(self, zoo=DatasetSize.fit(adapters, torch.tensor(sizes), norm=norm))

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """The estimate as `value`. Raises NotObserved without public pictures."""
        check_sees(self, observation)
        if self.zoo is None:
            raise NotObserved(
                "It compares the adapter with others that are trained on public pictures, and there are none."
            )
        estimate, count = self.zoo(observation), len(self.zoo.sizes)
        against = f"against {count} adapters of 1 to {self.largest} public samples; more would be answered with {self.largest}"
        return Reconstruction(estimate.size, None, float("nan"), f"{estimate.sentence} ({against}.)", Outcome.GUESSED)
