"""A step of differentially private training (DP-SGD; Abadi et al., CCS 2016, arXiv:1607.00133, algorithm 1): the gradient of each sample
is cut to a norm C, noise of deviation sigma C is added to their sum, and that is divided by the number of samples that is expected.

Cutting is no defense that a mean could be given to afterwards: how much is cut differs from sample to sample. It is part of what a
gradient of this kind is, so it is simulated. The noise is a defense like any other.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import grad

from gradleak.errors import BadInput
from gradleak.modalities.modality import Fact, fact
from gradleak.observations.defenses import LARGEST_NOISE, Defense, GaussianNoise
from gradleak.observations.mechanism import Mechanism
from gradleak.observations.model import Model
from gradleak.observations.release import Release
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import cut


@dataclass(frozen=True, kw_only=True)
class PrivateStep:
    """What is public of it.

    clip              C: norm over all tensors, above zero
    noise_multiplier  sigma, 0 or more
    divisor           what the sum is divided by: the expected number of samples; 1 for a sum
    epsilon           what an accountant says was spent up to this step, included, at this delta; None where it is not counted
    sample_rate       with which probability a sample is drawn in each step; None where nobody says
    steps             how many were taken with this noise and rate up to this one, included; None where nobody says
    """

    clip: float
    noise_multiplier: float
    divisor: float
    epsilon: float | None = None
    delta: float | None = None
    sample_rate: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        numbers = (self.clip, self.noise_multiplier, self.divisor)
        if not all(map(math.isfinite, numbers)) or self.clip <= 0 or self.noise_multiplier < 0 or self.divisor <= 0:
            raise BadInput(
                "A private step has a norm and a number of samples above zero, and a noise multiplier that is not below it, not "
                f"{self.clip:g}, {self.divisor:g} and {self.noise_multiplier:g}."
            )

    def mechanism(self) -> Mechanism | str:
        """What an accountant counts up to this step, which the samples of its batch are in for sure; or why that cannot be."""
        if not self.noise_multiplier:
            return "Each sample's gradient was cut, and no noise was added: there is no epsilon, and no bound for any attack."
        if self.sample_rate is None or self.steps is None:
            return "Noise was added, and nobody says how many steps were taken before, or at which sample rate: there is no epsilon."
        return Mechanism(
            noise_multiplier=self.noise_multiplier,
            sample_rate=self.sample_rate,
            steps=self.steps,
            certain=1,
            delta=self.delta or 1e-5,
        )

    @property
    def defenses(self) -> tuple[Defense, ...]:
        """The noise, on the scale of what is released."""
        deviation = self.noise_multiplier * self.clip / self.divisor
        return (GaussianNoise(deviation),) if deviation else ()

    def gradient(self, model: Model[Any], parameters: Tensors, inputs: Any, labels: Tensor | None) -> Tensors:
        """sum_i min(1, C / ||g_i||) g_i / divisor, without the noise; differentiable."""
        total = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
        for i in range(len(inputs)):
            one = grad(model.loss)(parameters, inputs[i : i + 1], None if labels is None else labels[i : i + 1])
            part = cut(one, self.clip)
            total = {name: total[name] + part[name] / self.divisor for name in total}
        return total

    def facts(self) -> list[Fact]:
        """What an attacker reads in the code of the training, and what its accountant says."""
        step = f"each sample cut to norm {self.clip:g}, noise multiplier {self.noise_multiplier:g}, sum divided by {self.divisor:g}"
        spent = "not counted" if self.epsilon is None else f"epsilon {self.epsilon:.3g} at delta {self.delta:g}, so far"
        spent = "none: without noise there is none" if not self.noise_multiplier else spent
        return [fact("private step", True, step), fact("privacy spent", self.epsilon is not None, spent)]


@dataclass(frozen=True)
class ClippedNoise(Defense):
    """The gradient of each sample cut to norm `clip`, then noise of `noise_multiplier` times that on their sum, as Opacus does it.

    What is released is a gradient with a PrivateStep, whose noise is the defense that is left.
    """

    random: ClassVar[bool] = True

    clip: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        if not (0 < self.clip <= LARGEST_NOISE and 0 <= self.noise_multiplier <= LARGEST_NOISE):
            raise BadInput(
                f"DP-SGD cuts to a norm above 0 with a noise multiplier of 0 or more, each at most {LARGEST_NOISE:g}, not "
                f"{self.clip:g} and {self.noise_multiplier:g}."
            )

    def training(self, release: Release, samples: int) -> tuple[Release, tuple[Defense, ...]]:
        """A gradient of so many samples, each cut; BadInput for any other release."""
        if "private" not in {field.name for field in fields(release)}:
            raise BadInput(f"DP-SGD is a way to take gradients: it says nothing about an {release.name}.")
        step = PrivateStep(clip=self.clip, noise_multiplier=self.noise_multiplier, divisor=float(samples))
        return replace(release, private=step), step.defenses

    def __str__(self) -> str:
        return f"each sample cut to norm {self.clip:g}, noise multiplier {self.noise_multiplier:g}"
