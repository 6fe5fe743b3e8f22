"""RED-diff: annealed search for the most likely pictures (Mardani et al., ICLR 2024, arXiv:2305.04391, algorithm 1), and what is left
of it without schedule and data weight: score distillation sampling, of DreamFusion (Poole et al., ICLR 2023, arXiv:2209.14988).

Sees      Gradient, Update or Adapter; labels optional: of one picture, every class is tried
Recovers  images (batch, channel, height, width) in [0, 1]
Solves    min over x of -log p(released | x) - log p(x), with the gradient of -log p replaced by that of the smoothed prior at x + sigma e:
          (x - D(x + sigma e, sigma)) times a weight (proposition 2 and section 4.2), sigma falling, e ~ N(0, I), and no pass back
          through the denoiser.
          SDS: sigma random, the same weight for each, added to the mean relative misfit
Differs   The weight is (C + sigma^2 I) / (C sigma^2), of pictures with covariance C: under a Gaussian prior every level has the same,
          exact, minimum. The data weight is that of the noise, told or found. In place of a step of Adam at each level several of L-BFGS,
          in the metric of that weight, while D stands still: steps follow from the curvature, and none that raises the
          objective is taken. D is the mean at e and -e. Begins at the most likely pictures under the Gaussian.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gradleak.attacks.attack import Effort, check_sees
from gradleak.attacks.diffusion.latent import among_latents
from gradleak.attacks.diffusion.problem import Problem, Space, counted, effort, geometric, whitening
from gradleak.attacks.map_inversion import misfit
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.attacks.search.descend import OnStep, evaluated, rowwise
from gradleak.attacks.search.lbfgs import lbfgs
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


@dataclass(frozen=True, kw_only=True)
class RedDiff:
    """The search and its priors.

    prior        a denoiser, or None for the Gaussian; of one of latents these are searched (latent.py)
    gaussian     GaussianPrior.fit(public pictures), or None for GaussianPrior.smooth: the metric of the search, and its start
    levels       of noise
    evaluations  of the objective at each level
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
    levels: int = 30
    evaluations: int = 10
    noisiest: float = 0.3
    cleanest: float = 0.03
    blind: bool = False
    start: Start | None = field(default=None, repr=False)

    def prepared(self, observation: PictureObservation, public: Pictures, *, generator: torch.Generator) -> Self:
        """With a Gaussian of public pictures, where none was given and they are enough."""
        return self if self.gaussian is not None else replace(self, gaussian=GaussianPrior.of_public(public.images))

    def effort(self, observation: PictureObservation) -> Effort:
        """The search under the Gaussian, and the evaluations."""
        return effort(observation, self.levels * self.evaluations)

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
        latent = self.prior
        space = among_latents(problem, latent) if isinstance(latent, LatentDiffusion) else problem.pixels
        sigmas = geometric(self.noisiest, self.cleanest, self.levels)

        def objective(images: Tensor, u: Tensor, apart: Tensor, *given: Any) -> Tensor:
            return problem.unlikely(images, *given) + u.square().sum() / 2

        x = distilled(space, objective, sigmas, problem.given, self.evaluations, generator, on_step)
        return problem.answers(torch.stack([space.drawn(one) for one in x]), self.levels * self.evaluations)


@dataclass(frozen=True, kw_only=True)
class SDS:
    """The search and its priors.

    prior        a denoiser, or None for the Gaussian
    gaussian     GaussianPrior.fit(public pictures), or None for GaussianPrior.smooth: the metric of the search, and its start
    levels       of noise, drawn at random
    evaluations  of the objective at each level
    weight       of the distilled score against the mean relative misfit
    noisiest     levels are drawn up to here, in pixel units
    cleanest     and from here on
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
    levels: int = 30
    evaluations: int = 10
    weight: float = 1e-3
    noisiest: float = 0.3
    cleanest: float = 0.03
    blind: bool = False
    start: Start | None = field(default=None, repr=False)

    def prepared(self, observation: PictureObservation, public: Pictures, *, generator: torch.Generator) -> Self:
        """With a Gaussian of public pictures, where none was given and they are enough."""
        return self if self.gaussian is not None else replace(self, gaussian=GaussianPrior.of_public(public.images))

    def effort(self, observation: PictureObservation) -> Effort:
        """The search under the Gaussian, and the evaluations."""
        return effort(observation, self.levels * self.evaluations)

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
        sigmas = (self.noisiest * ratio ** torch.rand(self.levels, generator=generator)).tolist()

        def objective(images: Tensor, u: Tensor, apart: Tensor, y: Tensor, released: Tensors, *_: Tensor) -> Tensor:
            return misfit(seen.simulate(images, y), released) + self.weight * apart.square().sum() / 2

        x = distilled(problem.pixels, objective, sigmas, problem.given, self.evaluations, generator, on_step)
        return problem.answers(x, self.levels * self.evaluations)


def distilled(
    space: Space,
    objective: Callable[..., Tensor],
    sigmas: Sequence[float],
    given: tuple[Any, ...],
    evaluations: int,
    generator: torch.Generator,
    on_step: OnStep | None,
) -> Tensor:
    """Where the search ends, (K, ...) in the units of the space. objective: of one row, (pictures, u, x - D, *given), u being x - D in units of
    what noise of the level leaves open under the Gaussian."""

    def searched(u: Tensor, clean: Tensor, sigma: Tensor) -> Tensor:
        return clean + space.filtered(u.view_as(clean), lambda variance: 1 / whitening(sigma, variance))

    def told(u: Tensor, clean: Tensor, sigma: Tensor, *given: Any) -> Tensor:
        x = searched(u, clean, sigma)
        return objective(space.drawn(x), u, x - clean, *given)

    x, evaluate = space.start, rowwise(told, len(space.start))
    for level, sigma in enumerate(sigmas, 1):
        noise, levels = sigma * torch.randn(x.shape, generator=generator).to(x), torch.full((len(x),), sigma).to(x)
        with torch.no_grad():
            clean = (space.denoised(x + noise, sigma) + space.denoised(x - noise, sigma)) / 2
            u = space.filtered(x - clean, partial(whitening, sigma)).flatten(1)
            found = lbfgs(partial(evaluated, evaluate, given=(clean, levels, *given)), u, evaluations=evaluations)
            x = torch.stack([searched(*row) for row in zip(found.x, clean, levels, strict=True)])
        counted(on_step, level, len(sigmas), found.value)
    return x
