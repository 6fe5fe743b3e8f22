"""What every attack is."""

from typing import Any, ClassVar, Protocol

import torch

from gradleak.attacks.reconstruction import Reconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import NotObserved
from gradleak.observations.observation import Observation, a
from gradleak.observations.release import Release


class Attack(Protocol):
    """A frozen dataclass of hyperparameters with one call.

    sees      the kinds of release that it reads: whatever is not listed is refused
    modality  the kind of private data that it recovers

    An attack may have, besides:

    prepared(observation, public, *, generator) -> Self   what it makes of public data beforehand: a prior, a decoder, a zoo
    trained_on(inputs) -> int                             how many of these inputs it has seen in training
    by_name_only                                          True: a bare audit leaves it out
    """

    sees: ClassVar[tuple[type[Release], ...]]
    modality: ClassVar[str]

    def __call__(
        self, observation: Any, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved, with the reason, when the observation lacks what the attack reads."""


def refusal(attack: Any, observation: Observation[Any]) -> str:
    """Why the attack does not read such an observation, as a sentence; nothing where it does."""
    modality, kind = observation.model.architecture.modality, observation.release
    if attack.modality != modality:
        return f"It recovers {attack.modality}, and the observed model takes {modality}."
    if not isinstance(kind, attack.sees):
        seen = " or ".join(a(release.name) for release in attack.sees)
        return f"It reads {seen}, and what was released is {a(kind.name)}."
    return ""


def check_sees(attack: Any, *observations: Observation[Any]) -> None:
    """NotObserved where the attack does not read one of these observations."""
    for observation in observations:
        if reason := refusal(attack, observation):
            raise NotObserved(reason)
