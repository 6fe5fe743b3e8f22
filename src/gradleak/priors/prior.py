"""What a prior is to a search: a price on pictures, or a way to clean them, that a value carries."""

from typing import Protocol

from torch import Tensor


class Energy(Protocol):
    """-log p of pictures (batch, channel, height, width), up to a constant: smaller is likelier. Differentiable."""

    def energy(self, images: Tensor) -> Tensor:
        """A scalar."""


class Denoiser(Protocol):
    """E[picture | picture + white noise]. With it comes the score of the smoothed prior, (D(x, sigma) - x) / sigma^2
    (Tweedie's formula; Robbins 1956, Efron 2011)."""

    def denoise(self, images: Tensor, sigma: Tensor) -> Tensor:
        """images (batch, channel, height, width) = clean pixels in [0, 1] + sigma x white noise, sigma () or (batch,) in the
        same pixel units -> the expected clean pictures, same shape and dtype; not clamped."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channel, height, width) of its pictures."""
