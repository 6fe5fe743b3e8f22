"""What the attacker sees: a model, what was done with it before something was shared, and the tensors that were shared.

`observation.simulate(inputs, labels)` answers the one question every attack asks: what would have been released, had the
secret been these? It is a pure function of tensors, so torch.func can differentiate and vectorise it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from gradleak.errors import BadInput, NotObserved
from gradleak.modalities.language_models import LanguageArchitecture
from gradleak.modalities.modality import Fact, fact
from gradleak.modalities.networks import Architecture
from gradleak.observations.adapter import Adapter
from gradleak.observations.defenses import Defense, defended, deviations, seen_through
from gradleak.observations.distances import relative_residual
from gradleak.observations.given import fitted
from gradleak.observations.mechanism import Mechanism
from gradleak.observations.model import A, Model
from gradleak.observations.release import Release, Reservation, Sketch, check_finite
from gradleak.observations.releases import GRADIENT
from gradleak.observations.tensors import Tensors, rounding

R = TypeVar("R", bound=Release)


@dataclass(frozen=True, kw_only=True)
class Observation(Generic[A]):
    """A closed type: a field that was not revealed is None, and there is no ground truth in here.

    model       the model at the moment of the release
    release     what was done: Gradient, Update, Adapter, Weights
    released    the tensors that were shared, by name
    batch_size  number of private inputs, or None
    labels      (batch,) int64 class indices; of a masked language model (batch, longest); or None
    read_labels (batch,) labels that were read with the help of public data, for attacks that know no better; or None
    precision   the number format in which it was released, e.g. "float32", "float16"
    defenses    what the victim did to the tensors before sharing them; None where that is not known
    factor      what was released is so many times what the release says: of a sum in place of a mean, a loss scale, clipping, or
                of the other sign
    beside      names of tensors that were shared too and are not read: BatchNorm's statistics, parameters that were not trained

    `released` may be given as people hold it: numpy arrays, names as DataParallel or torch.compile leave them, a list in the order
    of state_dict or of the parameters, None for parameters that were not trained, buffers among them.
    """

    model: Model[A]
    release: Release = GRADIENT
    released: Tensors = field(repr=False)
    batch_size: int | None = None
    labels: Tensor | None = None
    read_labels: Tensor | None = None
    precision: str = "float32"
    defenses: tuple[Defense, ...] | None = ()
    factor: float = 1.0
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor):
            raise BadInput(f"What was released is some number of times the release, not {self.factor:g} times.")
        self._fit()
        if not self.released:
            raise BadInput("Nothing was released: there is nothing to attack.")
        self.release.check(self.model, self.released)
        check_finite(self.released)

    def _fit(self) -> None:
        """Name what was released as the model does, and say in which number format it was."""
        formats = {getattr(tensor, "dtype", None) for tensor in values_of(self.released)}
        short = formats & {torch.float16, torch.bfloat16}
        released, beside = fitted(self.released, self.release.names(self.model), self.model.module, self.model.frozen)
        still = [name for name in released if name in self.model.frozen and not bool(released[name].any())]
        object.__setattr__(self, "released", {name: t for name, t in released.items() if name not in still})
        object.__setattr__(self, "beside", (*self.beside, *beside, *still))
        if short and self.precision == "float32":
            object.__setattr__(self, "precision", str(short.pop()).removeprefix("torch."))

    def expect(self, kind: type[R]) -> R:
        """The release, which has to be of this kind; NotObserved when it is of another."""
        if not isinstance(self.release, kind):
            raise NotObserved(f"This needs {a(kind.name)}, and what was released is {a(self.release.name)}.")
        return self.release

    @property
    def name(self) -> str:
        """For records and sentences."""
        return self.release.name

    @property
    def adapter(self) -> Adapter:
        """The release of an adapter; NotObserved when it is of another kind."""
        return self.expect(Adapter)

    def simulate(self, inputs: Any, labels: Tensor | None) -> Tensors:
        """What would have been released, had the secret been these, as it compares with what was released: through the defenses that
        are known, where something certain can be said of them."""
        return seen_through(self.undefended(inputs, labels), self.released, self.defenses or ())

    def undefended(self, inputs: Any, labels: Tensor | None) -> Tensors:
        """What would have been released, had the secret been these; before any defense."""
        return scaled(self.release.simulate(self.model, self.released, inputs, labels), self.factor)

    def noise(self) -> Tensors:
        """{name: the deviation of each number of `released` from `simulate` of the secret}: what known defenses have added, where `seen` does
        not take it away already, and rounding to the number format. White within each tensor. Where nobody knows the defenses, the
        rounding alone."""
        added = deviations(self.released, [defense for defense in self.defenses or () if not defense.reads])
        precision = getattr(torch, self.precision)
        kept = {n: rounding(t.reshape(1, -1).cpu(), precision)[0].to(t) for n, t in self.released.items()}
        return {name: torch.hypot(left, added[name].to(left)) if name in added else left for name, left in kept.items()}

    def residual(self, inputs: Any, labels: Tensor | None) -> float:
        """||simulate(inputs, labels) - released|| / ||released||, Euclidean over all released tensors."""
        return float(relative_residual(self.simulate(inputs, labels), self.released))

    def as_gradient(self) -> Tensors:
        """The released tensors in units of a gradient of the loss; NotObserved where they hold none."""
        return self.release.as_gradient(self.model, self._unscaled())

    def sketches(self, modules: Sequence[str] | None = None) -> list[Sketch]:
        """What was told of the gradient of each layer's weight: of these modules, or of all."""
        noise = scaled(deviations(self.released, self.defenses or ()), 1 / abs(self.factor))
        return self.release.sketches(self.model, self._unscaled(), self.precision, modules, noise)

    def after(self) -> Tensors | None:
        """The parameters of the model that training changed, as it left them; None where nothing was trained."""
        return self.release.after(self.model, self._unscaled())

    def ends(self) -> tuple[Tensors | None, Tensors | None]:
        """What training changed, as it began and as it ended; None for what is not known."""
        return self.release.ends(self.model, self._unscaled())

    def descended(self) -> Tensors:
        """theta_0 - theta_T of what training changed, up to a factor above zero; NotObserved where that is not known."""
        return self.release.descended(self.model, self._unscaled())

    def _unscaled(self) -> Tensors:
        return scaled(self.released, 1 / self.factor)

    def reservations(self) -> list[Reservation]:
        """What speaks against relying on the release, as (name, level, sentence)."""
        return self.release.reservations(self.model, self.released)

    def of_others(self, inputs: Any, labels: Tensor | None, draw: int = 0) -> Self:
        """The same release, made of somebody else's data, under the same defenses: it says nothing of the secret. draw: the seed of noise."""
        released = {name: tensor.detach() for name, tensor in self.undefended(inputs, labels).items()}
        defenses = [defense.bound(self.model, inputs) for defense in self.defenses or ()]
        released = defended(released, defenses, torch.Generator().manual_seed(draw))
        known: dict[str, Any] = {k: None if getattr(self, k) is None else labels for k in ("labels", "read_labels")}
        return replace(self, released=released, **known)

    def alone(self) -> "dict[int, Observation[A]]":
        """{round: what was seen in it}, of several rounds of one client (rounds.py); else it is one round."""
        return {1: self}

    def one_step(self) -> Self:
        """The same after one of its steps: by it a simulation is timed."""
        return replace(self, release=self.release.one_step())

    def privacy(self) -> Mechanism | str | None:
        """The differentially private training behind it, as the release tells it."""
        return self.release.privacy()

    def withheld(self) -> list[str]:
        """The trained parameters of which nothing was shared."""
        told = {*self.released, *self.beside}
        return [name for name in self.release.names(self.model) if name not in {*told, *self.model.frozen}]

    def threat_model(self) -> list[Fact]:
        """One row per thing the attacker may know, made from the fields: what it is, whether it was revealed, how."""
        model, architecture = self.model, self.model.architecture
        detail = f"{self.release.name}: {len(self.released)} tensors in {self.precision}"
        detail += f", and {len(self.beside)} that are not read ({self.beside[0]}, ...)" if self.beside else ""
        if withheld := self.withheld():
            detail += f", and nothing of {', '.join(withheld[:3])}{', ...' if len(withheld) > 3 else ''}"
        factor = [] if self.factor == 1 else [fact("factor", False, f"found: {self.factor:g}")]
        size = str(self.batch_size) if self.batch_size else "to be guessed"
        labels = "given" if self.labels is not None else architecture.labels_detail()
        defenses = "unknown" if self.defenses is None else ", ".join(map(str, self.defenses)) or "none"
        return [
            fact("released", True, detail),
            *factor,
            *architecture.facts(self.labels),
            *model.facts(),
            *self.release.facts(),
            fact("batch size", self.batch_size is not None, size),
            fact("labels", self.labels is not None, labels),
            fact("defenses", self.defenses is not None, defenses),
            fact(architecture.secret, False, "the secret"),
        ]

    def to(self, where: torch.device | torch.dtype) -> Self:
        """The same observation on another device, or in another floating-point precision."""
        known = {name: getattr(self, name) for name in ("labels", "read_labels")}
        if isinstance(where, torch.device):
            known = {name: None if labels is None else labels.to(where) for name, labels in known.items()}
        released = {name: tensor.to(where) for name, tensor in self.released.items()}
        return replace(self, model=self.model.to(where), release=self.release.to(where), released=released, **known)


PictureObservation = Observation[Architecture]
TextObservation = Observation[LanguageArchitecture]


def a(name: str) -> str:
    """The name of a release with its article: a gradient, an update, weights."""
    return name if name.endswith("s") else f"an {name}" if name[0] in "aeiou" else f"a {name}"


def values_of(released: Any) -> Iterable[Any]:
    """The arrays of a mapping, or of a list."""
    return released.values() if isinstance(released, Mapping) else released


def scaled(tensors: Tensors, factor: float) -> Tensors:
    """Each tensor times the factor."""
    return tensors if factor == 1 else {name: factor * tensor for name, tensor in tensors.items()}
