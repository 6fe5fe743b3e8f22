"""A network as a sequence of layers, together with the gradient that one picture left in it."""

import copy
import math
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor, nn

from gradleak.attacks.inverting_gradients import smooth_pictures
from gradleak.attacks.recursion.inverses import affine, is_affine
from gradleak.attacks.recursion.linear_systems import DENSE, Belief
from gradleak.attacks.recursion.residual import Residual
from gradleak.errors import NotObserved
from gradleak.observations.observation import PictureObservation
from gradleak.observations.sequence import joined, layers_of
from gradleak.observations.tensors import Tensors

RELATIVE = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11}  # half a last place; others: 2^-9
ABSOLUTE = {"float16": 2.0**-25}  # the same near zero
ARITHMETIC = 32  # errors made in computing a gradient: in last places, of numbers of the tensor's root mean square
PICTURES = 16  # random ones that show what is typical of each layer's input


@dataclass(frozen=True)
class Network:
    """All in float64.

    layers    (name, layer), in a sequence
    typical   the input of every layer for random smooth pictures, (pictures, ...)
    gradient  {parameter name: gradient}
    unit      half a last place of 1 in the format of the release
    smallest  half the smallest number of that format
    """

    layers: list[tuple[str, nn.Module]] = field(repr=False)
    typical: list[Tensor] = field(repr=False)
    gradient: Tensors = field(repr=False)
    unit: float
    smallest: float

    @classmethod
    def of(cls, observation: PictureObservation) -> Self:
        """Raises NotObserved unless it is the gradient of one picture in a sequence that ends in a biased linear layer."""
        if reason := observation.release.inexact():
            raise NotObserved(f"The recursion needs one exact gradient: {reason}.")
        if observation.batch_size is None:
            raise NotObserved("The batch size was withheld: the recursion has to know that there was one image only.")
        if observation.batch_size != 1:
            raise NotObserved(f"The batch has {observation.batch_size} images: the recursion is for one.")
        observation = observation.to(torch.device("cpu")).to(torch.float64)
        model = observation.model
        module = model.solid().requires_grad_(False)
        layers = [(name, Residual.of(layer) or layer) for name, layer in layers_of(module)]
        name, last = layers[-1]
        if not isinstance(last, nn.Linear):
            where = f"ends in {name}, a" if name else "is a"
            raise NotObserved(
                f"The model {where} {type(last).__name__}: the recursion needs a sequence of layers, the last one linear."
            )
        if f"{name}.bias" not in observation.released or f"{name}.weight" not in observation.released:
            raise NotObserved(f"No gradient of weight and bias of the last layer {name} was released: it is the start.")
        unit, smallest = RELATIVE.get(observation.precision, 2.0**-9), ABSOLUTE.get(observation.precision, 0.0)
        typical = _inputs(layers, smooth_pictures((PICTURES, *model.architecture.input_shape), _seeded()))
        return cls(layers, typical, observation.as_gradient(), unit, smallest)

    def inside(self, where: int) -> Self:
        """The branch of a residual block, as a network."""
        name, block = self.layers[where]
        layers = [(joined(name, part), layer) for part, layer in block.branch]  # type: ignore[union-attr]
        return replace(self, layers=layers, typical=_inputs(layers, self.typical[where]))

    def has_matrix(self, where: int) -> bool:
        """Whether the layer is a linear one or a convolution, plain and small enough to be solved for its input, or a
        residual block."""
        layer, shape = self.layers[where][1], self.typical[where].shape[1:]
        if isinstance(layer, Residual):
            return True
        if isinstance(layer, nn.Conv2d):
            plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
            return plain and not isinstance(layer.padding, str) and len(shape) == 3 and math.prod(shape[1:]) <= DENSE
        return isinstance(layer, nn.Linear) and len(shape) == 1

    def released(self, name: str, noise: float) -> Belief:
        """A parameter's gradient, flat from its second dimension on; of infinite variance where it was not released."""
        if name not in self.gradient:
            shape = dict(self.layers)[name.removesuffix(".weight")].weight.flatten(1).shape  # type: ignore[operator]
            return Belief(torch.zeros(shape).double(), torch.full(shape, torch.inf).double())
        g = self.gradient[name]
        g = g.flatten(1) if g.dim() > 1 else g
        return Belief(g, self.variance(g, noise))

    def variance(self, g: Tensor, noise: float) -> Tensor:
        """Of each entry of a released tensor: noise, rounding, and the arithmetic behind it."""
        rounding = ((self.unit * g).square() + self.smallest**2) / 3
        arithmetic = (ARITHMETIC * min(self.unit, RELATIVE["float32"])) ** 2 * g.square().mean()
        return (noise**2 + rounding + arithmetic).clamp_min(1e-60)

    def coarse(self, noise: float) -> bool:
        """Whether the release is so far from exact that a prior of pictures matters."""
        return noise > 0 or self.unit > 1e-6

    def prior(self, where: int) -> Belief:
        """Of a layer's input, flat: the mean of each channel, and one variance for all, doubled to be broad."""
        typical = self.typical[where]
        x = typical.flatten(2) if typical.dim() > 2 else typical[:, None]
        mean = x.mean((0, 2), keepdim=True)
        variance = 2 * (x - mean).square().mean().clamp_min(1e-12)
        return Belief(mean.expand(x[:1].shape).flatten(), variance.expand(typical[0].numel()))

    def scale(self, where: int) -> Tensor | None:
        """By what the layers before that one multiply each entry of a picture, (pixels,); None if they do more."""
        scale = torch.ones_like(self.typical[0][0])
        for _, layer in self.layers[:where]:
            if not is_affine(layer):
                return None
            scale = scale.flatten() if isinstance(layer, nn.Flatten) else scale * affine(layer)[0]
        return scale.flatten()


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _inputs(layers: list[tuple[str, nn.Module]], x: Tensor) -> list[Tensor]:
    """What goes into each layer after the other when x goes into the first."""
    x, inputs = x.float(), list[Tensor]()
    with torch.no_grad():
        for _, layer in layers:
            inputs.append(x.double())
            x = copy.deepcopy(layer).float()(x)
    return inputs
