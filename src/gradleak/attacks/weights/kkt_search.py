"""Which settings of KKT? A random search that needs no label and no secret to say which extraction to believe.

Sees      what KKT sees
Recovers  what KKT recovers, under the settings whose trial explains the weights best
Solves    min over (step_size, coefficient_step, min_lambda, sharpness, start_scale) of the residual that KKT leaves
Differs   Haim et al. swept these by hand against the training data, which no attacker has. Here trials are ranked by their
          residual, and what several of the best trials found independently comes first: agreement is the mean, over the
          other trials, of a candidate's normalised cross-correlation with its nearest candidate there
          the search ends before its trials are used up when none of the last `patience` has lowered the best residual
          with a folder, every finished trial is kept, and an interrupted search goes on from there
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import msgspec
import torch
from torch import Tensor

from gradleak.attacks.reconstruction import Reconstruction, outcome_of
from gradleak.attacks.search.descend import OnStep
from gradleak.attacks.weights.kkt import KKT, reservations, trained
from gradleak.errors import BadInput, checked
from gradleak.modalities.networks import Architecture
from gradleak.observations import tensor_file
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.trained_weights import Weights

TRIAL = "gradleak/trial/1"
RANGES = {  # drawn log-uniformly
    "step_size": (0.01, 0.2),
    "coefficient_step": (0.01, 0.2),
    "min_lambda": (0.02, 0.5),
    "sharpness": (20.0, 500.0),
    "start_scale": (0.02, 0.5),
}
COMPARED = 4  # the best trials, between which agreement is measured


class Trial(msgspec.Struct, frozen=True):
    """The header of a finished trial."""

    key: str
    residual: float | None


@dataclass(frozen=True, kw_only=True)
class KKTSearch:
    """The search over settings.

    trials       at most
    patience     trials without a better residual after which it ends
    steps        of each trial
    candidates   per training image
    first_layer  explain only that layer
    folder       keeps finished trials; a search of the same weights goes on from them
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Weights,)
    modality: ClassVar[str] = Architecture.modality

    trials: int = 12
    patience: int = 6
    steps: int = 1_000
    candidates: int = 2
    first_layer: bool = False
    folder: Path | None = None

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """NotObserved for anything but the weights of a fully connected ReLU network."""
        seen = trained(self, observation)
        trials, since, best = list[Reconstruction](), 0, float("inf")
        seeds = torch.randint(2**31, (self.trials,), generator=generator).tolist()
        for number, seed in enumerate(seeds):
            trials.append(self.trial(observation, seed, observation.model.state_hash()))
            since, best = (0, trials[-1].residual) if trials[-1].residual < best else (since + 1, best)
            if on_step is not None:
                on_step(number + 1, self.trials, best)
            if since >= self.patience:
                break
        trials.sort(key=lambda trial: trial.residual)
        first, others = trials[0], trials[1:COMPARED]
        shared = agreement(first.value, [other.value for other in others])
        order = shared.argsort(descending=True)
        common = int((shared > 0.9).sum())
        evidence = (
            f" {len(trials)} trials; {common} candidates are in the other best trials too (correlation above 0.9)."
        )
        return replace(
            first,
            value=first.value[order],
            labels=None if first.labels is None else first.labels[order],
            status=f"{len(order)} candidates leave {first.residual:.2f} of the weights unexplained.{evidence}"
            + reservations(seen),
            iterations=len(trials) * self.steps,
            trace=[(k + 1, min(trial.residual for trial in trials[: k + 1])) for k in range(len(trials))],
        )

    def trial(self, observation: PictureObservation, seed: int, state: str) -> Reconstruction:
        """KKT under the settings that this seed draws, or what is kept of it."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {
            name: low * (high / low) ** float(torch.rand((), generator=generator, dtype=torch.float64))
            for name, (low, high) in RANGES.items()
        }
        attack = KKT(steps=self.steps, candidates=self.candidates, first_layer=self.first_layer, **drawn)
        kept = None if self.folder is None else self.folder / f"trial-{seed}.safetensors"
        key = json.dumps([state, asdict(attack)])
        if kept is not None and kept.is_file():
            return self.finished(kept, key, observation.model.architecture)
        reconstruction = attack(observation, generator=generator)
        if kept is not None:
            about = {"key": key, "residual": reconstruction.residual}
            assert reconstruction.labels is not None
            tensor_file.write({"images": reconstruction.value, "labels": reconstruction.labels}, TRIAL, about, kept)
        return reconstruction

    def finished(self, kept: Path, key: str, architecture: Architecture) -> Reconstruction:
        """The trial in this file; BadInput where it is another, or is damaged."""
        tensors, plain = tensor_file.read(kept, TRIAL, "images", "labels")
        about = checked(plain, Trial, f"{kept} is damaged")
        if about.key != key:
            raise BadInput(f"{kept} holds a trial on other weights or settings: choose another folder.")
        images, labels = tensors["images"], tensors["labels"]
        fits = images.shape[1:] == architecture.input_shape and labels.shape == images.shape[:1]
        if not (fits and len(labels) and set(labels.tolist()) <= set(range(architecture.classes))):
            raise BadInput(f"{kept} is damaged: it holds no pictures with their labels.")
        images, residual = tensor_file.floating({"images": images}, kept)["images"], about.residual
        residual = float("nan") if residual is None else residual
        return Reconstruction(images, labels, residual, "", outcome_of(residual), iterations=self.steps)


def agreement(images: Tensor, others: list[Tensor]) -> Tensor:
    """For every image the mean, over the other sets, of its correlation with the nearest image there: (m,) from -1 to 1."""
    if not others:
        return images.new_zeros(len(images))
    return torch.stack([correlation(images, other).max(1).values for other in others]).mean(0)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Normalised cross-correlation, without shifts, of every picture of a with every one of b: (n, ...), (m, ...) -> (n, m)."""
    flat = [x.flatten(1).double() for x in (a, b)]
    centred = [x - x.mean(1, keepdim=True) for x in flat]
    unit = [x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) for x in centred]
    products: Tensor = unit[0] @ unit[1].T
    return products
