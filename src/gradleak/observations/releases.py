"""What was done to the parameters of a model before something was shared. RELEASES lists every kind there is.

A release knows what is public of the training and answers, for a model and the tensors that were released: what would have been
released, had the secret been this (`simulate`); which gradient that is (`as_gradient`); what it tells of each layer's gradient
(`sketches`). It holds no model and no secret. Its fields are plain data or named tensors, and are written to files as they are.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import grad

from gradleak.errors import BadInput
from gradleak.modalities.modality import Fact, fact
from gradleak.observations.adapter import Adapter
from gradleak.observations.layers import is_linear, oriented
from gradleak.observations.mechanism import Mechanism
from gradleak.observations.mixed import Mixed
from gradleak.observations.model import Model
from gradleak.observations.private_step import PrivateStep
from gradleak.observations.release import NOTHING, Release, Reservation, Sketch, inexact, inexactly_undone, noisier
from gradleak.observations.tensors import Tensors, rounding
from gradleak.observations.trained_weights import Weights
from gradleak.observations.training import Recipe, Undone, other_recipes, shuffled_recipes, train

UNEVEN = 2.0  # the rounding of a gradient follows its columns: such noise ends later than white noise


@dataclass(frozen=True, kw_only=True)
class Gradient(Mixed):
    """The gradient of the loss over one private batch (federated SGD, gradient accumulation, a debug dump).

    What is released is {parameter name: gradient}; parameters may be missing (frozen, or not shared).

    undone   the step of an optimizer that the gradient was read from, or None
    private  what differentially private training did to it, noise apart, or None
    """

    name: ClassVar[str] = "gradient"
    certain: ClassVar[int] = 1

    undone: Undone | None = None
    private: PrivateStep | None = None

    def check(self, model: Model[Any], released: Tensors) -> None:
        """As every release; BadInput for a private step on samples that stand together, which it takes one by one."""
        self.check_mixed()
        if self.private is not None and (self.clients > 1 or self.mixup < 1):
            raise BadInput("DP-SGD takes samples one by one: it goes with neither mix-up nor a mean over clients here.")
        super().check(model, released)

    def simulate(self, model: Model[Any], released: Tensors, inputs: Any, labels: Tensor | None) -> Tensors:
        """dL/dtheta of this batch; of a private step, the sum of what is left of each sample's."""
        parameters = {name: model.parameters[name] for name in released}
        if self.private is not None:
            return self.private.gradient(model, parameters, inputs, labels)
        of_client = partial(grad(self.objective(model.loss)), parameters)
        gradient: Tensors = self.over_clients(of_client, inputs, labels)
        return gradient if self.undone is None else self.undone.of(gradient)

    def as_gradient(self, model: Model[Any], released: Tensors) -> Tensors:
        """What was released."""
        return released

    def sketches(
        self,
        model: Model[Any],
        released: Tensors,
        precision: str,
        modules: Collection[str] | None,
        noise: Tensors = NOTHING,
    ) -> list[Sketch]:
        """The gradients of linear layers' weights; the noise is the rounding to a format shorter than float32."""
        sketches = []
        for module, tensor in linear_weights(model, released, modules):
            short = precision not in ("float32", "float64")
            known = UNEVEN * rounding(tensor, getattr(torch, precision)) if short else None
            known = noisier(known, noise.get(f"{module}.weight"), tensor)
            sketches.append(Sketch(module, "right", tensor, None, known))
        return sketches

    def inexact(self) -> str:
        """A step of an optimizer that was undone, where that leaves much of the gradient's length unknown."""
        return inexactly_undone(self.undone)

    def privacy(self) -> Mechanism | str | None:
        """That of the private step, and of those before it."""
        return None if self.private is None else self.private.mechanism()

    def reservations(self, model: Model[Any], released: Tensors) -> list[Reservation]:
        """That a step was undone; that clients are taken to be alike."""
        undone: list[Reservation] = [("step_undone", "warning", self.undone.sentence())] if self.undone else []
        return [*undone, *self.alike(1, linear=True)]

    def facts(self) -> list[Fact]:
        """The step that was undone, or what made it private; who stands together in it."""
        undone = [] if self.undone is None else [fact("step", True, f"{self.undone.recipe}; undone")]
        return [*undone, *(self.private.facts() if self.private is not None else []), *self.mixed_facts()]


@dataclass(frozen=True, kw_only=True)
class Update(Mixed):
    """What a client of federated averaging sends: parameters after local training minus parameters before.

    recipe  of the local training, over the private inputs in their order, in chunks of its batch size, starting over at the
            end (McMahan et al. 2017, ClientUpdate), shuffled where the recipe says so
    """

    name: ClassVar[str] = "update"

    recipe: Recipe

    def check(self, model: Model[Any], released: Tensors) -> None:
        """BadInput for no client, and as for every release."""
        self.check_mixed()
        super().check(model, released)

    def simulate(self, model: Model[Any], released: Tensors, inputs: Any, labels: Tensor | None) -> Tensors:
        """theta_k - theta_0 after the local steps, unrolled, differentiable."""
        before = {name: model.parameters[name] for name in released}

        def of_client(inputs: Any, labels: Tensor | None) -> Tensors:
            after = train(self.objective(model.loss), before, inputs, labels, self.recipe)
            return {name: after[name] - before[name] for name in before}

        return self.over_clients(of_client, inputs, labels)

    @property
    def unit(self) -> float:
        """What turns the change into the mean of the local gradients of SGD."""
        return -1 / self.recipe.path

    def as_gradient(self, model: Model[Any], released: Tensors) -> Tensors:
        """-released / (learning rate x steps) without the weight decay: exact for one step, else a mean of the local gradients."""
        decay = self.recipe.decay
        return {name: self.unit * t - decay * model.parameters[name] for name, t in released.items()}

    def others(self, model: Model[Any], released: Tensors, simulated: Tensors) -> list[Release]:
        """Other recipes."""
        others = other_recipes(self.recipe, {n: model.parameters[n] for n in released}, released, simulated)
        return [replace(self, recipe=recipe) for recipe in others]

    def sketches(
        self,
        model: Model[Any],
        released: Tensors,
        precision: str,
        modules: Collection[str] | None,
        noise: Tensors = NOTHING,
    ) -> list[Sketch]:
        """As of a gradient; a difference of parameters carries the rounding of the parameters, that of every step."""
        sketches = []
        for sketch in Gradient().sketches(model, released, precision, modules, noise):
            weight = oriented(model, sketch.module, model.parameters[f"{sketch.module}.weight"])
            known = rounding(weight, torch.float32) * self.recipe.steps**0.5
            known = known if sketch.noise is None else torch.hypot(known, sketch.noise)
            measured = self.unit * sketch.measured - self.recipe.decay * weight
            sketches.append(replace(sketch, measured=measured, noise=abs(self.unit) * known))
        return sketches

    def after(self, model: Model[Any], released: Tensors) -> Tensors | None:
        """theta_0 + released."""
        return {name: model.parameters[name] + change for name, change in released.items()}

    def shuffled(self, samples: int) -> list[Release]:
        """Of a training in several batches, with these shuffled."""
        return [replace(self, recipe=recipe) for recipe in shuffled_recipes(self.recipe, samples // self.clients)]

    def reservations(self, model: Model[Any], released: Tensors) -> list[Reservation]:
        """That clients of an average are taken to be alike."""
        linear = self.recipe.optimizer in ("sgd", "momentum") and self.recipe.clip is None
        return self.alike(self.recipe.steps, linear)

    def ends(self, model: Model[Any], released: Tensors) -> tuple[Tensors | None, Tensors | None]:
        """theta_0, and theta_0 + released."""
        return {name: model.parameters[name] for name in released}, self.after(model, released)

    def descended(self, model: Model[Any], released: Tensors) -> Tensors:
        """-released."""
        return {name: -change for name, change in released.items()}

    def steps(self) -> int:
        """Those of the recipe."""
        return self.recipe.steps

    def one_step(self) -> "Update":
        """The same with a recipe of one step."""
        return replace(self, recipe=replace(self.recipe, steps=1))

    def inexact(self) -> str:
        """More than one step, or Adam."""
        return inexact(self.recipe)

    def facts(self) -> list[Fact]:
        """The recipe of the local training, and who stands together."""
        return [fact("local training", True, str(self.recipe)), *self.mixed_facts()]


GRADIENT = Gradient()
RELEASES: dict[str, type[Release]] = {kind.name: kind for kind in (Gradient, Update, Adapter, Weights)}


def linear_weights(model: Model[Any], released: Tensors, modules: Collection[str] | None) -> list[tuple[str, Tensor]]:
    """(module, its released weight as (out, in)) of the linear layers; of these modules, or of all."""
    layers: dict[str, nn.Module] = dict(model.module.named_modules())
    weights = []
    for name, tensor in released.items():
        module = name.removesuffix(".weight")
        wanted = name.endswith(".weight") and tensor.ndim == 2 and (modules is None or module in modules)
        if wanted and module in layers and is_linear(layers[module]):
            weights.append((module, oriented(model, module, tensor)))
    return weights
