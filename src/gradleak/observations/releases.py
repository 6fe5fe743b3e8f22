"""What was done to the parameters of a model before something was shared. RELEASES lists every kind there is.

A release knows what is public of the training and answers, for a model and the tensors that were released: what would have been
released, had the secret been this (`simulate`); which gradient that is (`as_gradient`); what it tells of each layer's gradient
(`sketches`). It holds no model and no secret. Its fields are plain data or named tensors, and are written to files as they are.
"""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.func import grad

from gradleak.errors import BadInput, NotObserved
from gradleak.modalities.modality import Fact, by, fact
from gradleak.observations.fully_connected import FullyConnected, Target, cone, grams
from gradleak.observations.layers import is_linear, oriented
from gradleak.observations.model import Model
from gradleak.observations.starts import why_unknown
from gradleak.observations.tensors import Tensors, flatten, rounding
from gradleak.observations.training import Recipe, Undone, other_recipes, train

UNSURE = 0.02  # of a gradient's length: as much as bfloat16 leaves
UNEVEN = 2.0  # the rounding of a gradient follows its columns: such noise ends later than white noise


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
    """

    name: ClassVar[str]
    replays: ClassVar[bool] = True
    sketched: ClassVar[bool] = False
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
        self, model: Model[Any], released: Tensors, precision: str, modules: Collection[str] | None
    ) -> list[Sketch]:
        """What is told of each layer's gradient; of these modules, or of all."""
        return []

    def after(self, model: Model[Any], released: Tensors) -> Tensors | None:
        """The parameters of the model that training changed, as it left them; None where nothing was trained."""
        return None

    def others(self, model: Model[Any], released: Tensors, simulated: Tensors) -> list["Release"]:
        """It under other beliefs about the training; simulated: what this one gives of some data."""
        return []

    def inexact(self) -> str:
        """Why what is read off as a gradient is not exactly one, or nothing."""
        return ""

    def reservations(self, model: Model[Any], released: Tensors) -> list[Reservation]:
        """What speaks against relying on it, as (name, level, sentence)."""
        return []

    def facts(self) -> list[Fact]:
        """Rows of the threat model."""
        return []

    def to(self, where: torch.device | torch.dtype) -> Self:
        """The same on another device, or in another precision."""
        return self


@dataclass(frozen=True, kw_only=True)
class Gradient(Release):
    """The gradient of the loss over one private batch (federated SGD, gradient accumulation, a debug dump).

    What is released is {parameter name: gradient}; parameters may be missing (frozen, or not shared).

    undone  the step of an optimizer that the gradient was read from, or None
    """

    name: ClassVar[str] = "gradient"

    undone: Undone | None = None

    def simulate(self, model: Model[Any], released: Tensors, inputs: Any, labels: Tensor | None) -> Tensors:
        """dL/dtheta of this batch."""
        gradient: Tensors = grad(model.loss)({name: model.parameters[name] for name in released}, inputs, labels)
        return gradient

    def as_gradient(self, model: Model[Any], released: Tensors) -> Tensors:
        """What was released."""
        return released

    def sketches(
        self, model: Model[Any], released: Tensors, precision: str, modules: Collection[str] | None
    ) -> list[Sketch]:
        """The gradients of linear layers' weights; the noise is the rounding to a format shorter than float32."""
        sketches = []
        for module, tensor in linear_weights(model, released, modules):
            noise = (
                None if precision in ("float32", "float64") else UNEVEN * rounding(tensor, getattr(torch, precision))
            )
            sketches.append(Sketch(module, "right", tensor, None, noise))
        return sketches

    def inexact(self) -> str:
        """A step of an optimizer that was undone, where that leaves much of the gradient's length unknown."""
        return inexactly_undone(self.undone)

    def reservations(self, model: Model[Any], released: Tensors) -> list[Reservation]:
        """That a step was undone."""
        return [] if self.undone is None else [("step_undone", "warning", self.undone.sentence())]

    def facts(self) -> list[Fact]:
        """The step that was undone."""
        return [] if self.undone is None else [fact("step", True, f"{self.undone.recipe}; undone")]


@dataclass(frozen=True, kw_only=True)
class Update(Release):
    """What a client of federated averaging sends: parameters after local training minus parameters before.

    recipe  of the local training, over the private inputs in their order, in chunks of its batch size, starting over at the
            end (McMahan et al. 2017, ClientUpdate, without shuffling)
    """

    name: ClassVar[str] = "update"

    recipe: Recipe

    def simulate(self, model: Model[Any], released: Tensors, inputs: Any, labels: Tensor | None) -> Tensors:
        """theta_k - theta_0 after the local steps, unrolled, differentiable."""
        before = {name: model.parameters[name] for name in released}
        after = train(model.loss, before, inputs, labels, self.recipe)
        return {name: after[name] - before[name] for name in before}

    @property
    def unit(self) -> float:
        """What turns the change into the mean of the local gradients of SGD."""
        return -1 / (self.recipe.learning_rate * self.recipe.steps)

    def as_gradient(self, model: Model[Any], released: Tensors) -> Tensors:
        """-released / (learning rate x steps) without the weight decay: exact for one step, else a mean of the local gradients."""
        decay = self.recipe.decay
        return {name: self.unit * t - decay * model.parameters[name] for name, t in released.items()}

    def others(self, model: Model[Any], released: Tensors, simulated: Tensors) -> list[Release]:
        """Other recipes."""
        others = other_recipes(self.recipe, {n: model.parameters[n] for n in released}, released, simulated)
        return [replace(self, recipe=recipe) for recipe in others]

    def sketches(
        self, model: Model[Any], released: Tensors, precision: str, modules: Collection[str] | None
    ) -> list[Sketch]:
        """As of a gradient; a difference of parameters carries the rounding of the parameters, that of every step."""
        sketches = []
        for sketch in Gradient().sketches(model, released, precision, modules):
            weight = oriented(model, sketch.module, model.parameters[f"{sketch.module}.weight"])
            noise = rounding(weight, torch.float32) * self.recipe.steps**0.5
            noise = noise if sketch.noise is None else torch.hypot(noise, sketch.noise)
            measured = self.unit * sketch.measured - self.recipe.decay * weight
            sketches.append(replace(sketch, measured=measured, noise=abs(self.unit) * noise))
        return sketches

    def after(self, model: Model[Any], released: Tensors) -> Tensors | None:
        """theta_0 + released."""
        return {name: model.parameters[name] + change for name, change in released.items()}

    def inexact(self) -> str:
        """More than one step, or Adam."""
        return inexact(self.recipe)

    def facts(self) -> list[Fact]:
        """The recipe of the local training."""
        return [fact("local training", True, str(self.recipe))]


SMALLEST, LARGEST = 1e-6, 1e6  # the scaling of an adapter
UNKNOWN = Recipe(learning_rate=1.0, steps=1)  # what is assumed of an adapter that comes without its recipe


Origin = Literal["given", "recovered", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Adapter(Release):
    """A LoRA adapter beside its base model (Hu et al. 2021, arXiv:2106.09685): a layer computes (W + s B A) x.

    What is released is {MODULE.lora_A (r, in) or MODULE.lora_B (out, r): its change during training}, of a convolution
    (r, in, k, k) and (out, r, 1, 1), as PEFT stores them; only factors whose start is known.

    start     {MODULE.lora_A and MODULE.lora_B, for every adapted module: where training started}. PEFT's default starts B at
              zero; where A's start is unknown, it is taken to be the released A, which is exact for one step
    origin    how the start is known: given (the adapter before training), recovered (from the seed that drew it, or from the
              base model's weights), unknown
    seed      the seed that drew it, where that was recovered
    tried     how many seeds were tried in vain
    init      what PEFT's config says of the start (init_lora_weights), or ""
    scaling   {module: s}, alpha / r, or alpha / sqrt(r) (rslora)
    recipe    how it was trained, or None: one SGD step is then assumed, and only directions can be told
    dropout   probability with which inputs of the adapter may have been dropped in training; the masks are not known
    gradient  whether what was released is the gradient of the factors, and not their change in training
    undone    the step of an optimizer that this gradient was read from, or None

    Of what was trained beside the factors: `beside` names parameters that began as the model has them, and are trained along; `held` what
    is not trained along; `known_at_end` parameters that the model has as training left them. `remarks` are reservations of the reader's.
    """

    name: ClassVar[str] = "adapter"
    sketched: ClassVar[bool] = True

    start: Tensors = field(repr=False)
    scaling: dict[str, float] = field(repr=False)
    recipe: Recipe | None = None
    dropout: float = 0.0
    gradient: bool = False
    undone: Undone | None = None
    origin: Origin = "unknown"
    seed: int | None = None
    tried: int = 0
    init: str = ""
    beside: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    known_at_end: tuple[str, ...] = ()
    remarks: tuple[Reservation, ...] = ()

    def names(self, model: Model[Any]) -> Tensors:
        """Its factors."""
        return self.start

    def check(self, model: Model[Any], released: Tensors) -> None:
        """BadInput naming the first module whose factors do not fit the model, or factor whose change does not fit it."""
        if not self.scaling:
            raise BadInput("The adapter changes no module.")
        if not 0 <= self.dropout < 1:
            raise BadInput(f"Dropout has a probability below 1, not {self.dropout:g}.")
        for module, s in self.scaling.items():
            if not SMALLEST <= abs(s) <= LARGEST:
                raise BadInput(f"The adapter of {module} is scaled by {s:g}: no adapter is.")
            if missing := [f for f in ("lora_A", "lora_B") if f"{module}.{f}" not in self.start]:
                raise BadInput(f"The adapter of {module} has no {missing[0]}: both factors at the start are needed.")
            A, B, weight = self.start[f"{module}.lora_A"], self.start[f"{module}.lora_B"], f"{module}.weight"
            if weight not in model.parameters:
                raise BadInput(f"The adapter changes {module}, which has no weight in the base model.")
            product_shape, shape = (*B.shape[:1], *A.shape[1:]), oriented(model, module, model.parameters[weight]).shape
            if B.shape[1:2] != A.shape[:1] or product_shape != shape or not A.numel() or B.shape[2:].numel() != 1:
                raise BadInput(
                    f"The adapter of {module} makes a weight of {by(product_shape)}, the base model's is {by(shape)}: "
                    "they do not belong together."
                )
        for name, tensor in released.items():
            if name not in self.start or tensor.shape != self.start[name].shape:
                raise BadInput(f"The change of {name} does not have the shape of its start.")
        if missing := [name for name in self.beside if name not in model.parameters]:
            raise BadInput(f"{missing[0]} is said to be trained beside the adapter, and is no parameter of the model.")
        check_finite(self.start)

    def simulate(self, model: Model[Any], released: Tensors, inputs: Any, labels: Tensor | None) -> Tensors:
        """The change of the released factors after training on these, unrolled, differentiable; or their gradient.

        Without a recipe the learning rate is unknown: the change is brought to the length of what was released.
        """
        recipe = self.recipe or UNKNOWN
        # In one step no factor meets the other's change: those that are not released need no gradient.
        alone = recipe.steps == 1 or self.gradient
        before = {name: self.start[name] for name in (released if alone else self.start)}
        before |= {} if alone else {name: model.parameters[name] for name in self.beside}

        def loss(factors: Tensors, inputs: Any, labels: Tensor | None) -> Tensor:
            return self.loss(model, factors, inputs, labels)

        if self.gradient:
            gradient: Tensors = grad(loss)(before, inputs, labels)
            return gradient
        after = train(loss, before, inputs, labels, recipe)
        change = {name: after[name] - before[name] for name in released}
        if self.recipe is not None:
            return change
        size, wanted = (flatten(tensors).square().sum() for tensors in (change, released))
        ratio = wanted / size.clamp_min(torch.finfo(size.dtype).tiny)
        scale = torch.where((size > 0) & (wanted > 0), ratio, 1.0).sqrt()
        return {name: scale * tensor for name, tensor in change.items()}

    def loss(self, model: Model[Any], factors: Tensors, inputs: Any, labels: Tensor | None) -> Tensor:
        """The base model's loss with the adapter in place."""
        return model.loss(self.merged(model, factors), inputs, labels)

    def merged(self, model: Model[Any], factors: Tensors) -> Tensors:
        """{module.weight: W + s B A}, with `factors` in place of those at the start."""
        known, weights = {**self.start, **factors}, {name: factors[name] for name in self.beside if name in factors}
        for module, s in self.scaling.items():
            change = s * product(known[f"{module}.lora_A"], known[f"{module}.lora_B"])
            weights[f"{module}.weight"] = model.parameters[f"{module}.weight"] + oriented(model, module, change)
        return weights

    def sketches(
        self, model: Model[Any], released: Tensors, precision: str, modules: Collection[str] | None
    ) -> list[Sketch]:
        """One equation per released factor: exact for one SGD step, else a mean over the steps."""
        recipe = self.recipe or UNKNOWN
        sketches = []
        for module, s in self.scaling.items():
            if modules is not None and module not in modules:
                continue
            unit = 1 / s if self.gradient else -1 / (recipe.learning_rate * recipe.steps * s)
            A, B = (self.start[f"{module}.{factor}"].flatten(1) for factor in ("lora_A", "lora_B"))
            if f"{module}.lora_B" in released and bool(A.any()):
                sketches.append(Sketch(module, "right", unit * released[f"{module}.lora_B"].flatten(1), A))
            if f"{module}.lora_A" in released and bool(B.any()):
                sketches.append(Sketch(module, "left", unit * released[f"{module}.lora_A"].flatten(1).T, B.T))
        return sketches

    def as_gradient(self, model: Model[Any], released: Tensors) -> Tensors:
        """{module.weight: the gradient of least norm that explains its sketch}: M = S (F F^T)^-1 F."""
        sketches = sorted(self.sketches(model, released, "float32", None), key=lambda s: s.side)  # B's change stays
        if not sketches:
            raise NotObserved(
                "The adapter measures no gradient: the other factor of each that is released starts at zero."
            )
        return {
            f"{s.module}.weight": weight_shaped(model, s, s.measured @ torch.linalg.pinv(s.through).T) for s in sketches
        }

    def ended(self, released: Tensors) -> Tensors:
        """{factor: its value after training}, of every factor."""
        left = decay(self.recipe)  # of a factor whose start is unknown
        changes = {name: released[name] if name in released else (left - 1) * t for name, t in self.start.items()}
        return {name: self.start[name] + change for name, change in changes.items()}

    def begun(self, released: Tensors, start: Tensors, origin: Origin, seed: int | None = None) -> tuple[Self, Tensors]:
        """The same release with another start of all factors, and the changes of all of them from there."""
        changes = {name: tensor - start[name] for name, tensor in self.ended(released).items()}
        return replace(self, start=start, origin=origin, seed=seed), changes

    def after(self, model: Model[Any], released: Tensors) -> Tensors | None:
        """W + s B A of the adapted layers, where training changed the factors."""
        if self.gradient:
            return None
        return self.merged(model, {name: self.start[name] + change for name, change in released.items()})

    def inexact(self) -> str:
        """Dropout, an unknown recipe, more than one step, Adam; nothing for one step of SGD from a known start."""
        if self.dropout > 0:
            return f"it may have been trained with dropout {self.dropout:g}, whose masks nobody knows"
        if self.known_at_end:
            return f"{self.known_at_end[0]} is known only as training left it"
        if self.gradient:
            return inexactly_undone(self.undone)
        if self.held and self.recipe is not None and self.recipe.steps > 1:
            return f"{self.held[0]} changed in training too, and is held as it was"
        return "its recipe is unknown, one step of SGD is assumed" if self.recipe is None else inexact(self.recipe)

    def reservations(self, model: Model[Any], released: Tensors) -> list[Reservation]:
        """Where it is no exact linear sketch of one gradient; and what a known start gives away."""
        told: list[Reservation] = [*self.remarks]
        if self.origin == "recovered":
            known = f"Seed {self.seed} draws" if self.seed is not None else "The weights of the base model give"
            sentence = f"{known} the adapter as it was before training: what training changed of A lies in the span "
            told.append(("seed", "warning", f"{sentence}of what its layers were fed with."))
        if self.origin == "unknown" and not self.gradient and (reason := why_unknown(self.init, self.tried)):
            told.append(("no_seed", "info", f"Where training began is not known: {reason}."))
        if self.undone is not None:
            told.append(("step_undone", "warning", self.undone.sentence()))
        if reason := self.inexact():
            told.append(("not_exact", "warning", f"The adapter is no exact linear sketch of one gradient: {reason}."))
        return told

    def facts(self) -> list[Fact]:
        """The ranks and the recipe."""
        ranks = sorted({tensor.shape[0] for name, tensor in self.start.items() if name.endswith("lora_A")})
        rank = f"{len(self.scaling)} modules of rank {', '.join(map(str, ranks))}"
        recipe = "one SGD step assumed; only directions are compared" if self.recipe is None else str(self.recipe)
        if self.gradient:
            recipe = f"{self.undone.recipe}; undone" if self.undone else "none: gradients of the factors"
        facts = [fact("adapter", True, rank), fact("recipe", self.recipe is not None or self.gradient, recipe)]
        if not self.gradient:
            facts.append(fact("initial adapter", self.origin != "unknown", self.beginning()))
        return facts

    def beginning(self) -> str:
        """How the start is known, in words."""
        if self.origin == "recovered":
            source = "the base model's weights give it" if self.seed is None else f"seed {self.seed} draws it"
            return f"recovered: {source}"
        return {"given": "given", "unknown": "unknown: taken to be where training ended"}[self.origin]

    def to(self, where: torch.device | torch.dtype) -> Self:
        """The start on another device, or in another precision."""
        return replace(self, start={name: tensor.to(where) for name, tensor in self.start.items()})


STATIONARY = 0.5  # KKT residual at the true data above which training ended too early


@dataclass(frozen=True)
class Stationarity:
    """How far training went.

    epochs         gradient steps on the full batch
    loss           mean cross entropy at the end
    gradient_norm  of that loss, Euclidean over all parameters
    kkt_residual   min over lambda >= 0 of ||W - sum_i lambda_i y_i df(x_i)/dW|| / ||W|| at the true data, for the first
                   layer, bias included. Later layers still show where they started, which is not small
    """

    epochs: int
    loss: float
    gradient_norm: float
    kkt_residual: float


@dataclass(frozen=True, kw_only=True)
class Weights(Release):
    """The parameters of a trained network. The model of the observation is the trained one; they hold no gradient.

    initial       {name: tensor} that training started from, or None
    weight_decay  of the training: 0 for none, None when it is not known
    stationarity  what the owner says of the training, or None
    """

    name: ClassVar[str] = "weights"
    replays: ClassVar[bool] = False

    initial: Tensors | None = field(default=None, repr=False)
    weight_decay: float | None = None
    stationarity: Stationarity | None = None

    def check(self, model: Model[Any], released: Tensors) -> None:
        """BadInput naming the first tensor, now or at the start, that is no parameter of this model."""
        check_parameters(model, released)
        if self.initial is not None:
            if missing := [name for name in released if name not in self.initial]:
                raise BadInput(f"The start lacks {missing[0]}, which was released: it is of another model.")
            check_parameters(model, self.initial)

    def network(self, model: Model[Any], released: Tensors) -> FullyConnected:
        """The trained network, layer by layer; NotObserved when it is not a fully connected ReLU network."""
        return FullyConnected.of(model.module, {**model.parameters, **released}, model.architecture.input_shape)

    def learned(self, model: Model[Any], released: Tensors) -> FullyConnected:
        """What training made of what it trained: the change where the start is known, else the parameters themselves."""
        start = self.initial
        change = {name: tensor if start is None else tensor - start[name] for name, tensor in released.items()}
        return FullyConnected.of(model.module, change, model.architecture.input_shape)

    def target(self, model: Model[Any], released: Tensors, layers: tuple[float, ...] = ()) -> Target:
        """What the samples have to add up to; biases that were not trained count for nothing."""
        if self.initial is None and len(released) == len(model.parameters):
            return Target(layers=layers)
        learned = self.learned(model, released)
        return Target(learned.weights, learned.biases, layers)

    def simulate(self, model: Model[Any], released: Tensors, inputs: Any, labels: Tensor | None) -> Tensors:
        """sum_i lambda_i y_i df(x_i)/dtheta with the lambda >= 0 that explain the parameters best, plus the start if known.

        What weights must be at a point where training on these makes no more progress, up to numbers that nobody reveals
        (Haim et al. 2022, equation 4). Not differentiable: `fully_connected.distance` is.
        """
        if labels is None:
            raise BadInput("Trained weights are simulated from inputs with their labels.")
        network, target = self.network(model, released), self.target(model, released)
        x, C = network.margins(inputs, labels)
        coefficients = cone(*grams(network, x, C, target))
        sums = network.combination(x, coefficients[:, None] * C)
        start = self.initial or {}
        return {name: sums[name] + start[name] if name in start else sums[name] for name in released}

    def as_gradient(self, model: Model[Any], released: Tensors) -> Tensors:
        """NotObserved: weights hold no gradient."""
        raise NotObserved("What was released are trained weights, which hold no gradient: the attack kkt reads them.")

    def after(self, model: Model[Any], released: Tensors) -> Tensors | None:
        """The parameters themselves."""
        return released

    def inexact(self) -> str:
        """Training that ended too early."""
        done = self.stationarity
        if done is None or done.kkt_residual <= STATIONARY:
            return ""
        return f"at the true data {done.kkt_residual:.2f} of the first layer is unexplained"

    def reservations(self, model: Model[Any], released: Tensors) -> list[Reservation]:
        """Whether the theory of trained weights applies: a homogeneous network, near stationarity."""
        reasons: list[Reservation] = []
        try:
            homogeneous = self.network(model, released).homogeneous
        except NotObserved:  # no attack reads these weights, and each says so
            return []
        if not homogeneous:
            sentence = "The network has biases after its first layer: it is not homogeneous, as the theory asks for."
            reasons.append(("not_homogeneous", "warning", sentence))
        if reason := self.inexact():
            reasons.append(("not_stationary", "warning", f"The training is not near stationarity: {reason}."))
        return reasons

    def facts(self) -> list[Fact]:
        """What training started from, and what is known of it."""
        s = self.stationarity
        stationarity = (
            "" if s is None else f"loss {s.loss:.1e}, gradient {s.gradient_norm:.1e}, KKT residual {s.kkt_residual:.2f}"
        )
        decay = "to be guessed" if self.weight_decay is None else f"{self.weight_decay:g}"
        return [
            fact("initial parameters", self.initial is not None, ""),
            fact("weight decay", self.weight_decay is not None, decay),
            fact("stationarity", s is not None, stationarity),
        ]

    def to(self, where: torch.device | torch.dtype) -> Self:
        """The start on another device, or in another precision."""
        initial = None if self.initial is None else {name: tensor.to(where) for name, tensor in self.initial.items()}
        return replace(self, initial=initial)


GRADIENT = Gradient()
RELEASES: dict[str, type[Release]] = {kind.name: kind for kind in (Gradient, Update, Adapter, Weights)}


def product(A: Tensor, B: Tensor) -> Tensor:
    """B A in the shape of the layer's weight: (out, in) or (out, in, k, k)."""
    return (B.flatten(1) @ A.flatten(1)).view(len(B), *A.shape[1:])


def decay(recipe: Recipe | None) -> float:
    """What AdamW's weight decay has left of a parameter that had no gradient."""
    if recipe is None or recipe.optimizer != "adamw":
        return 1.0
    if recipe.learning_rate * recipe.decay >= 1:
        raise BadInput(f"At a learning rate of {recipe.learning_rate:g}, the weight decay of AdamW leaves nothing.")
    return float((1 - recipe.learning_rate * recipe.decay) ** recipe.steps)


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
