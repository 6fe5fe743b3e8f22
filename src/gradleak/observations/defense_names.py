"""The defenses that files and flags know by name, and what flags say: `--defense top-k:0.1 --defense noise:0.01`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

from gradleak.errors import BadInput, near, shortened
from gradleak.observations.defenses import (
    Defense,
    GaussianNoise,
    Quantised,
    RelativeNoise,
    Sign,
    StochasticallyQuantised,
    TopK,
)
from gradleak.observations.private_step import ClippedNoise
from gradleak.observations.soteria import Soteria
from gradleak.observations.training_defenses import Clients, FrozenA, LoraDropout, MixUp
from gradleak.observations.truncation import TruncatedRank
from gradleak.observations.withheld_embeddings import WithheldEmbeddings

DEFENSES: dict[str, type[Defense]] = {
    "gaussian-noise": GaussianNoise,
    "relative-noise": RelativeNoise,
    "sign": Sign,
    "top-k": TopK,
    "bits": Quantised,
    "qsgd": StochasticallyQuantised,
    "soteria": Soteria,
    "dp-sgd": ClippedNoise,
    "svd": TruncatedRank,
    "clients": Clients,
    "mix-up": MixUp,
    "frozen-a": FrozenA,
    "lora-dropout": LoraDropout,
    "withheld-embeddings": WithheldEmbeddings,
}
ALIASES = {"noise": "gaussian-noise", "topk": "top-k"}
UNKNOWN = "unknown"


def named(text: str) -> Defense:
    """The defense that a flag names, NAME or NAME:NUMBER[:NUMBER]; BadInput for any other."""
    name, *numbers = text.split(":")
    kind = DEFENSES.get(ALIASES.get(name, name))
    if kind is None:
        close, known = near(name, [*DEFENSES, *ALIASES]), ", ".join(DEFENSES)
        raise BadInput(f"There is no defense {shortened(name)!r}{close} (defenses: {known}; {UNKNOWN} hides them).")
    wanted = fields(kind)  # type: ignore[arg-type]
    if len(numbers) != len(wanted):
        form = ":".join([name, *(field.name.upper() for field in wanted)])
        raise BadInput(f"The defense {name} is given as {form}, not as {shortened(text)!r}.")
    try:
        values = [int(n) if field.type in (int, "int") else float(n) for n, field in zip(numbers, wanted, strict=True)]
    except ValueError as error:
        raise BadInput(f"{shortened(text)!r} is no defense: what follows the name are numbers.") from error
    return kind(*values)


@dataclass(frozen=True)
class Chosen:
    """The defenses of flags, and whether the attacker is told."""

    defenses: tuple[Defense, ...]
    told: bool = True

    @classmethod
    def of(cls, texts: Sequence[str]) -> Self:
        """In the order of the flags; `unknown` as the last hides those before it. BadInput for what is none."""
        *others, last = [*texts] or [""]
        if UNKNOWN in others:
            raise BadInput(f"--defense {UNKNOWN} comes last: it says that the attacker is not told those before it.")
        told = last != UNKNOWN
        return cls(tuple(map(named, texts if told else others)), told)

    @property
    def known(self) -> tuple[Defense, ...] | None:
        """What the attacker knows of them."""
        return self.defenses if self.told else None
