"""Several rounds of one client: what it shared of the same private data, each time at other global weights.

K rounds are K times as many equations for the same unknowns, and where noise was added, K draws of it: an average of K shrinks it by sqrt(K).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from gradleak.errors import BadInput, NotObserved
from gradleak.modalities.modality import Fact, fact
from gradleak.observations.mechanism import Mechanism
from gradleak.observations.model import A
from gradleak.observations.observation import Observation
from gradleak.observations.release import Reservation, Sketch
from gradleak.observations.tensors import Tensors

SHARED = ("batch_size", "labels", "read_labels")  # what is known of the private data, which are the same in each round


@dataclass(frozen=True, kw_only=True)
class Rounds(Observation[A]):
    """One observation that is all of them at once: `simulate` and `noise` are each round's own, under the names "ROUND: TENSOR".

    each  {round: what was seen of the client in it}; model and release are those of the first, for what all have in common

    What reads a gradient off one model state gets the rounds one by one (`alone`); here there is no such gradient.
    """

    each: Mapping[int, Observation[A]] = field(repr=False)

    def __post_init__(self) -> None:
        """Each round has been checked by itself."""

    @classmethod
    def of(cls, each: Mapping[int, Observation[A]]) -> Self:
        """Raises BadInput where fewer than two rounds are given, or where they cannot be of the same data: another model, another kind of
        release, another number of samples, other labels."""
        if len(each) < 2:
            raise BadInput(f"{len(each)} round is nothing to put together: give two or more.")
        first, *others = each.items()
        for number, other in others:
            if what := difference(first[1], other):
                raise BadInput(f"Round {number} has {what} than round {first[0]}: they are not joined.")
        known = {part.name: getattr(first[1], part.name) for part in fields(Observation)}
        known["released"] = joined({number: one.released for number, one in each.items()})
        known["beside"] = ()
        known["factor"] = 1.0
        for name in SHARED:
            known[name] = next((v for one in each.values() if (v := getattr(one, name)) is not None), None)
        return cls(**known, each=dict(each))

    @property
    def name(self) -> str:
        """For records and sentences."""
        return f"{self.release.name} in rounds {self.numbers}"

    @property
    def numbers(self) -> str:
        """Which rounds these are: "1, 3 and 7"."""
        *most, last = map(str, self.each)
        return f"{', '.join(most)} and {last}"

    def alone(self) -> dict[int, Observation[A]]:
        """Each round by itself, with what all of them tell of the private data."""
        told: dict[str, Any] = {name: getattr(self, name) for name in SHARED}
        return {number: replace(one, **told) for number, one in self.each.items()}

    def without(self, *numbers: int) -> Observation[A]:
        """The other rounds; BadInput where fewer than two are left."""
        told: dict[str, Any] = {name: getattr(self, name) for name in SHARED}
        return replace(Rounds.of({n: one for n, one in self.each.items() if n not in numbers}), **told)

    def simulate(self, inputs: Any, labels: Tensor | None) -> Tensors:
        """What each round would have released, had the secret been these."""
        return joined({number: one.simulate(inputs, labels) for number, one in self.each.items()})

    def undefended(self, inputs: Any, labels: Tensor | None) -> Tensors:
        """The same before any defense."""
        return joined({number: one.undefended(inputs, labels) for number, one in self.each.items()})

    def noise(self) -> Tensors:
        """That of each round."""
        return joined({number: one.noise() for number, one in self.each.items()})

    def as_gradient(self) -> Tensors:
        """NotObserved: each round has its own."""
        raise NotObserved("Several rounds have several gradients, each at weights of its own.")

    def sketches(self, modules: Any = None) -> list[Sketch]:
        """NotObserved, as for gradients."""
        raise NotObserved("Several rounds tell of several gradients, each at weights of its own.")

    def one_step(self) -> Self:
        """Each round with one step of its training: by it a simulation is timed."""
        return replace(self, each={number: one.one_step() for number, one in self.each.items()})

    def after(self) -> Tensors | None:
        """Nothing that all rounds have."""
        return None

    def ends(self) -> tuple[Tensors | None, Tensors | None]:
        """Nothing that all rounds have."""
        return None, None

    def descended(self) -> Tensors:
        """NotObserved, as for gradients."""
        return self.as_gradient()

    def reservations(self) -> list[Reservation]:
        """Those of all rounds, each once."""
        return list(dict.fromkeys(said for one in self.each.values() for said in one.reservations()))

    def of_others(self, inputs: Any, labels: Tensor | None, draw: int = 0) -> Self:
        """The same rounds of somebody else's data, each with a draw of noise of its own."""
        draws = {number: one.of_others(inputs, labels, draw + number) for number, one in self.alone().items()}
        return type(self).of(draws)

    def privacy(self) -> Mechanism | str | None:
        """The private training up to the last round; its accountant composes the rounds, and the samples were in each of them for sure."""
        every = [one.privacy() for one in self.each.values()]
        counted = [one for one in every if isinstance(one, Mechanism)]
        if not counted or len(counted) < len(every):
            return next((one for one in every if not isinstance(one, Mechanism)), None)
        if len({(one.noise_multiplier, one.sample_rate, one.delta) for one in counted}) > 1:
            return "The noise differs from round to round: what they spend together is not counted here."
        steps = max(max(one.steps for one in counted), len(counted))
        return replace(counted[0], steps=steps, certain=len(counted))

    def withheld(self) -> list[str]:
        """Those of the first round."""
        return next(iter(self.each.values())).withheld()

    def threat_model(self) -> list[Fact]:
        """That of the first round, and which rounds there are."""
        first, *rest = next(iter(self.alone().values())).threat_model()
        said = f"{len(self.each)} of one client, {self.numbers}: the same private data at other weights each time"
        return [first, fact("rounds", True, said), *rest]

    def to(self, where: torch.device | torch.dtype) -> Self:
        """The same on another device, or in another precision."""
        each = {number: one.to(where) for number, one in self.alone().items()}
        first = next(iter(each.values()))
        known: dict[str, Any] = {name: getattr(first, name) for name in ("model", "release", "labels", "read_labels")}
        return replace(self, each=each, released=joined({n: one.released for n, one in each.items()}), **known)


def joined(each: Mapping[int, Tensors]) -> Tensors:
    """The tensors of all rounds."""
    return {f"{number}: {name}": tensor for number, tensors in each.items() for name, tensor in tensors.items()}


def difference(a: Observation[Any], b: Observation[Any]) -> str:
    """What differs between two rounds that cannot differ between two rounds of the same data; or nothing."""
    sizes = {one.batch_size for one in (a, b) if one.batch_size is not None}
    labels = [one.labels.sort().values for one in (a, b) if one.labels is not None and one.labels.ndim == 1]
    known = {
        "another model": a.model.architecture != b.model.architecture,
        "another mode": a.model.mode != b.model.mode,
        "another loss": a.model.criterion != b.model.criterion,
        "another kind of release": type(a.release) is not type(b.release),
        "another defense": a.defenses != b.defenses,
        "other masks": getattr(a.model.architecture, "task", None) == "masked-lm",  # drawn anew for each step
        "another number of samples": len(sizes) > 1,
        "other labels": len(labels) > 1 and not torch.equal(*labels),
    }
    return next((what for what, differs in known.items() if differs), "")
