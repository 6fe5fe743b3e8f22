"""The architectures that gradleak can build by name. They are public knowledge: the secret is what they were trained on.

Every model takes pixels in [0, 1], shape (batch, channel, height, width), and returns logits (batch, classes):
normalisation is its first layer, so that no attack ever has to know about it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradleak.errors import BadInput
from gradleak.modalities.linear_attention import with_linear_attention
from gradleak.modalities.modality import Fact, by, fact
from gradleak.modalities.own_code import named
from gradleak.modalities.pictures import LONGEST_SIDE, MOST_CLASSES, Pictures, png

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)


class Normalise(nn.Module):
    """(x - mean) / std per channel: CIFAR-10's constants for colour pictures, MNIST's for grey ones."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        mean, std = (MNIST_MEAN, MNIST_STD) if channels == 1 else (CIFAR_MEAN, CIFAR_STD)
        # Not persistent: constants of the architecture, known to everybody, not part of a state_dict.
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def lenet(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The sigmoid LeNet of Deep Leakage from Gradients: three 5x5 convolutions of 12 channels, uniform(-0.5, 0.5) start."""
    channels, height, width = shape
    features = 12 * -(-height // 4) * -(-width // 4)  # two convolutions of stride 2, each rounding up
    model = nn.Sequential(
        Normalise(channels),
        nn.Conv2d(channels, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, stride=2, padding=2),
        nn.Sigmoid(),
        nn.Conv2d(12, 12, 5, stride=1, padding=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(features, classes),
    )
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


def convnet64(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The ConvNet of Inverting Gradients at width 64: eight 3x3 convolutions with BatchNorm and ReLU, two 3x3 max-pools."""
    channels, height, width = shape
    if min(height, width) < 9:
        raise BadInput(
            f"convnet64 pools by 9 and cannot take pictures of {height}x{width}: choose another model or resize."
        )
    layers: list[nn.Module] = [Normalise(channels)]
    for out in (64, 128, 128, 256, 256, 256, None, 256, 256, None):
        if out is None:
            layers.append(nn.MaxPool2d(3))
            continue
        layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        channels = out
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * (height // 9) * (width // 9), classes))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut (He et al. 2016, basic block; projection where the shape changes)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


def resnet(blocks: tuple[int, ...], width: int) -> Callable[[tuple[int, int, int], int], nn.Module]:
    """A residual network for small pictures: 3x3 stem, one stage per entry of `blocks`, channels doubling from `width`."""

    def build(shape: tuple[int, int, int], classes: int) -> nn.Module:
        layers: list[nn.Module] = [Normalise(shape[0]), nn.Conv2d(shape[0], width, 3, 1, 1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
        for stage, depth in enumerate(blocks):
            for block in range(depth):
                out = width * 2**stage
                layers.append(ResidualBlock(channels, out, stride=2 if stage and not block else 1))
                channels = out
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))

    return build


def mlp(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Three biased linear layers of 256 ReLU units: the smallest model whose first layer gives its input away exactly."""
    channels, height, width = shape
    return nn.Sequential(
        Normalise(channels),
        nn.Flatten(),
        nn.Linear(channels * height * width, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, classes),
    )


class AgainstZero(nn.Module):
    """One logit z -> the two logits (0, z): their softmax cross entropy is the binary cross entropy of z."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(z), z], dim=1)


def mlp1000(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The D-1000-1000-1 ReLU network of Haim et al. (2022), with two classes and one output."""
    if classes != 2:
        raise BadInput(f"mlp1000 has one output and tells two classes apart, not {classes}.")
    channels, height, width = shape
    return nn.Sequential(
        Normalise(channels),
        nn.Flatten(),
        nn.Linear(channels * height * width, 1000),
        nn.ReLU(),
        nn.Linear(1000, 1000),
        nn.ReLU(),
        nn.Linear(1000, 1),
        AgainstZero(),
    )


def homogeneous1000(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The D-1000-1000-1 ReLU network of Haim et al. (2022): only the first layer has a bias, and starts at N(0, 1e-4^2).

    So it is homogeneous: all parameters times c make the output times c^3. More than two classes get an output each.
    """
    channels, height, width = shape
    first = nn.Linear(channels * height * width, 1000)
    for parameter in first.parameters():
        nn.init.normal_(parameter, std=1e-4)
    hidden, last = nn.Linear(1000, 1000, bias=False), nn.Linear(1000, 1 if classes == 2 else classes, bias=False)
    layers = [Normalise(channels), nn.Flatten(), first, nn.ReLU(), hidden, nn.ReLU(), last]
    return nn.Sequential(*layers, *([AgainstZero()] if classes == 2 else []))


def convnet(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Three convolutions with GELU, halving the picture twice, and a linear layer on all positions."""
    channels, height, width = shape
    return nn.Sequential(
        Normalise(channels),
        nn.Conv2d(channels, 64, 5, stride=2, padding=2),
        nn.GELU(),
        nn.Conv2d(64, 128, 3, stride=2, padding=1),
        nn.GELU(),
        nn.Conv2d(128, 128, 3, padding=1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(128 * -(-height // 4) * -(-width // 4), classes),  # two strides of 2, each rounding up
    )


class ImageTransformer(nn.Module):
    """An image classifier of the transformers library behind our first layer: pixels in [0, 1] -> logits."""

    def __init__(self, network: nn.Module, normalise: Normalise) -> None:
        super().__init__()
        self.normalise: Normalise = normalise
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=self.normalise(images)).logits
        return logits


def vit(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A vision transformer for small pictures: 64 patches, width 128, 4 blocks, 4 heads, eager attention, no dropout."""
    from transformers import ViTConfig, ViTForImageClassification

    channels, height, width = shape
    if height != width or height % 8:
        raise BadInput(f"vit cuts a square picture into 8x8 patches and cannot take {height}x{width}: resize it.")
    config = ViTConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=512,
        image_size=height,
        patch_size=height // 8,
        num_channels=channels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = classes
    config._attn_implementation = "eager"  # the fused kernels have no second derivative
    return ImageTransformer(ViTForImageClassification(config), Normalise(channels))


MODELS: dict[str, Callable[[tuple[int, int, int], int], nn.Module]] = {
    "lenet": lenet,
    "convnet64": convnet64,
    "resnet20": resnet((3, 3, 3), 16),
    "resnet20-4": resnet((3, 3, 3), 64),
    "resnet32-10": resnet((5, 5, 5), 160),
    "resnet18": resnet((2, 2, 2, 2), 64),
    "resnet18-16": resnet((2, 2, 2, 2), 16),  # as deep, a quarter as wide
    "mlp": mlp,
    "mlp1000": mlp1000,
    "homogeneous1000": homogeneous1000,
    "convnet": convnet,
    "vit": vit,
}
BINARY = ("mlp1000",)  # these tell two classes apart: labels are taken modulo 2, for digits odd from even


@dataclass(frozen=True)
class Architecture:
    """The blueprint of an image classifier: a name from `MODELS`, a folder of transformers (its config.json), or
    "package.module:factory".

    A factory is called with (input_shape, classes) and returns an nn.Module that maps pixels in [0, 1] to logits.
    """

    modality: ClassVar[str] = "pictures"
    secret: ClassVar[str] = "images"

    name: str
    input_shape: tuple[int, int, int]  # channel, height, width
    classes: int

    def __post_init__(self) -> None:
        sides = self.input_shape
        whole = all(isinstance(n, int) for n in (*sides, self.classes)) and len(sides) == 3
        if not whole or not all(1 <= side <= LONGEST_SIDE for side in sides) or not 1 <= self.classes <= MOST_CLASSES:
            raise BadInput(
                f"There are no models for pictures of {by(sides)} with {self.classes} classes: channel, height and width lie "
                f"between 1 and {LONGEST_SIDE:,}, classes between 1 and {MOST_CLASSES:,}."
            )

    def build(self, seed: int | None = None) -> nn.Module:
        """A freshly initialised model, the same for the same seed. Raises BadInput for a name that leads nowhere."""
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                torch.manual_seed(seed)
            factory = find_factory(self.name)
            try:
                model = factory(self.input_shape, self.classes)
            except TypeError as error:
                raise BadInput(f"{self.name} is no model factory of (input_shape, classes): {error}.") from error
        if not isinstance(model, nn.Module):
            raise BadInput(f"{self.name} returned a {type(model).__name__}, not an nn.Module.")
        if any(nn.parameter.is_lazy(parameter) for parameter in model.parameters()):  # LazyLinear: it learns its sizes
            training = model.training
            with torch.no_grad():
                model.eval()(self.blank(1))
            model.train(training)
        return with_linear_attention(model)

    def arguments(self, inputs: Tensor, like: Tensor) -> tuple[tuple[Tensor], dict[str, Tensor]]:
        """The pictures themselves."""
        return (inputs,), {}

    def logits(self, output: Any) -> Tensor:
        """The output itself, (batch, classes); of a tuple or a mapping what is called logits, else its first such tensor."""
        if isinstance(output, Tensor):
            return output
        parts = list(output.values()) if isinstance(output, Mapping) else output
        if isinstance(output, Mapping) and "logits" in output:
            parts = [output["logits"]]
        for part in parts if isinstance(parts, list | tuple) else ():
            if isinstance(part, Tensor) and part.ndim == 2 and part.shape[1] == self.classes:
                return part
        raise BadInput(
            f"The model {self.name} returns a {type(output).__name__} without logits (batch, {self.classes}): let its forward return "
            "them, alone or first."
        )

    def compared(self, logits: Tensor, inputs: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """One row per picture; labels are (batch,) class indices or (batch, classes) probabilities."""
        if labels is None:
            raise BadInput("A classifier needs labels.")
        return logits, labels

    def feed(self, data: Pictures, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """The pictures and their labels; BadInput when sizes or labels are not what the model was built for."""
        shape = tuple(data.images.shape[1:])
        if shape != self.input_shape:
            sizes = f"{by(shape)}, the model takes {by(self.input_shape)}"
            raise BadInput(f"The pictures are {sizes} (channel x height x width): choose other data, or resize them.")
        if int(data.labels.max()) >= self.classes:
            raise BadInput(f"Label {int(data.labels.max())} is beyond the model's {self.classes} classes.")
        return data.images, data.labels

    def original(self, inputs: Tensor, labels: Tensor | None) -> Tensor:
        """The pictures as they are: nothing is masked."""
        return inputs

    def blank(self, count: int) -> Tensor:
        """Grey pictures."""
        return torch.full((count, *self.input_shape), 0.5)

    def probe(self) -> tuple[Tensor, Tensor]:
        """Two grey pictures, of the first class and of the last."""
        return self.blank(2), torch.tensor([0, self.classes - 1])

    def show(self, inputs: Tensor) -> list[str]:
        """(n, 1 or 3, height, width) in [0, 1] -> one PNG data URI each."""
        return [png(image) for image in inputs]

    def facts(self, labels: Tensor | None) -> list[Fact]:
        """The architecture."""
        return [fact("architecture", True, f"{self.name}, {by(self.input_shape)}")]

    def labels_detail(self) -> str:
        """Labels are read off the release."""
        return "recovered by the attack"


def find_factory(name: str) -> Callable[[tuple[int, int, int], int], nn.Module]:
    """The factory behind a name of `MODELS`, a folder of transformers or "package.module:factory"; BadInput if none."""
    if name in MODELS:
        return MODELS[name]
    if (Path(name) / "config.json").is_file():
        return partial(_from_config, Path(name))
    if ":" not in name:
        raise BadInput(f"Unknown model {name!r}: choose one of {', '.join(MODELS)}, or give package.module:factory.")
    factory = named(name, "the model factory")
    if not callable(factory):
        raise BadInput(f"{name!r} is not callable: a model factory takes (input_shape, classes).")
    found: Callable[[tuple[int, int, int], int], nn.Module] = factory
    return found


def _from_config(folder: Path, shape: tuple[int, int, int], classes: int) -> nn.Module:
    from gradleak.modalities.transformers_networks import structure

    module, built = structure(folder)
    if built.input_shape == shape and built.classes != classes:  # a head of an adapter's
        return structure(folder, classes)[0]
    if (built.input_shape, built.classes) != (shape, classes):
        sizes = f"{'x'.join(map(str, built.input_shape))} and {built.classes} classes"
        raise BadInput(
            f"The model in {folder} is for pictures of {sizes}, not {'x'.join(map(str, shape))} and {classes}."
        )
    return module
