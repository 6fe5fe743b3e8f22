"""What every attack is."""

from typing import Any, ClassVar, NamedTuple, Protocol

import torch

from gradleak.attacks.reconstruction import Reconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import NotObserved
from gradleak.observations.observation import Observation, a
from gradleak.observations.release import Release
from gradleak.observations.rounds import Rounds

DERIVED = 3  # simulated releases that the gradient of one costs: a pass forth and a pass back through the graph of the first two
DOUBLE = 2  # times as much work and memory as float32, of float64


class Effort(NamedTuple):
    """What an attack is going to take, at most.

    simulations  in units of `observation.simulate` of a batch of its size
    together     what is held in memory at one time, in units of one step of that
    abreast      simulations besides, many at a time: what each costs is arithmetic alone
    algebra      floating-point operations besides, of products and factors of large matrices
    matrices     bytes of these
    """

    simulations: float
    together: float
    abreast: float = 0.0
    algebra: float = 0.0
    matrices: float = 0.0

    @classmethod
    def of_search(cls, observation: Observation[Any], gradients: float, rows: int = 1) -> "Effort":
        """Of so many gradients of simulations in each row, whose graphs hold all steps."""
        return cls(DERIVED * gradients * rows, DERIVED * rows * observation.release.steps())


class Attack(Protocol):
    """A frozen dataclass of hyperparameters with one call.

    sees      the kinds of release that it reads: whatever is not listed is refused
    modality  the kind of private data that it recovers

    An attack may have, besides:

    prepared(observation, public, *, generator) -> Self   what it makes of public data beforehand: a prior, a decoder, a zoo
    trained_on(inputs) -> int                             how many of these inputs it has seen in training
    effort(observation) -> Effort                         what it is going to take, if it searches or simulates much
    on_device                                             True: it computes where the observation lies; others stay on the CPU, in
                                                          float64 where they need it
    by_name_only                                          True: a bare audit leaves it out
    joint                                                 True: it asks the observation for `simulate` and `noise` alone, so that it takes several
                                                          rounds of one client as one; others get them one by one (round_by_round.py)
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


def placed(attack: Any, observation: Observation[Any], where: torch.device) -> Observation[Any]:
    """The observation where the attack is going to compute."""
    return observation.to(where if getattr(attack, "on_device", False) else torch.device("cpu"))


def check_sees(attack: Any, *observations: Observation[Any]) -> None:
    """NotObserved where the attack does not read one of these observations."""
    for observation in observations:
        if reason := refusal(attack, observation):
            raise NotObserved(reason)
        if isinstance(observation, Rounds) and not getattr(attack, "joint", False):
            raise NotObserved("It reads one round at a time.")
