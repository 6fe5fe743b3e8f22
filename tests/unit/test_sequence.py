"""Networks whose forward was written by hand are the sequences that they are: the same layers, the same output bit by bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.attacks.recursion.recursive import Recursive
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.observations.fully_connected import FullyConnected
from gradleak.observations.model import Model
from gradleak.observations.sequence import layers_of
from gradleak.victims.gradient import capture_gradient

X = load("digits", "train", limit=3).images


class Net(nn.Module):
    """The network of many quickstarts, on digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.pool, self.act = nn.MaxPool2d(2, 2), nn.ReLU(inplace=True)
        self.head = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = F.dropout(self.act(self.conv2(x)), 0.5, self.training)
        x = F.avg_pool2d(x, 2)
        x = x.view(x.size(0), -1)
        logits: Tensor = self.head(x)
        return logits


class Flat(nn.Module):
    """A perceptron; `how` flattens the picture."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.fc1, self.fc2 = how, nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "flatten":
                x = torch.flatten(x, 1)
            case "method":
                x = x.flatten(start_dim=1)
            case "view":
                x = x.view(-1, 64)
            case _:
                x = x.reshape(x.shape[0], -1)
        logits: Tensor = self.fc2(torch.relu(self.fc1(x)))
        return logits


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        logits: Tensor = self.c(x + self.b(torch.relu(self.a(x))))
        return logits


class Twice(Flat):
    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc2(self.fc2.weight.new_ones(len(x), 32)) + 0 * x.sum()
        return logits


def kinds(module: nn.Module) -> list[str]:
    return [type(layer).__name__ for _, layer in layers_of(module)]


def test_a_network_written_by_hand() -> None:
    net = Net().eval()
    layers = layers_of(net)
    expected = [
        "Conv2d",
        "ReLU",
        "MaxPool2d",
        "Conv2d",
        "ReLU",
        "Identity",
        "AvgPool2d",
        "Flatten",
        "Linear",
        "ReLU",
        "Linear",
    ]
    assert kinds(net) == expected
    assert [n for n, layer in layers if list(layer.parameters())] == ["conv1", "conv2", "head.0", "head.2"]
    assert torch.equal(nn.Sequential(*(layer for _, layer in layers))(X), net(X))
    assert kinds(net.train()) == ["Net"]  # dropout is no layer of a sequence while it drops


@pytest.mark.parametrize("how", ["flatten", "method", "view", "reshape"])
def test_ways_to_flatten(how: str) -> None:
    net = Flat(how)
    assert kinds(net) == ["Flatten", "Linear", "ReLU", "Linear"]
    found = FullyConnected.of(net, {n: p.detach() for n, p in net.named_parameters()}, (1, 8, 8))
    assert found.names == ("fc1.weight", "fc2.weight")
    assert torch.allclose(found.forward(found.inputs(X))[-1], net(X), atol=1e-5)


@pytest.mark.parametrize("net", [Residual(), Twice("flatten")], ids=lambda net: type(net).__name__)
def test_what_is_no_sequence_stays_one_part(net: Any) -> None:
    assert kinds(net) == [type(net).__name__]


def test_the_recursion_reads_a_network_written_by_hand() -> None:
    """Leaky ReLU gives its input back, so that the recursion is exact in float64 (R-GAP, section 3)."""

    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 12, 3, padding=1), nn.Linear(12 * 64, 10)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.fc(torch.flatten(F.leaky_relu(self.conv(x), 0.2), 1))
            return logits

    torch.manual_seed(0)
    model = Model.of(Leaky().double(), Architecture("mine", (1, 8, 8), 10))
    private = load("digits", "train", limit=1)
    private = replace(private, images=private.images.double())
    observation, _ = capture_gradient(model, private, precision=torch.float64)
    found = Recursive()(observation, generator=torch.Generator().manual_seed(0))
    assert (found.value - private.images).abs().max() < 1e-6
