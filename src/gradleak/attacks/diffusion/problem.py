"""What the solvers of this folder share: rows of pictures to find, how likely a release makes them, and where they begin."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

from gradleak.attacks.attack import Effort
from gradleak.attacks.diffusion.begin import most_likely
from gradleak.attacks.map_inversion import PRIOR_WEIGHTS, MapInversion
from gradleak.attacks.reconstruction import Reconstruction, outcome_of
from gradleak.attacks.search.descend import OnStep, stack
from gradleak.attacks.search.likelihood import errors, estimated_variance, relative_variance, sizes
from gradleak.attacks.search.start import Given, Start
from gradleak.errors import BadInput
from gradleak.observations.observation import PictureObservation
from gradleak.observations.tensors import Tensors
from gradleak.priors.denoisers.diffusion import LatentDiffusion
from gradleak.priors.gaussian import GaussianPrior
from gradleak.priors.prior import Denoiser

UNHEARD = 1e9  # a variance at which a release says nothing
EVALUATIONS = 50  # of the search under the Gaussian, at each of its weights
POLISHING = 15  # the same, after latents
smooth = lru_cache(1)(GaussianPrior.smooth)


@dataclass(frozen=True)
class Space:
    """What a search moves in, pixels or latents.

    start     (K, batch, ...)
    drawn     the pictures (batch, channel, height, width) of one row
    denoised  (K, batch, ...) with white noise of this deviation -> the expected clean ones
    filtered  (rows, gain) -> gain(C) rows, of a Gaussian with covariance C
    """

    start: Tensor
    drawn: Callable[[Tensor], Tensor]
    denoised: Callable[[Tensor, float], Tensor]
    filtered: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]


@dataclass(frozen=True)
class Problem:
    """K rows: observations of one model state, each as many times as there are samples.

    start     (K, batch, channel, height, width): the most likely pictures under the Gaussian
    y         (K, batch) labels
    released  {name: (K, ...)}
    size      (K, L): ||released_l||^2
    variance  (K, L): of the noise on each number, over `size`; never below what the search under the Gaussian resolves
    """

    observations: Sequence[PictureObservation]
    gaussian: GaussianPrior
    denoiser: Denoiser
    start: Tensor
    y: Tensor
    released: Tensors
    size: Tensor
    variance: Tensor

    @classmethod
    def posed(
        cls,
        observations: Sequence[PictureObservation],
        gaussian: GaussianPrior | None,
        denoiser: Denoiser | None,
        copies: int,
        generator: torch.Generator,
        *,
        start: Start | None = None,
        blind: bool = False,
    ) -> Self:
        """Begun by the search under the Gaussian, or by `start`: it also finds labels, and the level of noise that nobody told. Without a
        denoiser the Gaussian is one. blind: the release is left out. Raises BadInput for a denoiser of other pictures."""
        seen = observations[0]
        shape = seen.model.architecture.input_shape
        gaussian = gaussian or smooth(shape)
        if denoiser is not None and tuple(denoiser.shape) != tuple(shape):
            raise BadInput(f"The denoiser is one of {tuple(denoiser.shape)} pictures, the model takes {tuple(shape)}.")
        search = MapInversion(prior=gaussian, evaluations=EVALUATIONS)
        begun = (
            [start(o, generator=generator) for o in observations]
            if start is not None
            else most_likely(search, observations, generator)
        )
        images = torch.stack([found.value for found in begun])
        variance = []
        for o, found in zip(observations, begun, strict=True):
            told, batch = relative_variance(o), len(found.value)
            if o.defenses is None:
                taken_up = 2 * found.value.numel() * gaussian.energy(found.value)
                assert found.labels is not None
                x = found.value.to(told)
                told = told + estimated_variance(o.simulate, x, found.labels, o.released, taken_up.to(told))
            variance.append(told + (UNHEARD if blind else PRIOR_WEIGHTS[-1] * len(told) / batch))
        where = variance[0]
        released, near = stack(observations, copies), gaussian.to(where.dtype).to(where.device)
        return cls(
            observations,
            near,
            denoiser or near,
            (gaussian.mean.expand_as(images) if blind else images).to(where).repeat_interleave(copies, dim=0),
            torch.stack([found.labels for found in begun if found.labels is not None])
            .to(where.device)
            .repeat_interleave(copies, dim=0),
            released,
            torch.stack([sizes(o.released) for o in observations]).repeat_interleave(copies, dim=0),
            torch.stack(variance).repeat_interleave(copies, dim=0),
        )

    def unlikely(self, images: Tensor, y: Tensor, released: Tensors, size: Tensor, variance: Tensor) -> Tensor:
        """-log p(released | images) of one row, up to a constant."""
        left = errors(self.observations[0].simulate(images, y), released, size)
        return (left / variance).sum() / 2

    @property
    def given(self) -> tuple[Tensor, Tensors, Tensor, Tensor]:
        """What `unlikely` takes besides pictures, of all rows."""
        return self.y, self.released, self.size, self.variance

    @property
    def pixels(self) -> Space:
        """Pictures as they are."""
        return Space(self.start, lambda images: images, self.denoised, self.filtered)

    def filtered(self, images: Tensor, gain: Callable[[Tensor], Tensor]) -> Tensor:
        """gain(C) images, of the Gaussian's covariance C: (batch, channel, height, width), of one row or of all."""
        return self.gaussian.filtered(images.flatten(0, -4), gain).view_as(images)

    def denoised(self, images: Tensor, sigma: float) -> Tensor:
        """(K, batch, channel, height, width) with white noise of this deviation -> the expected clean ones."""
        flat = images.flatten(0, 1)
        return self.denoiser.denoise(flat, torch.tensor(sigma).to(flat)).view_as(images)

    def answers(self, images: Tensor, evaluations: int, spread: Tensor | None = None) -> list[Reconstruction]:
        """One reconstruction of each observation (observations, batch, channel, height, width), polished where a denoiser is one of latents."""
        found = []
        for row, o in enumerate(self.observations):
            value, y = images[row].clamp(0, 1).detach(), self.y[row * (len(self.y) // len(self.observations))]
            residual = o.residual(value, y)
            status = f"Finished {evaluations} evaluations, relative residual {residual:.2g}."
            invented = None if spread is None else spread[row].cpu()
            outcome = outcome_of(residual)
            one = Reconstruction(
                value.cpu(), y.cpu(), residual, status, outcome, iterations=evaluations, spread=invented
            )
            found.append(self.polished(o, one) if isinstance(self.denoiser, LatentDiffusion) else one)
        return found

    def polished(self, observation: PictureObservation, found: Reconstruction) -> Reconstruction:
        """What no latent draws: a short search in pixels from there, kept where it explains more of the release."""
        assert found.labels is not None
        search = MapInversion(prior=self.gaussian, evaluations=POLISHING, start=Given(found))
        told = replace(observation, labels=found.labels.to(self.y))
        closer = search(told, generator=torch.Generator())
        if not closer.residual < found.residual:
            return found
        said = f"{found.status} Polished in pixels: relative residual {closer.residual:.2g}."
        return replace(closer, status=said, iterations=found.iterations + closer.iterations, spread=found.spread)


def geometric(first: float, last: float, count: int) -> list[float]:
    """So many levels of noise, from the first to the last, each the same part of the one before."""
    return [first * (last / first) ** (i / max(count - 1, 1)) for i in range(count)]


def effort(observation: PictureObservation, gradients: int, rows: int = 1) -> Effort:
    """The search under the Gaussian, and then so many gradients of each row."""
    begun = MapInversion(evaluations=EVALUATIONS).effort(observation)
    after = Effort.of_search(observation, gradients, rows)
    return Effort(begun.simulations + after.simulations, max(begun.together, after.together), begun.abreast)


def counted(on_step: OnStep | None, step: int, steps: int, value: Tensor) -> None:
    """Tell how far a loop is."""
    if on_step is not None:
        on_step(step, steps, float(value.min()))


def whitening(sigma: float | Tensor, variance: Tensor) -> Tensor:
    """1 / the deviation of what has this variance, and was seen with noise of deviation sigma."""
    return ((variance + sigma**2) / (variance * sigma**2)).sqrt()
