"""The weights of a trained network."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from gradleak.errors import BadInput, NotObserved
from gradleak.modalities.modality import Fact, fact
from gradleak.observations.fully_connected import FullyConnected, Target, cone, grams
from gradleak.observations.model import Model
from gradleak.observations.release import Release, Reservation, check_parameters
from gradleak.observations.tensors import Tensors

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

    def ends(self, model: Model[Any], released: Tensors) -> tuple[Tensors | None, Tensors | None]:
        """Where training started, if that is known, and the parameters themselves."""
        return None if self.initial is None else {name: self.initial[name] for name in released}, released

    def descended(self, model: Model[Any], released: Tensors) -> Tensors:
        """Initial parameters minus trained ones; NotObserved where those are not known."""
        if self.initial is None:
            raise NotObserved("Where the weights began is not known: the weights before training are needed.")
        return {name: self.initial[name] - tensor for name, tensor in released.items()}

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
