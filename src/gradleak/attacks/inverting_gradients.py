"""Inverting Gradients (Geiping et al., NeurIPS 2020, arXiv:2003.14053).

Sees      Gradient or Update; labels optional (recovered by labels.py when absent)
Recovers  images (batch, channel, height, width) in [0, 1]
Solves    min over x in [0, 1] of 1 - cos(g(x) - g0, g* - g0) + tv_weight * TV(x)      (equation 4, where g0 = 0)
Differs   g0 is the mean gradient of random smooth pictures with the same labels. In an untrained network most of the
          gradient is the same for every picture; the plain cosine is blind to the small part that is not. g0 = 0
          (`centre=False`) is the paper's objective.
          Starts at grey with a little noise, not at N(0, 1), and keeps the best iterate, not the last.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vmap

from gradleak.attacks.labels import known_or_recovered
from gradleak.distances import Tensors, cosine, relative_residual
from gradleak.observations import Gradient
from gradleak.optimise import OnStep, best_of_restarts, descend, stack
from gradleak.priors.total_variation import total_variation
from gradleak.reconstruction import Reconstruction


@dataclass(frozen=True, kw_only=True)
class InvertingGradients:
    """The search and its prior.

    steps, step_size  signed Adam in pixel units, pixels in [0, 1]
    tv_weight         of the total variation; 0 switches the prior off
    centre            measure the cosine from the mean gradient of random smooth pictures, not from zero
    restarts          random starts per observation, side by side; the best objective is kept
    compiled          generate machine code first (ten seconds to minutes): pays for long runs on small models
    """

    steps: int = 1_000
    step_size: float = 0.1
    tv_weight: float = 0.1
    centre: bool = True
    restarts: int = 1
    compiled: bool = False

    def __call__(
        self, observation: Gradient, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved when labels, or the batch size, are neither given nor recoverable."""
        return self.many([observation], generator=generator, on_step=on_step)[0]

    def many(
        self, observations: Sequence[Gradient], *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> list[Reconstruction]:
        """The same for several observations of one model state, side by side."""
        seen = observations[0]
        labels = torch.stack([known_or_recovered(o) for o in observations])  # (observations, batch)
        y = labels.repeat_interleave(self.restarts, dim=0)  # (K, batch), K = observations * restarts
        released = stack(observations, self.restarts)  # {name: (K, ...)}
        noise = torch.randn(*y.shape, *seen.model.architecture.input_shape, generator=generator)
        start = (0.5 + 0.1 * noise).clamp(0, 1).to(y.device)
        origin = blind_gradient(seen, y, generator) if self.centre else {k: v * 0 for k, v in released.items()}

        def objective(x: Tensor, y: Tensor, released: Tensors, origin: Tensors) -> Tensor:  # x (batch, c, h, w)
            simulated = seen.simulate(x, y)
            distance = cosine(_minus(simulated, origin), _minus(released, origin))
            return distance + self.tv_weight * total_variation(x)

        found = descend(
            objective,
            start,
            (y, released, origin),
            steps=self.steps,
            step_size=self.step_size,
            on_step=on_step,
            compiled=self.compiled,
        )
        results = []
        for o, x, row, value, trace in best_of_restarts(found, observations, labels):
            residual = float(relative_residual(o.simulate(x, row), o.released))
            status = f"Finished {self.steps} steps at objective {value:.3g}, relative residual {residual:.2g}."
            results.append(Reconstruction(x.cpu(), row.cpu(), residual, status, self.steps, trace))
        return results


def blind_gradient(observation: Gradient, labels: Tensor, generator: torch.Generator, draws: int = 6) -> Tensors:
    """The mean release for random smooth pictures: labels (K, batch) -> {name: (K, ...)}."""
    simulate = vmap(observation.simulate)
    channel, height, width = observation.model.architecture.input_shape
    total: Tensors = {}
    for _ in range(draws):
        images = smooth_pictures(labels.numel(), channel, height, width, generator).to(labels.device)
        for name, tensor in simulate(images.view(*labels.shape, channel, height, width), labels).items():
            total[name] = total.get(name, 0) + tensor.detach() / draws
    return total


def smooth_pictures(count: int, channel: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Random pictures with more contrast at coarse scales, as in nature: (count, channel, height, width) in [0, 1]."""
    picture = torch.zeros(count, channel, height, width)
    scale = 2
    while scale <= max(height, width):
        noise = torch.randn(count, channel, scale, scale, generator=generator)
        picture += F.interpolate(noise, (height, width), mode="bilinear") / scale**0.5
        scale *= 2
    return (0.5 + 0.25 * picture).clamp(0, 1)


def _minus(a: Tensors, b: Tensors) -> Tensors:
    return {name: a[name] - b[name] for name in a}
