"""Inverting Gradients (Geiping et al., NeurIPS 2020, arXiv:2003.14053).

Sees      Gradient or Update; labels optional (recovered by labels.py when absent)
Recovers  images (batch, channel, height, width) in [0, 1]
Solves    min over x in [0, 1] of 1 - cos(g(x) - g0, g* - g0) + prior(x)      (equation 4, where g0 = 0 and the prior is the total variation)
Differs   g0 is the part of the gradient that any picture with these labels would give (`shared_part`). In an untrained
          network that is nearly all of it, and the plain cosine is blind to the rest. g0 = 0 (`centre=False`) is the
          paper's objective.
          Starts at grey with a little noise, not at N(0, 1), and keeps the best iterate, not the last.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from gradleak.attacks.attack import Effort, check_sees
from gradleak.attacks.labels import known_or_recovered
from gradleak.attacks.reconstruction import Reconstruction, outcome_of
from gradleak.attacks.search.descend import OnStep, best_of_restarts, descend, stack
from gradleak.attacks.search.start import Start, begin
from gradleak.modalities.networks import Architecture
from gradleak.observations.adapter import Adapter
from gradleak.observations.distances import cosine
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.tensors import Tensors, flatten
from gradleak.priors.prior import Energy
from gradleak.priors.total_variation import TotalVariation

DRAWS = 6  # random pictures that tell what all share


@dataclass(frozen=True, kw_only=True)
class InvertingGradients:
    """The search and its prior.

    steps, step_size  signed Adam in pixel units, pixels in [0, 1]
    tv_weight         of the total variation; 0 switches it off
    prior             another energy in its place, e.g. a GaussianPrior, or None
    centre            measure the cosine from the part that all pictures share, not from zero
    restarts          random starts per observation, side by side; the best objective is kept
    compiled          generate machine code first (ten seconds to minutes): pays for long runs on small models
    start             another attack, whose reconstruction the first of the restarts begins at, or None
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update, Adapter)
    modality: ClassVar[str] = Architecture.modality
    on_device: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    steps: int = 1_000
    step_size: float = 0.1
    tv_weight: float = 0.03
    centre: bool = True
    restarts: int = 1
    compiled: bool = False
    prior: Energy | None = field(default=None, repr=False)
    start: Start | None = field(default=None, repr=False)

    def effort(self, observation: PictureObservation) -> Effort:
        """A gradient a step and restart, and the part that all pictures share."""
        known_or_recovered(observation)
        return Effort.of_search(observation, self.steps + DRAWS * self.centre, self.restarts)

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved when labels, or the batch size, are neither given nor recoverable."""
        return self.many([observation], generator=generator, on_step=on_step)[0]

    def many(
        self, observations: Sequence[PictureObservation], *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> list[Reconstruction]:
        """The same for several observations of one model state, side by side."""
        check_sees(self, *observations)
        seen = observations[0]
        labels = torch.stack([known_or_recovered(o) for o in observations])  # (observations, batch)
        y = labels.repeat_interleave(self.restarts, dim=0)  # (K, batch), K = observations * restarts
        released = stack(observations, self.restarts)  # {name: (K, ...)}
        noise = torch.randn(*y.shape, *seen.model.architecture.input_shape, generator=generator)
        start = (0.5 + 0.1 * noise).clamp(0, 1).to(y.device)
        if self.start is not None:
            start[:: self.restarts] = begin(self.start, observations, labels.unbind(), generator).to(start)
        origin = shared_part(seen, y, released, generator) if self.centre else {k: v * 0 for k, v in released.items()}

        prior = self.prior or TotalVariation(self.tv_weight)

        def objective(x: Tensor, y: Tensor, released: Tensors, origin: Tensors) -> Tensor:  # x (batch, c, h, w)
            simulated = seen.simulate(x, y)
            distance = cosine(_minus(simulated, origin), _minus(released, origin))
            return distance + prior.energy(x)

        search = descend(
            objective,
            start,
            (y, released, origin),
            steps=self.steps,
            step_size=self.step_size,
            on_step=on_step,
            compiled=self.compiled,
        )
        results = []
        for o, x, row, value, trace in best_of_restarts(search, observations, labels):
            residual = o.residual(x, row)
            status = f"Finished {self.steps} steps at objective {value:.3g}, relative residual {residual:.2g}."
            if not math.isfinite(value):
                status = "Not started: the objective is no finite number at grey images; check the model's parameters."
            outcome = outcome_of(residual)
            results.append(
                Reconstruction(x.cpu(), row.cpu(), residual, status, outcome, iterations=self.steps, trace=trace)
            )
        return results


def shared_part(
    observation: PictureObservation, labels: Tensor, released: Tensors, generator: torch.Generator, draws: int = DRAWS
) -> Tensors:
    """The mean release for random smooth pictures with these labels, scaled to fit what was released.

    labels (K, batch), released {name: (K, ...)} -> {name: (K, ...)}. The scale is <mean, released> / ||mean||^2: near 1
    where all pictures share most of their gradient, near 0 where they share none.
    """
    shape = (*labels.shape, *observation.model.architecture.input_shape)
    mean = {name: torch.zeros_like(tensor) for name, tensor in released.items()}
    for _ in range(draws):
        images = smooth_pictures(shape, generator).to(labels.device)
        for name, tensor in vmap(observation.simulate)(images, labels).items():
            mean[name] += tensor.detach() / draws
    scale = vmap(lambda a, b: flatten(a) @ flatten(b) / flatten(a).square().sum())(mean, released)  # (K,)
    return {name: scale.view(-1, *[1] * (tensor.dim() - 1)) * tensor for name, tensor in mean.items()}


def smooth_pictures(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random pictures with more contrast at coarse scales, as in nature: (..., channel, height, width) in [0, 1]."""
    *batch, channel, height, width = shape
    picture = torch.zeros(math.prod(batch), channel, height, width)
    scale = 2
    while scale <= max(height, width):
        noise = torch.randn(*picture.shape[:2], scale, scale, generator=generator)
        picture += F.interpolate(noise, (height, width), mode="bilinear") / scale**0.5
        scale *= 2
    return (0.5 + 0.25 * picture).clamp(0, 1).view(shape)


def _minus(a: Tensors, b: Tensors) -> Tensors:
    return {name: a[name] - b[name] for name in a}
