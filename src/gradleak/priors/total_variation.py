"""Total variation (Rudin, Osher and Fatemi 1992), the picture prior of Inverting Gradients (equation 4)."""

from torch import Tensor


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference between neighbouring pixels, horizontal plus vertical: (..., height, width) -> scalar."""
    horizontal = (images[..., :, 1:] - images[..., :, :-1]).abs().mean()
    vertical = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    return horizontal + vertical
