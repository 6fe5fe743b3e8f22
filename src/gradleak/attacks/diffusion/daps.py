"""DAPS: decoupled annealing posterior sampling (Zhang et al., CVPR 2025, arXiv:2407.01521, algorithm 1).

Sees      Gradient, Update or Adapter; labels optional: of one picture, every class is tried
Recovers  images (batch, channel, height, width) in [0, 1], the mean of S samples, and their spread: what the prior has invented
Solves    x_0 ~ p(x_0 | x_t, released),  x_(t-1) = x_0 + sigma_(t-1) N(0, I), with sigma falling: the samples end at p(x | released)
          (proposition 1). p(x_0 | x_t) is a Gaussian around D(x_t, sigma) (section 3.2)
Differs   The Gaussian has the covariance C sigma^2 (C + sigma^2 I)^-1 of pictures with covariance C after that noise, in place of
          r^2 I: under a Gaussian prior every step is exact. The answer of the denoiser is its mean, in place of a few steps of
          an ODE. In place of Langevin steps, one sample is the minimum of the perturbed objective (Bardsley et al. 2014,
          Randomize-then-optimize: exact where the release is linear in the pictures), by L-BFGS in the metric of that covariance.
          Samples come in pairs with opposite noise, whose mean is the exact one under a Gaussian. Begins not at noise but at the
          most likely pictures under the Gaussian.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gradleak.attacks.attack import Effort, check_sees
from gradleak.attacks.diffusion.problem import Problem, counted, effort, geometric, whitening
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.attacks.search.descend import OnStep, evaluated, rowwise
from gradleak.attacks.search.lbfgs import lbfgs
from gradleak.attacks.search.start import Start
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.adapter import Adapter
from gradleak.observations.defenses import spread
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update
from gradleak.priors.gaussian import GaussianPrior
from gradleak.priors.prior import Denoiser


@dataclass(frozen=True, kw_only=True)
class DAPS:
    """The sampler and its priors.

    prior        a denoiser, or None for the Gaussian
    gaussian     GaussianPrior.fit(public pictures), or None for GaussianPrior.smooth: the metric of the search, and its start
    samples      of each observation, in pairs: their mean is the answer
    levels       of noise
    evaluations  of the objective at each level, of each sample
    noisiest     the first level, in pixel units
    cleanest     the last
    blind        leave the release out: what the prior says alone
    start        another attack, whose reconstruction stands in for the most likely pictures, or None
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update, Adapter)
    modality: ClassVar[str] = Architecture.modality
    on_device: ClassVar[bool] = True
    joint: ClassVar[bool] = True
    by_name_only: ClassVar[bool] = True

    prior: Denoiser | None = field(default=None, repr=False)
    gaussian: GaussianPrior | None = field(default=None, repr=False)
    samples: int = 4
    levels: int = 16
    evaluations: int = 12
    noisiest: float = 0.5
    cleanest: float = 0.02
    blind: bool = False
    start: Start | None = field(default=None, repr=False)

    def prepared(self, observation: PictureObservation, public: Pictures, *, generator: torch.Generator) -> Self:
        """With a Gaussian of public pictures, where none was given and they are enough."""
        return self if self.gaussian is not None else replace(self, gaussian=GaussianPrior.of_public(public.images))

    def effort(self, observation: PictureObservation) -> Effort:
        """The search under the Gaussian, and the evaluations of each sample."""
        return effort(observation, self.levels * self.evaluations, max(self.samples, 2))

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
        pairs = max(self.samples // 2, 1)
        problem = Problem.posed(
            observations, self.gaussian, self.prior, 2 * pairs, generator, start=self.start, blind=self.blind
        )
        gaussian, x = problem.gaussian, problem.start  # (K, batch, channel, height, width), K = observations * samples

        def opposite(like: Tensor) -> Tensor:  # (K, ...): pairs of rows
            noise = torch.randn(len(like) // 2, *like.shape[1:], generator=generator).to(like)
            return torch.stack([noise, -noise], 1).flatten(0, 1)

        def objective(u: Tensor, drawn: Tensor, mean: Tensor, sigma: Tensor, *given: Any) -> Tensor:
            return problem.unlikely(coloured(u, mean, sigma), *given) + (u - drawn).square().sum() / 2

        def coloured(u: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:  # u (batch * pixels,), mean a batch of pictures
            return mean + gaussian.filtered(u.view_as(mean), lambda variance: 1 / whitening(sigma, variance))

        released, deviation = problem.released, (problem.size * problem.variance).sqrt()
        evaluate: Callable[..., Any] | None = None
        for level, sigma in enumerate(geometric(self.noisiest, self.cleanest, self.levels)):
            mean = problem.denoised(x + sigma * opposite(x), sigma)
            u = problem.filtered(x - mean, partial(whitening, sigma)).flatten(1)
            told = {name: t + spread(deviation[:, i], t) * opposite(t) for i, (name, t) in enumerate(released.items())}
            sigmas = torch.full((len(x),), sigma).to(x)
            given = (opposite(u), mean, sigmas, problem.y, told, problem.size, problem.variance)
            evaluate = evaluate or rowwise(objective, len(u))
            found = lbfgs(partial(evaluated, evaluate, given=given), u, evaluations=self.evaluations)
            x = torch.stack([coloured(*row) for row in zip(found.x, mean, sigmas, strict=True)])
            counted(on_step, level + 1, self.levels, found.value)
        samples = x.view(len(observations), 2 * pairs, *x.shape[1:])
        done = self.levels * self.evaluations * 2 * pairs
        return problem.answers(samples.mean(1), done, samples.std(1, correction=0))
