"""What a victim may do to a gradient before it is shared: frozen values with one method, apply(released, generator).

`released` is {name: (n, ...)}: n gradients, each of which is treated by itself, over all its tensors together.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradleak.errors import BadInput
from gradleak.observations.tensors import Tensors


class Defense(Protocol):
    """What every defense is."""

    def apply(self, released: Tensors, generator: torch.Generator) -> Tensors: ...


@dataclass(frozen=True)
class GaussianNoise:
    """Add N(0, std^2) to every entry; std in units of the gradient."""

    std: float

    def __post_init__(self) -> None:
        if not self.std >= 0:
            raise BadInput(f"Noise has a standard deviation of at least 0, not {self.std:g}.")

    def apply(self, released: Tensors, generator: torch.Generator) -> Tensors:
        """The noisy gradients."""
        return {
            name: tensor + self.std * torch.randn(tensor.shape, generator=generator).to(tensor)
            for name, tensor in released.items()
        }


@dataclass(frozen=True)
class Sign:
    """Share the signs only (signSGD; Bernstein et al., ICML 2018): -1, 0 or 1 in every entry."""

    def apply(self, released: Tensors, generator: torch.Generator) -> Tensors:
        """The signs."""
        return {name: tensor.sign() for name, tensor in released.items()}


@dataclass(frozen=True)
class TopK:
    """Keep the given share of the entries, those of largest magnitude over all tensors; the rest become 0."""

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise BadInput(f"The share of entries that is kept lies in (0, 1], not at {self.share:g}.")

    def apply(self, released: Tensors, generator: torch.Generator) -> Tensors:
        """The sparse gradients."""
        sizes = torch.cat([tensor.flatten(1).abs() for tensor in released.values()], dim=1)  # (n, entries)
        keep = max(round(self.share * sizes.shape[1]), 1)
        least: Tensor = sizes.kthvalue(sizes.shape[1] - keep + 1, dim=1).values  # (n,)
        return {
            name: torch.where(tensor.abs() >= least.view(-1, *[1] * (tensor.dim() - 1)), tensor, 0)
            for name, tensor in released.items()
        }


LEAKS = {"none": None, "sign": Sign(), "top-k": TopK(0.01)}  # what learned attacks are tried on, beside noise
