"""Total variation (Rudin, Osher and Fatemi 1992), the picture prior of Inverting Gradients (equation 4)."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TotalVariation:
    """weight x the mean absolute difference between neighbouring pixels."""

    weight: float = 0.03

    def energy(self, images: Tensor) -> Tensor:
        """Of pictures (batch, channel, height, width)."""
        return self.weight * total_variation(images)


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference between neighbouring pixels, horizontal plus vertical: (..., height, width) -> scalar."""
    horizontal = (images[..., :, 1:] - images[..., :, :-1]).abs().mean()
    vertical = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    return horizontal + vertical
