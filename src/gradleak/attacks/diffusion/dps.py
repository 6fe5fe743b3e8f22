"""DPS: diffusion posterior sampling (Chung et al., ICLR 2023, arXiv:2209.14687, algorithm 1).

Sees      Gradient, Update or Adapter; labels optional: of one picture, every class is tried
Recovers  images (batch, channel, height, width) in [0, 1]: one sample
Solves    x_(t-1) = a step of ancestral sampling from x_t, towards D(x_t, sigma), less a step along the gradient of
          -log p(released | D(x_t, sigma)) in x_t, through the denoiser (equation 16)
Differs   That step has the length `guidance` times that of the noise of the level: DSG (Yang et al., ICML 2024, arXiv:2402.03201,
          equation 10 with guidance 1). The paper's, 1 over the distance, is one of pictures, and a release has no such unit.
          Begins not at noise but at the most likely pictures under the Gaussian, with the noise of the first level.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import ClassVar, Self

import torch
from torch import Tensor

from gradleak.attacks.attack import Effort, check_sees
from gradleak.attacks.diffusion.problem import Problem, counted, effort, geometric
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.attacks.search.descend import OnStep, evaluated, rowwise
from gradleak.attacks.search.start import Start
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.adapter import Adapter
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update
from gradleak.priors.gaussian import GaussianPrior
from gradleak.priors.prior import Denoiser


@dataclass(frozen=True, kw_only=True)
class DPS:
    """The sampler and its priors.

    prior     a denoiser, or None for the Gaussian
    gaussian  GaussianPrior.fit(public pictures), or None for GaussianPrior.smooth: the start
    steps     levels of noise; a gradient and a denoising each
    guidance  length of a step along the gradient, over that of the noise
    noisiest  the first level of noise, in pixel units
    cleanest  the last
    blind     leave the release out: what the prior says alone
    start     another attack, whose reconstruction stands in for the most likely pictures, or None
    """

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update, Adapter)
    modality: ClassVar[str] = Architecture.modality
    on_device: ClassVar[bool] = True
    by_name_only: ClassVar[bool] = True

    prior: Denoiser | None = field(default=None, repr=False)
    gaussian: GaussianPrior | None = field(default=None, repr=False)
    steps: int = 300
    guidance: float = 0.2
    noisiest: float = 0.3
    cleanest: float = 0.005
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

        def noise(like: Tensor) -> Tensor:
            return torch.randn(like.shape, generator=generator).to(like)

        levels = [*geometric(self.noisiest, self.cleanest, self.steps), 0.0]
        x = problem.start + levels[0] * noise(problem.start)
        evaluate = rowwise(problem.unlikely, len(x))
        for step, (sigma, after) in enumerate(pairwise(levels), 1):
            with torch.enable_grad():
                clean = problem.denoised(x.requires_grad_(), sigma)  # (K, batch, channel, height, width)
                inside, value = evaluated(evaluate, clean.detach(), problem.given)
                (gradient,) = torch.autograd.grad(clean, x, inside)
            kept, fresh = (after / sigma) ** 2, after * (1 - (after / sigma) ** 2) ** 0.5
            x = clean.detach() + kept * (x.detach() - clean.detach()) + fresh * noise(x)
            length = self.guidance * max(fresh, self.cleanest / 2) * gradient[0].numel() ** 0.5
            x = x - length * torch.nn.functional.normalize(gradient.flatten(1), dim=1).view_as(x)
            counted(on_step, step, self.steps, value)
        return problem.answers(x, self.steps)
