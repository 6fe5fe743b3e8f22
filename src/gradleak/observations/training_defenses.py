"""Defenses that change how something is trained: each is a field of the release, which `simulate` follows, and leaves nothing to be applied.

An attacker who knows it simulates it; one who does not simulates the usual training.
"""

from dataclasses import dataclass, fields, replace

from gradleak.errors import BadInput
from gradleak.observations.adapter import Adapter, decay
from gradleak.observations.defenses import Defense
from gradleak.observations.release import Release
from gradleak.observations.training import MOST

Parts = tuple[Release, tuple[Defense, ...]]


@dataclass(frozen=True)
class Clients(Defense):
    """Share only the mean over so many clients, each with as many samples (secure aggregation; Bonawitz et al., CCS 2017)."""

    clients: int

    def __post_init__(self) -> None:
        if not 1 <= self.clients <= MOST:
            raise BadInput(f"What is released is the mean over 1 to {MOST:,} clients, not over {self.clients}.")

    def training(self, release: Release, samples: int) -> Parts:
        """Of a gradient, an update or an adapter."""
        return with_field(release, self, clients=self.clients), ()

    def __str__(self) -> str:
        return f"the mean over {self.clients} clients"


@dataclass(frozen=True)
class MixUp(Defense):
    """Train on mixtures lambda x_i + (1 - lambda) x_j with both labels (Zhang et al., ICLR 2018, arXiv:1710.09412)."""

    kept: float

    def __post_init__(self) -> None:
        if not 0 < self.kept < 1:
            raise BadInput(f"Mix-up keeps a share between 0 and 1 of each sample, not {self.kept:g}.")

    def training(self, release: Release, samples: int) -> Parts:
        """Of a gradient, an update or an adapter."""
        return with_field(release, self, mixup=self.kept), ()

    def __str__(self) -> str:
        return f"mix-up, {self.kept:g} of each sample"


@dataclass(frozen=True)
class FrozenA(Defense):
    """Train B alone (FFA-LoRA; Sun et al., ICLR 2024, arXiv:2403.12313; LoRA-FA, Zhang et al. 2023, arXiv:2308.03303): A stays as it was
    drawn, so that its change tells nothing, and the start is there to be read."""

    def training(self, release: Release, samples: int) -> Parts:
        """Of an adapter, whose A is where it began."""
        frozen = with_field(release, self, frozen_a=True)
        if not isinstance(frozen, Adapter) or frozen.origin != "unknown":
            return frozen, ()
        left = decay(frozen.recipe)  # which the reader took to have shrunk A
        start = {k: (left * t.double()).to(t) if k.endswith("lora_A") else t for k, t in frozen.start.items()}
        return replace(frozen, start=start), ()

    def __str__(self) -> str:
        return "A is not trained"


@dataclass(frozen=True)
class LoraDropout(Defense):
    """Drop each input of the adapter with this probability in training (PEFT's lora_dropout). The masks are not shared: an attacker
    simulates their mean, which for a step from B = 0 is the step without dropout."""

    probability: float

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1:
            raise BadInput(f"Dropout has a probability between 0 and 1, not {self.probability:g}.")

    def training(self, release: Release, samples: int) -> Parts:
        """Of an adapter."""
        return with_field(release, self, dropout=self.probability), ()

    def __str__(self) -> str:
        return f"dropout of {self.probability:g} before the adapter"


def with_field(release: Release, defense: Defense, **known: object) -> Release:
    """The release with these fields; BadInput for one that has no such."""
    if not set(known) <= {field.name for field in fields(release)}:
        raise BadInput(f"This changes how something is trained, and says nothing about an {release.name}: {defense}.")
    return replace(release, **known)
