"""What somebody sees who is given a trained model: its weights, and perhaps those that training started from."""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from gradleak.errors import NotObserved
from gradleak.observations.fully_connected import FullyConnected, Target, cone, grams
from gradleak.observations.observation import Gradient, Item, check_fits
from gradleak.observations.tensors import Tensors

STATIONARY = 0.5  # KKT residual at the true data above which training ended too early


@dataclass(frozen=True)
class Stationarity:
    """How far training went.

    epochs         gradient steps on the full batch
    loss           mean cross entropy at the end
    gradient_norm  of that loss, Euclidean over all parameters
    kkt_residual   min over lambda >= 0 of ||W - sum_i lambda_i y_i df(x_i)/dW|| / ||W|| at the true data, for the first
                   layer, bias included (of later ones the start stays visible: it is not small)
    """

    epochs: int
    loss: float
    gradient_norm: float
    kkt_residual: float


@dataclass(frozen=True, kw_only=True)
class Weights(Gradient):
    """The parameters of a trained network. `released` are the parameters themselves, and `model` is the trained one.

    initial       {name: tensor} that training started from, or None
    weight_decay  of the training: 0 for none, None when it is not known
    stationarity  what the owner says of the training, or None
    """

    initial: Tensors | None = field(default=None, repr=False)
    weight_decay: float | None = None
    stationarity: Stationarity | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial is not None:
            check_fits(self.initial, self.model)

    def network(self) -> FullyConnected:
        """The trained network, layer by layer; NotObserved when it is not a fully connected ReLU network."""
        parameters = {**self.model.parameters, **self.released}
        return FullyConnected.of(self.model.module, parameters, self.model.architecture.input_shape)

    def learned(self) -> FullyConnected:
        """What training made of what it trained: the change where the start is known, else the parameters themselves."""
        start = self.initial
        made = {name: tensor if start is None else tensor - start[name] for name, tensor in self.released.items()}
        return FullyConnected.of(self.model.module, made, self.model.architecture.input_shape)

    def target(self, layers: tuple[float, ...] = ()) -> Target:
        """What the samples have to add up to; of biases that were not trained nothing is asked."""
        if self.initial is None and len(self.released) == len(self.model.parameters):
            return Target(layers=layers)
        learned = self.learned()
        return Target(learned.weights, learned.biases, layers)

    def simulate(self, images: Tensor, labels: Tensor) -> Tensors:
        """sum_i lambda_i y_i df(x_i)/dtheta with the lambda >= 0 that explain the parameters best, plus the start if known.

        What weights must be at a point where training on (images, labels) makes no more progress, up to numbers that
        nobody reveals (Haim et al. 2022, equation 4). Not differentiable: `fully_connected.distance` is.
        """
        network, target = self.network(), self.target()
        x, C = network.margins(images, labels)
        coefficients = cone(*grams(network, x, C, target))
        made = network.combination(x, coefficients[:, None] * C)
        start = self.initial or {}
        return {name: made[name] + start[name] if name in start else made[name] for name in self.released}

    def as_gradient(self) -> Tensors:
        """NotObserved: weights hold no gradient."""
        raise NotObserved("What was released are trained weights, which hold no gradient: the attack kkt reads them.")

    def threat_model(self) -> list[Item]:
        """The rows of a gradient, what training started from, and what is known of it."""
        kept = [row for row in super().threat_model() if row["item"] not in ("loss", "released")]
        s = self.stationarity
        told = (
            "" if s is None else f"loss {s.loss:.1e}, gradient {s.gradient_norm:.1e}, KKT residual {s.kkt_residual:.2f}"
        )
        decay = "to be guessed" if self.weight_decay is None else f"{self.weight_decay:g}"
        rows: list[Item] = [
            {
                "item": "released",
                "revealed": True,
                "detail": f"Weights: {len(self.released)} tensors in {self.precision}",
            },
            {"item": "loss", "revealed": True, "detail": "cross entropy over the full batch"},
            {"item": "initial parameters", "revealed": self.initial is not None, "detail": ""},
            {"item": "weight decay", "revealed": self.weight_decay is not None, "detail": decay},
            {"item": "stationarity", "revealed": s is not None, "detail": told},
        ]
        return [*rows, *kept]

    def to(self, where: torch.device | torch.dtype) -> Self:
        """The same observation on another device, or in another floating-point precision."""
        initial = None if self.initial is None else {name: tensor.to(where) for name, tensor in self.initial.items()}
        return replace(super().to(where), initial=initial)
