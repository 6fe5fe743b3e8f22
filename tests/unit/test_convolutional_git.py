"""Exact-GIT: the leaked model's weights out of pairs, in closed form."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak import learned
from gradleak.attacks.convolutional_git import (
    ConvolutionalGit,
    Recovered,
    deconvolved,
    patches,
    regress,
    stages,
    transposed,
)
from gradleak.data import load, public_pool
from gradleak.errors import BadInput
from gradleak.metrics import psnr_db
from gradleak.models import Architecture, Normalise
from gradleak.observations import Model
from gradleak.pairs import Pairs, stream
from gradleak.victims.gradient import capture_gradient

SHAPE = (1, 8, 8)
LENET = Architecture("lenet", SHAPE, 10)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def model(seed: int = 0) -> Model:
    return Model.of(LENET.build(seed).eval(), LENET)


def pairs(leaked: Model, count: int = 500) -> Callable[[], Iterator[Pairs]]:
    public = public_pool("digits", "train", shape=SHAPE, limit=count)
    return lambda: stream(leaked, public, count=count, shard=100)


@pytest.fixture(scope="module")
def recovered() -> learned.Generator:
    generator = torch.Generator().manual_seed(0)
    return learned.train("convolutional-git", Recovered, {}, model(), pairs(model()), epochs=0, generator=generator)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


def test_the_weights_of_a_lenet_are_recovered(recovered: learned.Generator) -> None:
    """To 0.99, as the field's target for exact forms has it. Of the 5x5 kernels on 2x2 maps, the taps that see pixels."""
    assert isinstance(recovered.network, Recovered)
    weights, true = recovered.network.weights(), model().parameters
    for name in ("1.weight", "1.bias", "3.weight", "3.bias", "5.bias"):
        assert cosine(weights[name], true[name]) > 0.99, name
    inner = (..., slice(1, 4), slice(1, 4))
    assert cosine(weights["5.weight"][inner], true["5.weight"][inner]) > 0.99
    for name in ("8.weight", "8.bias"):  # softmax does not see what is added to all classes
        assert cosine(weights[name], true[name] - true[name].mean(0)) > 0.99, name


def test_unseen_digits_come_back_without_the_models_weights(recovered: learned.Generator, tmp_path: Path) -> None:
    """To 40 dB, which is beyond what the eye tells apart."""
    recovered.save(tmp_path / "generator")
    attack = ConvolutionalGit(generator=tmp_path / "generator")
    for row in range(3):
        private = load("digits", indices=[row])
        observation, _ = capture_gradient(LENET.build(0), LENET, private)
        found = attack(observation, generator=torch.Generator())
        assert float(psnr_db(found.images, private.images)) > 40
        assert found.labels.tolist() == private.labels.tolist()
        assert found.residual < 0.01


def test_only_the_pairs_count_not_the_weights_of_the_model() -> None:
    answers = []
    for seed in (0, 1):  # what the network is built from
        network = Recovered(model(seed))
        network.prepare(pairs(model(0), 200))
        answers.append(network.weights())
    assert all(torch.equal(answers[0][name], answers[1][name]) for name in answers[0])


def test_deconvolution_is_exact() -> None:
    """A random input, its patches and a random delta make g; least squares gives the input back."""
    layer = nn.Conv2d(3, 8, 5, stride=2, padding=2)
    x, delta = random(4, 3, 6, 6), random(4, 8, 3, 3, seed=1)
    g = delta.flatten(2) @ patches(x, layer).mT
    torch.testing.assert_close(deconvolved(delta, g, layer, (3, 6, 6)), x, rtol=1e-6, atol=1e-6)


def test_the_transposed_convolution_is_the_gradient() -> None:
    layer = nn.Conv2d(3, 8, 5, stride=2, padding=2).double()
    x, delta = random(2, 3, 7, 6).requires_grad_(), random(2, 8, 4, 3, seed=1)
    (expected,) = torch.autograd.grad(layer(x), x, delta)
    torch.testing.assert_close(transposed(delta, layer.weight.detach(), (3, 7, 6), layer), expected)


def test_regression_with_and_without_missing_entries() -> None:
    u, W, b = random(300, 12), random(5, 12, seed=1), random(5, seed=2)
    z = u @ W.T + b
    known = (random(300, 5, seed=3) > 0).double()
    for mask in (None, known):
        found = regress(u, z if mask is None else z * mask, mask)
        torch.testing.assert_close(found[0], W, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found[1], b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "named"),
    [
        ([nn.Flatten(), nn.Linear(64, 10), nn.Softplus(), nn.Linear(10, 10)], r"read 3 \(Softplus\).*train git"),
        ([nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 10)], r"read 1 \(MaxPool2d\)"),
        ([nn.Flatten(), nn.Linear(64, 10, bias=False)], r"read 2 \(Linear\)"),
        ([nn.Conv2d(1, 10, 8, groups=1), nn.Flatten()], "ends in a biased linear layer"),
    ],
)
def test_layers_that_cannot_be_read_are_named(layers: list[nn.Module], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        stages(Model.of(nn.Sequential(Normalise(1), *layers), LENET))


def test_batches_are_refused() -> None:
    with pytest.raises(BadInput, match="single pictures"):
        Recovered(model(), batch=2)


def test_weights_of_another_model_are_refused(recovered: learned.Generator, tmp_path: Path) -> None:
    recovered.save(tmp_path / "generator")
    observation, _ = capture_gradient(LENET.build(1), LENET, load("digits", indices=[0]))
    with pytest.raises(BadInput, match="weights or buffers"):
        ConvolutionalGit(generator=tmp_path / "generator")(observation, generator=torch.Generator())
    changed = replace(recovered, state=observation.model.state_hash())
    changed.save(tmp_path / "forged")  # another model's weights explain little
    found = ConvolutionalGit(generator=tmp_path / "forged")(observation, generator=torch.Generator())
    assert found.residual > 0.1
