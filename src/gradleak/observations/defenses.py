"""What a victim may do to a release before it is shared, and what an attacker who knows it makes of that: frozen values.

`apply` is the defense: `released` is {name: (n, ...)}, n releases, each of which is treated by itself, over all its tensors together.
`seen` and `deviation` are the knowledge. What an attack compares with the release is `seen` of what it has simulated, and how
much noise the defense has left is `deviation`, so that every attack that replays or weighs uses what is known, and none has to
name a defense. A defense of your own derives from Defense, gives `apply` and a str() for the threat model, and whatever of the rest
differs; `defense_names.py` lists those that files and flags know by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.errors import BadInput
from gradleak.observations.model import Model
from gradleak.observations.release import Release
from gradleak.observations.tensors import Tensors

LARGEST_NOISE = 1e6
LARGEST_BITS = 16


class Defense:
    """What every defense answers; where nothing stands here, it has to say it.

    random  whether it gives something else each time
    exact   whether `apply` to what the truth gives is what was released; never of what is random
    reads   whether `seen` depends on what was released
    """

    random: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    reads: ClassVar[bool] = False

    def apply(self, released: Tensors, generator: torch.Generator) -> Tensors:
        """What is shared of these: {name: (n, ...)}."""
        raise NotImplementedError

    def seen(self, simulated: Tensors, released: Tensors) -> Tensors:
        """What an attacker who knows the defense compares with what was released; {name: (...)}, differentiable."""
        return simulated

    def deviation(self, released: Tensors) -> Tensors:
        """{name: standard deviation (a number) of what the defense has added to each entry}, where that is known."""
        return {}

    @property
    def blurs(self) -> bool:
        """Whether the truth gives something else than what was released."""
        return self.random or not self.exact

    def bound(self, model: Model[Any], inputs: Any) -> "Defense":
        """The defense of this private batch, where it depends on it."""
        return self

    def training(self, release: Release, samples: int) -> tuple[Release, "tuple[Defense, ...]"]:
        """The release, where the defense is a part of the training, and what is left of the defense to be applied."""
        return release, (self,)


@dataclass(frozen=True)
class GaussianNoise(Defense):
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

    def deviation(self, released: Tensors) -> Tensors:
        """std."""
        return {name: torch.tensor(self.std).to(tensor) for name, tensor in released.items()}

    def __str__(self) -> str:
        return f"Gaussian noise of deviation {self.std:g}"


@dataclass(frozen=True)
class RelativeNoise(Defense):
    """Add Gaussian noise whose norm is about this share of that of the whole release."""

    random: ClassVar[bool] = True

    share: float

    def __post_init__(self) -> None:
        if not 0 <= self.share <= LARGEST_NOISE:
            raise BadInput(f"The share of noise lies between 0 and {LARGEST_NOISE:g}, not at {self.share:g}.")

    def apply(self, released: Tensors, generator: torch.Generator) -> Tensors:
        """The noisy gradients."""
        std = self.share * rms(released)  # (n,)
        return {
            name: tensor + spread(std, tensor) * torch.randn(tensor.shape, generator=generator).to(tensor)
            for name, tensor in released.items()
        }

    def deviation(self, released: Tensors) -> Tensors:
        """||g + noise||^2 is (1 + share^2) ||g||^2, up to what random signs leave."""
        whole = rms({name: tensor[None] for name, tensor in released.items()})[0]
        std = self.share * whole / (1 + self.share**2) ** 0.5
        return {name: std.to(tensor) for name, tensor in released.items()}

    def __str__(self) -> str:
        return f"Gaussian noise of {100 * self.share:g} % of the norm"


@dataclass(frozen=True)
class Sign(Defense):
    """Share the signs only (signSGD; Bernstein et al., ICML 2018): -1, 0 or 1 in every entry."""

    def apply(self, released: Tensors, generator: torch.Generator) -> Tensors:
        """The signs."""
        return {name: tensor.sign() for name, tensor in released.items()}

    def seen(self, simulated: Tensors, released: Tensors) -> Tensors:
        """Signs with a slope, t / (|t| + mean |t|) of each tensor: a sign is the surer, the larger its number is."""
        return {name: t / (t.abs() + t.abs().mean().clamp_min(1e-30)) for name, t in simulated.items()}

    def __str__(self) -> str:
        return "signs only"


@dataclass(frozen=True)
class TopK(Defense):
    """Keep the given share of the entries, those of largest magnitude over all tensors; the rest become 0."""

    reads: ClassVar[bool] = True

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise BadInput(f"The share of entries that is kept lies in (0, 1], not at {self.share:g}.")

    def apply(self, released: Tensors, generator: torch.Generator) -> Tensors:
        """The sparse gradients."""
        sizes = torch.cat([tensor.flatten(1).abs() for tensor in released.values()], dim=1)  # (n, entries)
        keep = max(round(self.share * sizes.shape[1]), 1)
        least: Tensor = sizes.kthvalue(sizes.shape[1] - keep + 1, dim=1).values  # (n,)
        return {name: torch.where(t.abs() >= spread(least, t), t, 0) for name, t in released.items()}

    def seen(self, simulated: Tensors, released: Tensors) -> Tensors:
        """Entries that were kept, and how far the others are above the least that was."""
        kept = [t[t != 0].abs().min() for t in released.values() if bool(t.any())]
        least = float(torch.stack(kept).min()) if kept else 0.0
        return {name: torch.where(released[name] != 0, t, F.softshrink(t, least)) for name, t in simulated.items()}

    def __str__(self) -> str:
        return f"the largest {100 * self.share:g} % of the entries"


@dataclass(frozen=True)
class Quantised(Defense):
    """Share so many bits of each entry: a sign and 2^(bits - 1) - 1 steps up to the largest entry of its tensor, the nearest one."""

    reads: ClassVar[bool] = True

    bits: int

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= LARGEST_BITS:
            raise BadInput(f"A number is shared in 2 to {LARGEST_BITS} bits, not in {self.bits}.")

    @property
    def levels(self) -> int:
        """Steps from zero to the largest entry."""
        return int(2 ** (self.bits - 1) - 1)

    def steps(self, tensor: Tensor) -> Tensor:
        """One step of each of n tensors: (n,). Rounding keeps the largest entry, so that it is the same afterwards."""
        return tensor.flatten(1).abs().amax(1).clamp_min(torch.finfo(tensor.dtype).tiny) / self.levels

    def rounded(self, t: Tensor, generator: torch.Generator) -> Tensor:
        """Whole steps of numbers in steps."""
        return t.round()

    def apply(self, released: Tensors, generator: torch.Generator) -> Tensors:
        """Whole steps."""
        steps = {name: spread(self.steps(tensor), tensor) for name, tensor in released.items()}
        return {name: steps[name] * self.rounded(t / steps[name], generator) for name, t in released.items()}

    def seen(self, simulated: Tensors, released: Tensors) -> Tensors:
        """How far each number is outside of the half step that was rounded off, from what was shared."""
        half = {name: float(self.steps(tensor[None])[0]) / 2 for name, tensor in released.items()}
        return {name: released[name] + F.softshrink(t - released[name], half[name]) for name, t in simulated.items()}

    def deviation(self, released: Tensors) -> Tensors:
        """Of a number that is uniform within a step: step / sqrt 12."""
        return {name: self.steps(tensor[None])[0] / 12**0.5 for name, tensor in released.items()}

    def __str__(self) -> str:
        return f"{self.bits} bits of each entry"


@dataclass(frozen=True)
class StochasticallyQuantised(Quantised):
    """The same, but up or down at random, so that the mean is kept: QSGD (Alistarh et al., NeurIPS 2017, arXiv:1610.02132), scaled
    by the largest entry as in its section 5."""

    random: ClassVar[bool] = True
    reads: ClassVar[bool] = False

    def rounded(self, t: Tensor, generator: torch.Generator) -> Tensor:
        """Down, and one up with the probability of what is left over."""
        down = t.floor()
        up: Tensor = down + (torch.rand(t.shape, generator=generator).to(t) < t - down)
        return up.clamp(-self.levels, self.levels)  # the largest entry may be one rounding above its step

    def seen(self, simulated: Tensors, released: Tensors) -> Tensors:
        """The mean of what would have been shared."""
        return simulated

    def deviation(self, released: Tensors) -> Tensors:
        """step^2 p (1 - p), on average over p: a sixth; and not more than the release is large."""
        return {n: (self.steps(t[None])[0] / 6**0.5).minimum(t.square().mean().sqrt()) for n, t in released.items()}

    def __str__(self) -> str:
        return f"{self.bits} bits of each entry, at random up or down"


def rms(released: Tensors) -> Tensor:
    """The root mean square over all entries of each of n releases {name: (n, ...)}: (n,)."""
    numbers = sum(tensor[0].numel() for tensor in released.values())
    total = torch.stack([tensor.flatten(1).double().square().sum(1) for tensor in released.values()]).sum(0)
    return (total / numbers).sqrt()


def spread(numbers: Tensor, tensor: Tensor) -> Tensor:
    """(n,) numbers in the shape (n, 1, ...) and the format of a tensor (n, ...)."""
    return numbers.to(tensor).view(-1, *[1] * (tensor.dim() - 1))


def defended(released: Tensors, defenses: Sequence[Defense], generator: torch.Generator) -> Tensors:
    """One release {name: tensor} after these defenses, one after the other."""
    one = {name: tensor[None] for name, tensor in released.items()}
    for defense in defenses:
        one = defense.apply(one, generator)
    return {name: tensor[0] for name, tensor in one.items()}


def seen_through(simulated: Tensors, released: Tensors, defenses: Sequence[Defense]) -> Tensors:
    """What is compared with what was released, by an attacker who knows these defenses."""
    for defense in defenses:
        simulated = defense.seen(simulated, released)
    return simulated


def deviations(released: Tensors, defenses: Sequence[Defense]) -> Tensors:
    """{name: deviation of the noise that these defenses have left}; empty where they left none."""
    total: Tensors = {}
    for defense in defenses:
        for name, deviation in defense.deviation(released).items():
            total[name] = torch.hypot(total[name], deviation) if name in total else deviation
    return {name: deviation for name, deviation in total.items() if float(deviation) > 0}
