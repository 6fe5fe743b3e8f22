"""Pictures as a Gaussian: the mean and the principal components of public ones, or, without any, the 1/f^2 spectrum that
natural pictures share (Field 1987, "Relations between the statistics of natural images and cortical cells").
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

from gradleak.errors import BadInput

_COLOUR_CORRELATION = 0.9  # between any two channels of a photograph, roughly


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """picture ~ mean + sum_i std_i N(0, 1) component_i + remainder N(0, I), pixels in [0, 1]; float64 throughout.

    mean        (channel, height, width)
    components  (k, channel, height, width), orthonormal
    std         (k,), in pixel units, positive
    remainder   standard deviation of every pixel beside the components, above zero
    pictures    (n, channel, height, width): those it was fitted to, so that `near` can look at some of them, or None
    """

    mean: Tensor = field(repr=False)
    components: Tensor = field(repr=False)
    std: Tensor = field(repr=False)
    remainder: float = 0.03
    pictures: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        shape, k = tuple(self.mean.shape), len(self.components)
        if self.components.shape != (k, *shape) or self.std.shape != (k,) or len(shape) != 3 or not self.remainder > 0:
            raise BadInput(
                f"A Gaussian prior of {_by(shape)} pictures needs components (k, {_by(shape)}), not "
                f"({_by(self.components.shape)}), one standard deviation for each, and a remainder above zero."
            )

    @classmethod
    def fit(cls, images: Tensor, components: int | None = None, remainder: float = 0.03) -> Self:
        """Principal components of public pictures (n, channel, height, width) in [0, 1].

        components: how many to keep, None for all; the variance of those left out joins the remainder, evenly
        (probabilistic PCA; Tipping and Bishop 1999, equation 8). Raises BadInput for fewer than two pictures.
        """
        if images.ndim != 4 or len(images) < 2:
            raise BadInput(
                f"A Gaussian prior is fitted to at least two pictures (n, c, h, w), not to {_by(images.shape)}."
            )
        rows = images.detach().double().flatten(1)  # (n, pixels)
        return cls._of(images, rows.mean(0), torch.cov(rows.T), components, remainder)

    @classmethod
    def of_public(cls, images: Tensor) -> "GaussianPrior | None":
        """`fit`, or None for fewer pictures than half the pixels of one: their covariance is worse than that of photographs
        in general."""
        return _fitted(images) if len(images) and len(images) >= images[0].numel() / 2 else None

    def __str__(self) -> str:
        return "smooth" if self.pictures is None else f"{len(self.pictures)} public pictures"

    @classmethod
    def _of(cls, images: Tensor, mean: Tensor, covariance: Tensor, components: int | None, remainder: float) -> Self:
        variance, vectors = torch.linalg.eigh(covariance)  # ascending
        variance, vectors = variance.flip(0).clamp_min(0), vectors.flip(1)
        k = int((variance > 1e-12 * variance[0]).sum())
        if components is not None:
            k = min(k, components)
        left = float(variance[k:].sum()) / max(len(variance) - k, 1)
        parts = vectors[:, :k].T.reshape(k, *images.shape[1:])
        whole = math.sqrt(remainder**2 + left)
        return cls(mean.view(images.shape[1:]), parts, (variance[:k] - left).clamp_min(1e-300).sqrt(), whole, images)

    @classmethod
    def smooth(cls, shape: tuple[int, int, int], std: float = 0.25) -> Self:
        """The stationary power-law prior: mean grey, variance 1/f^2 along the cosines of the discrete cosine transform,
        the same for all channels, which correlate; `std` is the mean standard deviation of a pixel.
        """
        channel, height, width = shape
        down, across = cosines(height), cosines(width)
        waves = torch.einsum("iy,jx->ijyx", down, across).reshape(-1, height, width)  # (h w, h, w), orthonormal
        # Frequencies in cycles per picture; the constant wave gets the power of the lowest frequency.
        y, x = torch.arange(height).double() / 2, torch.arange(width).double() / 2
        power = 1 / (y[:, None].square() + x.square()).clamp_min(0.25).flatten()
        colour = torch.full((channel, channel), _COLOUR_CORRELATION).double().fill_diagonal_(1.0)
        weight, mixes = torch.linalg.eigh(colour)
        variance = (weight[:, None] * power).flatten()  # (c h w,)
        parts = torch.einsum("ca,nyx->ancyx", mixes, waves).reshape(-1, *shape)
        scale = std * math.sqrt(len(variance) / float(variance.sum()))
        order = variance.argsort(descending=True)
        mean = torch.full(shape, 0.5, dtype=torch.float64)
        return cls(mean, parts[order], scale * variance[order].sqrt(), remainder=0.01)

    def near(self, image: Tensor, count: int = 1000, shrinkage: float = 0.2) -> Self:
        """The prior of the `count` pictures most like this one (squared distance), its covariance shrunk to the whole's.

        image (channel, height, width). Pictures of one kind are a mixture, not a Gaussian: their neighbourhoods are
        closer to one. The prior itself where its pictures are unknown or no more than `count`.
        """
        if self.pictures is None or len(self.pictures) <= count:
            return self
        rows = self.pictures.double().flatten(1)
        closest = (rows - image.double().flatten()).square().sum(1).topk(count, largest=False).indices
        mixed = (1 - shrinkage) * torch.cov(rows[closest].T) + shrinkage * self.covariance()
        return self._of(self.pictures, rows[closest].mean(0), mixed, None, self.remainder)

    def to(self, where: torch.device | torch.dtype) -> Self:
        """The same on another device, or in another precision."""
        moved = {name: getattr(self, name).to(where) for name in ("mean", "components", "std")}
        return replace(self, **moved, pictures=None)

    def pixels(self, coefficients: Tensor) -> Tensor:
        """(..., k) in units of the components' standard deviations -> (..., channel, height, width), not clamped."""
        change: Tensor = torch.einsum("...k,kcyx->...cyx", coefficients.double() * self.std, self.components)
        return self.mean + change

    def coefficients(self, images: Tensor) -> Tensor:
        """(..., channel, height, width) -> (..., k): what `pixels` brings back to the closest picture."""
        along: Tensor = torch.einsum("...cyx,kcyx->...k", images.double() - self.mean, self.components)
        return along / self.std

    def covariance(self) -> Tensor:
        """(pixels, pixels)."""
        return self._spectral(self.std.square(), self.remainder**2)

    def factor(self) -> Tensor:
        """The symmetric square root of the covariance: (pixels, pixels)."""
        return self._spectral((self.std.square() + self.remainder**2).sqrt() - self.remainder, self.remainder)

    def energy(self, images: Tensor) -> Tensor:
        """Half the squared Mahalanobis distance to the mean, per pixel, on average over (batch, channel, height, width)."""
        apart = (images - self.mean.to(images)).flatten(1)
        precision = self._spectral(1 / (self.std.square() + self.remainder**2) - self.remainder**-2, self.remainder**-2)
        return ((apart @ precision.to(images)) * apart).mean() / 2

    def denoise(self, images: Tensor, sigma: Tensor) -> Tensor:
        """`Denoiser.denoise`: the posterior mean, exact (the Wiener filter): mean + C (C + sigma^2 I)^-1 (images - mean)."""
        mean, noise = self.mean.to(images), sigma.to(images).reshape(-1, 1).square()  # noise (batch or 1, 1)
        return mean + self.filtered(images - mean, lambda variance: variance / (variance + noise))

    def filtered(self, images: Tensor, gain: Callable[[Tensor], Tensor]) -> Tensor:
        """gain(C) images, of the covariance C: each principal component times the gain of its variance.

        images (batch, channel, height, width), in whose precision it is computed; gain: variances (1, k), above zero -> (1 or batch, k)."""
        rows, V = images.flatten(1), self.components.flatten(1).to(images)  # (batch, pixels), (k, pixels)
        rest = torch.full((1, 1), self.remainder**2).to(images)
        own, left = gain(self.std.square().to(images)[None] + rest), gain(rest)
        return (left * rows + (rows @ V.T * (own - left)) @ V).view_as(images)

    @property
    def shape(self) -> tuple[int, int, int]:
        channel, height, width = self.mean.shape
        return channel, height, width

    def _spectral(self, values: Tensor, rest: float) -> Tensor:
        """sum_i values_i v_i v_i^T + rest I, with the components v."""
        V = self.components.flatten(1)  # (k, pixels)
        return (V.T * values) @ V + rest * torch.eye(V.shape[1], dtype=V.dtype)


@lru_cache(maxsize=1)
def _fitted(images: Tensor) -> GaussianPrior:
    """`fit`, once where several attacks are given the very same tensor."""
    return GaussianPrior.fit(images)


def cosines(n: int) -> Tensor:
    """The orthonormal discrete cosine transform of type II: rows are waves of 0, 1/2, 1, ... cycles, (n, n)."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    waves = torch.cos(math.pi * k * (i + 0.5) / n)
    return torch.nn.functional.normalize(waves, dim=1)


def _by(shape: tuple[int, ...] | torch.Size) -> str:
    return "x".join(map(str, shape))
