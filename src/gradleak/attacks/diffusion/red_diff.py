"""RED-diff: annealed search for the most likely pictures (Mardani et al., ICLR 2024, arXiv:2305.04391, algorithm 1), and what is left
of it without schedule and data weight: score distillation sampling, of DreamFusion (Poole et al., ICLR 2023, arXiv:2209.14988).

Sees      Gradient, Update or Adapter; labels optional: of one picture, every class is tried
Recovers  images (batch, channel, height, width) in [0, 1]
Solves    min over x of -log p(released | x) - log p(x), with the gradient of -log p replaced by that of the smoothed prior at x + sigma e:
          (x - D(x + sigma e, sigma)) times a weight (proposition 2 and section 4.2), sigma falling, e ~ N(0, I) fresh each step;
          by Adam with rate 0.1, and no pass back through the denoiser.
          SDS: sigma random, the same weight for each, added to the mean relative misfit
Differs   The weight is (C + sigma^2 I) / (C sigma^2), of pictures with covariance C: under a Gaussian prior every level has the same,
          exact, minimum. The data weight is that of the noise, told or found. Searched in whitened coefficients z, x = mean +
          C^(1/2) z, of the Gaussian; the rate falls to zero. Begins at the most likely pictures under the Gaussian.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from gradleak.attacks.attack import Effort, check_sees
from gradleak.attacks.diffusion.latent import distilled_among_latents
from gradleak.attacks.diffusion.problem import Problem, counted, effort, geometric
from gradleak.attacks.map_inversion import misfit
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.attacks.search.descend import OnStep, evaluated, rowwise
from gradleak.attacks.search.start import Start
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.adapter import Adapter
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.tensors import Tensors
from gradleak.priors.denoisers.diffusion import LatentDiffusion
from gradleak.priors.gaussian import GaussianPrior
from gradleak.priors.prior import Denoiser

RATE = 0.1  # of Adam, in standard deviations of a coefficient


@dataclass(frozen=True, kw_only=True)
class RedDiff:
    """The search and its priors.

    prior     a denoiser, or None for the Gaussian; of one of latents these are searched (latent.py)
    gaussian  GaussianPrior.fit(public pictures), or None for GaussianPrior.smooth: the metric of the search, and its start
    steps     a gradient and a denoising each
    noisiest  the first level of noise, in pixel units
    cleanest  the last
    blind     leave the release out: what the prior says alone
    start     another attack, whose reconstruction stands in for the most likely pictures, or None
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update, Adapter)
    modality: ClassVar[str] = Architecture.modality
    on_device: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    by_name_only: ClassVar[bool] = True

    prior: Denoiser | None = field(default=None, repr=False)
    gaussian: GaussianPrior | None = field(default=None, repr=False)
    steps: int = 300
    noisiest: float = 0.3
    cleanest: float = 0.03
    blind: bool = False
    start: Start | None = field(default=None, repr=False)

    def prepared(self, observation: PictureObservation, public: Pictures, *, generator: torch.Generator) -> Self:
        """With a Gaussian of public pictures, where none was given and they are enough."""
        return self if self.gaussian is not None else replace(self, gaussian=GaussianPrior.of_public(public.images))

    def effort(self, observation: PictureObservation) -> Effort:
        """The search under the Gaussian, and a gradient a step."""
        return effort(observation, self.steps)

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved when the batch size is withheld, or the labels of a batch are neither given nor readable."""
        return self.many([observation], generator=generator, on_step=on_step)[0]

    def many(
        self, observations: Sequence[PictureObservation], *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> list[Reconstruction]:
        """The same for several observations of one model state, side by side."""
        check_sees(self, *observations)
        problem = Problem.posed(
            observations, self.gaussian, self.prior, 1, generator, start=self.start, blind=self.blind
        )
        sigmas = geometric(self.noisiest, self.cleanest, self.steps)

        def weighted(apart: Tensor, sigma: float) -> Tensor:
            return problem.filtered(apart, lambda variance: (variance + sigma**2) / (variance * sigma**2))

        if isinstance(latent := problem.denoiser, LatentDiffusion):
            return problem.answers(distilled_among_latents(problem, latent, sigmas, generator, on_step), self.steps)
        x = distilled(problem, problem.unlikely, sigmas, weighted, generator, on_step)
        return problem.answers(x, self.steps)


@dataclass(frozen=True, kw_only=True)
class SDS:
    """The search and its priors.

    prior     a denoiser, or None for the Gaussian
    gaussian  GaussianPrior.fit(public pictures), or None for GaussianPrior.smooth: the metric of the search, and its start
    steps     a gradient and a denoising each
    weight    of the distilled score against the mean relative misfit
    noisiest  levels of noise are drawn up to here, in pixel units
    cleanest  and from here on
    blind     leave the release out: what the prior says alone
    start     another attack, whose reconstruction stands in for the most likely pictures, or None
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update, Adapter)
    modality: ClassVar[str] = Architecture.modality
    on_device: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    by_name_only: ClassVar[bool] = True

    prior: Denoiser | None = field(default=None, repr=False)
    gaussian: GaussianPrior | None = field(default=None, repr=False)
    steps: int = 300
    weight: float = 1e-3
    noisiest: float = 0.3
    cleanest: float = 0.03
    blind: bool = False
    start: Start | None = field(default=None, repr=False)

    def prepared(self, observation: PictureObservation, public: Pictures, *, generator: torch.Generator) -> Self:
        """With a Gaussian of public pictures, where none was given and they are enough."""
        return self if self.gaussian is not None else replace(self, gaussian=GaussianPrior.of_public(public.images))

    def effort(self, observation: PictureObservation) -> Effort:
        """The search under the Gaussian, and a gradient a step."""
        return effort(observation, self.steps)

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved when the batch size is withheld, or the labels of a batch are neither given nor readable."""
        return self.many([observation], generator=generator, on_step=on_step)[0]

    def many(
        self, observations: Sequence[PictureObservation], *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> list[Reconstruction]:
        """The same for several observations of one model state, side by side."""
        check_sees(self, *observations)
        problem = Problem.posed(
            observations, self.gaussian, self.prior, 1, generator, start=self.start, blind=self.blind
        )
        seen, ratio = observations[0], self.cleanest / self.noisiest
        sigmas = (self.noisiest * ratio ** torch.rand(self.steps, generator=generator)).tolist()

        def plain(images: Tensor, y: Tensor, released: Tensors, size: Tensor, variance: Tensor) -> Tensor:
            return misfit(seen.simulate(images, y), released)

        def weighted(apart: Tensor, sigma: float) -> Tensor:
            return self.weight * apart

        return problem.answers(distilled(problem, plain, sigmas, weighted, generator, on_step), self.steps)


def distilled(
    problem: Problem,
    distance: Callable[..., Tensor],
    sigmas: Sequence[float],
    weighted: Callable[[Tensor, float], Tensor],
    generator: torch.Generator,
    on_step: OnStep | None,
) -> Tensor:
    """Where Adam ends: (K, batch, channel, height, width). distance: of one row, as `Problem.unlikely`; sigmas: of each step; weighted:
    (x - D(x + sigma e), sigma) -> a gradient of the prior."""

    def coloured(images: Tensor) -> Tensor:
        return problem.filtered(images, torch.sqrt)

    x, mean = problem.start, problem.gaussian.mean
    z = problem.filtered(x - mean, torch.rsqrt)
    first, second = torch.zeros_like(z), torch.zeros_like(z)
    evaluate = rowwise(distance, len(x))
    for step, sigma in enumerate(sigmas, 1):
        noisy = x + sigma * torch.randn(x.shape, generator=generator).to(x)
        gradient, value = evaluated(evaluate, x, problem.given)
        gradient = coloured(gradient + weighted(x - problem.denoised(noisy, sigma), sigma))
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient.square()
        rate = RATE * (1 + math.cos(math.pi * step / len(sigmas))) / 2
        z = z - rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
        x = mean + coloured(z)
        counted(on_step, step, len(sigmas), value)
    return x
