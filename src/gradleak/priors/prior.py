"""What a prior is to a search: a price on pictures, that a value carries."""

from typing import Protocol

from torch import Tensor


class Energy(Protocol):
    """-log p of pictures (batch, channel, height, width), up to a constant: smaller is likelier. Differentiable."""

    def energy(self, images: Tensor) -> Tensor:
        """A scalar."""
