"""What a victim may do to a gradient before it is shared: frozen values with one method, apply(released, generator).

`released` is {name: (n, ...)}: n gradients, each of which is treated by itself, over all its tensors together. A defense of
your own needs `apply`, `random` and a str() for the threat model; DEFENSES lists those that files and flags know by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from gradleak.errors import BadInput
from gradleak.observations.tensors import Tensors

LARGEST_NOISE = 1e6


class Defense(Protocol):
    """What every defense is; random: whether it gives something else each time."""

    random: ClassVar[bool]

    def apply(self, released: Tensors, generator: torch.Generator) -> Tensors: ...


@dataclass(frozen=True)
class GaussianNoise:
    """Add N(0, std^2) to every entry; std in units of the gradient."""

    random: ClassVar[bool] = True

    std: float

    def __post_init__(self) -> None:
        if not 0 <= self.std <= LARGEST_NOISE:
            raise BadInput(f"Noise has a standard deviation between 0 and {LARGEST_NOISE:g}, not {self.std:g}.")

    def apply(self, released: Tensors, generator: torch.Generator) -> Tensors:
        """The noisy gradients."""
        return {
            name: tensor + self.std * torch.randn(tensor.shape, generator=generator).to(tensor)
            for name, tensor in released.items()
        }

    def __str__(self) -> str:
        return f"Gaussian noise of deviation {self.std:g}"


@dataclass(frozen=True)
class Sign:
    """Share the signs only (signSGD; Bernstein et al., ICML 2018): -1, 0 or 1 in every entry."""

    random: ClassVar[bool] = False

    def apply(self, released: Tensors, generator: torch.Generator) -> Tensors:
        """The signs."""
        return {name: tensor.sign() for name, tensor in released.items()}

    def __str__(self) -> str:
        return "signs only"


@dataclass(frozen=True)
class TopK:
    """Keep the given share of the entries, those of largest magnitude over all tensors; the rest become 0."""

    random: ClassVar[bool] = False

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

    def __str__(self) -> str:
        return f"the largest {100 * self.share:g} % of the entries"


DEFENSES: dict[str, type[GaussianNoise] | type[Sign] | type[TopK]] = {
    "gaussian-noise": GaussianNoise,
    "sign": Sign,
    "top-k": TopK,
}

Leak = Literal["none", "sign", "top-k"]  # what flags call the defenses without a number
SHARED = 0.01  # of the entries, by "top-k"


def chosen(leak: Leak, noise: float) -> tuple[Defense, ...]:
    """The defense that flags ask for; BadInput for two at once."""
    if noise and leak != "none":
        raise BadInput("Give --noise or --leak, not both.")
    if noise:
        return (GaussianNoise(noise),)
    if leak == "sign":
        return (Sign(),)
    return (TopK(SHARED),) if leak == "top-k" else ()


def defended(released: Tensors, defenses: Sequence[Defense], generator: torch.Generator) -> Tensors:
    """One release {name: tensor} after these defenses, one after the other."""
    one = {name: tensor[None] for name, tensor in released.items()}
    for defense in defenses:
        one = defense.apply(one, generator)
    return {name: tensor[0] for name, tensor in one.items()}
