"""What every kind of release answers, whatever was released."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from gradleak.errors import BadInput, NotObserved
from gradleak.modalities.modality import Fact, by
from gradleak.observations.layers import oriented
from gradleak.observations.mechanism import Mechanism
from gradleak.observations.model import Model
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import Recipe, Undone

UNSURE = 0.02  # of a gradient's length: as much as bfloat16 leaves

NOTHING: Tensors = {}
Reservation = tuple[str, Literal["info", "warning", "error"], str]  # name, level, sentence


@dataclass(frozen=True)
class Sketch:
    """What a release tells of the gradient of one layer's weight: the linear equation S = M F^T.

    module    the layer whose weight it is
    side      "right": M = G (out, in), F = A, from B's change; "left": M = G^T (in, out), F = B^T, from A's change
    measured  S (rows of M, rank), in units of a gradient
    factor    F (rank, columns of M), or None for the identity: then S is the gradient itself
    noise     deviation of each number of a row of S (rows,), where it is known beforehand; None where it is that of the
              number format
    """

    module: str
    side: Literal["right", "left"]
    measured: Tensor
    factor: Tensor | None = None
    noise: Tensor | None = None

    @property
    def through(self) -> Tensor:
        """The factor, where there is one; NotObserved for a whole gradient."""
        if self.factor is None:
            raise NotObserved(f"The gradient of {self.module} is there as a whole: there is no factor to look through.")
        return self.factor


class Release:
    """What every kind of release answers; where nothing stands here, each has to say it. Releases are frozen dataclasses.

    name      for files, records and sentences
    replays   whether `simulate` gives of the secret what was released, and not only up to unknown numbers
    sketched  whether less than the whole gradient is seen, so that one may ask what is left
    certain   of how many steps everybody knows that the private samples were in them
    """

    name: ClassVar[str]
    replays: ClassVar[bool] = True
    sketched: ClassVar[bool] = False
    certain: ClassVar[int] = 0
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def names(self, model: Model[Any]) -> Tensors:
        """{name: tensor} of what may be released."""
        return model.parameters

    def check(self, model: Model[Any], released: Tensors) -> None:
        """BadInput where the tensors are not those of such a release of this model: here, of trained parameters."""
        check_parameters(model, released)

    def simulate(self, model: Model[Any], released: Tensors, inputs: Any, labels: Tensor | None) -> Tensors:
        """What would have been released, had the secret been these; under the names of what was."""
        raise NotImplementedError

    def as_gradient(self, model: Model[Any], released: Tensors) -> Tensors:
        """{parameter: tensor} in units of a gradient of the loss; NotObserved where there is none."""
        raise NotImplementedError

    def sketches(
        self,
        model: Model[Any],
        released: Tensors,
        precision: str,
        modules: Collection[str] | None,
        noise: Tensors = NOTHING,
    ) -> list[Sketch]:
        """What is told of each layer's gradient; of these modules, or of all. noise: {name: deviation that defenses have added to
        each entry of what was released}, where it is known."""
        return []

    def after(self, model: Model[Any], released: Tensors) -> Tensors | None:
        """The parameters of the model that training changed, as it left them; None where nothing was trained."""
        return None

    def loss(self, model: Model[Any], tensors: Tensors, inputs: Any, labels: Tensor | None) -> Tensor:
        """The loss that training minimised, as a function of what it changed."""
        return model.loss(self.merged(model, tensors), inputs, labels)

    def merged(self, model: Model[Any], tensors: Tensors) -> Tensors:
        """{parameter: tensor} of the model, where these stand for what training changed."""
        return tensors

    def ends(self, model: Model[Any], released: Tensors) -> tuple[Tensors | None, Tensors | None]:
        """What training changed, as it began and as it ended; None for what is not known."""
        return {name: model.parameters[name] for name in released}, None

    def descended(self, model: Model[Any], released: Tensors) -> Tensors:
        """theta_0 - theta_T of what training changed, up to a factor above zero: where gradients of the private samples pointed at the
        start. NotObserved where the start is not known. Here, of a gradient: what was released."""
        return released

    def others(self, model: Model[Any], released: Tensors, simulated: Tensors) -> list["Release"]:
        """It under other beliefs about the training; simulated: what this one gives of some data."""
        return []

    def shuffled(self, samples: int) -> list["Release"]:
        """It with the samples of its training shuffled by the usual seeds."""
        return []

    def privacy(self) -> Mechanism | str | None:
        """The differentially private training that it is the result of; a sentence why there is no epsilon although it looks like one; None
        of other trainings."""
        return None

    def steps(self) -> int:
        """Gradients that a simulation takes one after the other."""
        return 1

    def one_step(self) -> Self:
        """The same after one of these steps: by it a simulation is timed."""
        return self

    def inexact(self) -> str:
        """Why what is read off as a gradient is not exactly one, or nothing."""
        return ""

    def guessed(self) -> bool:
        """Whether `simulate` stands on a training that nobody told."""
        return False

    def reservations(self, model: Model[Any], released: Tensors) -> list[Reservation]:
        """What speaks against relying on it, as (name, level, sentence)."""
        return []

    def facts(self) -> list[Fact]:
        """Rows of the threat model."""
        return []

    def to(self, where: torch.device | torch.dtype) -> Self:
        """The same on another device, or in another precision."""
        return self


def noisier(known: Tensor | None, added: Tensor | None, rows: Tensor) -> Tensor | None:
    """The deviation of each row (rows,) of a matrix of which both may be known: added by a defense, one number."""
    if added is None:
        return known
    added = added.to(rows).expand(len(rows))
    return added if known is None else torch.hypot(known, added)


def inexactly_undone(step: Undone | None) -> str:
    """Why a gradient that was read from a step is not exactly one, or nothing."""
    return (
        f"{step.error:.0%} of its length is not known after the step was undone" if step and step.error > UNSURE else ""
    )


def inexact(recipe: Recipe) -> str:
    """Why a change by this recipe is not exactly a gradient, or nothing."""
    if recipe.optimizer in ("adam", "adamw"):
        return f"{recipe.optimizer} keeps little of a gradient but its signs"
    return f"{recipe.steps} steps were taken, and their mean stands in" if recipe.steps > 1 else ""


def weight_shaped(model: Model[Any], sketch: Sketch, M: Tensor) -> Tensor:
    """A sketch's unknown M as a gradient of its module's weight."""
    weight = model.parameters[f"{sketch.module}.weight"]
    G = M if sketch.side == "right" else M.T
    return oriented(model, sketch.module, G) if weight.ndim == 2 else G.reshape(weight.shape)


def check_parameters(model: Model[Any], tensors: Tensors) -> None:
    """BadInput naming the first tensor that is no trained parameter of the model, or has another shape."""
    for name, tensor in tensors.items():
        parameter = model.parameters.get(name)
        if parameter is None or name in model.frozen:
            raise BadInput(f"Released tensor {name} {by(tensor.shape)} is not a trained parameter of the model.")
        if tensor.shape != parameter.shape:
            sizes = f"{by(tensor.shape)} in the release and {by(parameter.shape)} in the model"
            raise BadInput(f"Released tensor {name} is {sizes}: it was taken from another architecture.")


def check_finite(tensors: Tensors) -> None:
    """BadInput naming the first tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise BadInput(
                f"Released tensor {name} has entries that are NaN or infinite: nothing can be learnt from it."
            )
