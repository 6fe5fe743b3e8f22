"""The recursion: exact where mathematics allows, as far as noise allows, and a reason where it stops.

Pictures of independent uniform pixels: no prior of pictures can help. A gradient in float64 leaves 15 digits; a layer
costs some of them, so that 100 dB, an error of 1e-5 of the range, is far below what a wrong equation would give.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.attacks.recursion.batch import taken_apart
from gradleak.attacks.recursion.inverses import ACTIVATIONS
from gradleak.attacks.recursion.linear_systems import Belief, Equations, linear_map
from gradleak.attacks.recursion.recursive import Recursive, features
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture, Normalise, ResidualBlock
from gradleak.modalities.pictures import load
from gradleak.observations.adapter import Adapter
from gradleak.observations.model import Mode, Model
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.releases import Update
from gradleak.observations.training import Recipe
from gradleak.victims.gradient import capture_gradient
from oracles import gradient_by_autograd, labels_of, psnr_db_by_hand

SHAPE = (3, 8, 8)
TINY = Architecture("tiny", SHAPE, 10)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def picture(number: int = 0) -> Tensor:
    return torch.rand(1, *SHAPE, generator=seed(number)).double()


def network(*layers: nn.Module, number: int = 0) -> nn.Sequential:
    """Normalise and these layers in float64, as wide in their values as He et al. (2015) start them, with BatchNorm as
    after some training. GELU's at PyTorch's narrower start: in a wider one too many units are beyond its minimum."""
    gain = 1 / 3 if any(isinstance(layer, nn.GELU) for layer in layers) else 2
    generator, module = seed(number), nn.Sequential(Normalise(3), *layers).double().eval()
    for layer in module:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            fan_in = layer.weight[0].numel()
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator).double() * (gain / fan_in) ** 0.5
            if layer.bias is not None:
                layer.bias.data = 0.1 * torch.randn(layer.bias.shape, generator=generator).double()
        if isinstance(layer, nn.BatchNorm2d) and layer.running_mean is not None and layer.running_var is not None:
            for tensor in (layer.weight.data, layer.running_var):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            for tensor in (layer.bias.data, layer.running_mean):
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    return module


def observed(module: nn.Module, image: Tensor, label: int = 3, mode: Mode = "eval") -> PictureObservation:
    """By backward() in float64, nothing rounded."""
    released = gradient_by_autograd(module, image, torch.tensor([label]), mode=mode)
    model = Model.of(module, TINY, mode=mode)
    return Observation(model=model, released=released, batch_size=1, precision="float64")


def conv(inputs: int, outputs: int, *, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)


NETWORKS: dict[str, tuple[nn.Module, ...]] = {
    "sigmoid": (conv(3, 12), nn.Sigmoid(), conv(12, 12, stride=2), nn.Sigmoid(), nn.Flatten(), nn.Linear(192, 10)),
    "tanh": (conv(3, 8, kernel=5), nn.Tanh(), nn.Flatten(), nn.Linear(512, 64), nn.Tanh(), nn.Linear(64, 10)),
    "leaky ReLU, BatchNorm": (
        nn.Conv2d(3, 16, 3, stride=1, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.LeakyReLU(0.1),
        nn.Sequential(conv(16, 16, stride=2), nn.BatchNorm2d(16), nn.LeakyReLU(0.1)),
        nn.Flatten(),
        nn.Linear(256, 10),
    ),
    "mean pooling": (
        conv(3, 48),
        nn.AvgPool2d(2),
        nn.Tanh(),
        conv(48, 16),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(256, 10),
    ),
    "adaptive pooling": (
        conv(3, 64),
        nn.BatchNorm2d(64),
        nn.AdaptiveAvgPool2d(4),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(1024, 10),
    ),
    "GELU": (conv(3, 32), nn.GELU(), conv(32, 32, stride=2), nn.GELU(), nn.Flatten(), nn.Linear(512, 10)),
    "wide ReLU": (conv(3, 32), nn.ReLU(), conv(32, 64, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)),
    "ReLU, max-pooling": (
        conv(3, 32),
        nn.ReLU(),
        conv(32, 64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 10),
    ),
    "residual blocks, global pooling": (  # 32 units of the last convolution tell its 16 positions apart
        conv(3, 32),
        nn.ReLU(),
        ResidualBlock(32, 32, 2),
        ResidualBlock(32, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    ),
    "ReLU, global pooling": (
        conv(3, 32, stride=2),
        nn.ReLU(),
        conv(32, 64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ),
    "no activation": (nn.Conv2d(3, 16, (3, 5), (2, 1), (1, 2)), nn.Flatten(), nn.Dropout(), nn.Linear(512, 10)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_exact_in_float64(name: str) -> None:
    module = network(*NETWORKS[name])
    for number in range(2):
        found = Recursive()(observed(module, picture(number)), generator=seed())
        assert found.status.startswith("Closed form down to the picture; noise of 0, 0 evaluations"), found.status
        assert psnr_db_by_hand(found.value[0], picture(number)[0]) > 100
        assert labels_of(found) == [3]
        assert found.residual < 1e-6  # the picture is rounded to float32


def test_the_features_on_the_way_are_those_of_the_network() -> None:
    module = network(*NETWORKS["ReLU, max-pooling"])
    found = features(observed(module, picture()))
    assert (found.layer, found.reason, found.noise) == (0, "", 0.0)
    assert found.input.value == pytest.approx(picture()[0], abs=1e-6)
    leaf = picture().requires_grad_()
    (delta,) = torch.autograd.grad(F.cross_entropy(module(leaf), torch.tensor([3])), leaf)
    assert found.delta.value == pytest.approx(delta[0], abs=1e-6 * float(delta.abs().max()))


def test_it_says_when_the_picture_is_no_solution() -> None:
    """GELU in a network with values so wide that most units below zero are beyond the minimum: the branch is guessed."""
    module = network(*NETWORKS["GELU"])
    for layer in module:
        if isinstance(layer, nn.Conv2d):
            layer.weight.data *= 4
    found = Recursive()(observed(module, picture()), generator=seed())
    assert found.residual > 0.01
    assert "That is no solution" in found.status


# --- Where it stops ---


STOPS: dict[str, tuple[tuple[nn.Module, ...], int, str]] = {
    "averaged activations": (
        (conv(3, 8), nn.Sigmoid(), conv(8, 32), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(512, 10)),
        6,
        "5 (AvgPool2d)",
    ),
    "a narrow max-pooling": (
        (conv(3, 4), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
        4,
        "3 (MaxPool2d)",
    ),
    "an unknown layer": ((conv(3, 4), nn.Hardtanh(), nn.Flatten(), nn.Linear(256, 10)), 3, "2 (Hardtanh)"),
    "a narrow residual block": (
        (ResidualBlock(3, 4, 1), conv(4, 8), nn.Tanh(), nn.Flatten(), nn.Linear(512, 10)),
        2,
        "1 (ResidualBlock)",
    ),
}


@pytest.mark.parametrize("name", STOPS)
def test_it_says_where_it_stops_and_has_the_features_there(name: str) -> None:
    layers, depth, where = STOPS[name]
    module = network(*layers)
    found = features(observed(module, picture()))
    assert found.layer == depth
    assert found.reason.startswith(f"layer {where}, whose output does not tell its input")
    truth = module[:depth](picture())[0].detach()
    assert float((found.input.value - truth).norm() / truth.norm()) < 1e-5
    attack = Recursive(evaluations=25)
    result = attack(observed(module, picture()), generator=seed())
    assert where in result.status
    assert result.residual < residual_at_grey(module)


def residual_at_grey(module: nn.Module) -> float:
    nothing = Recursive(evaluations=0)(observed(module, picture()), generator=seed())
    return nothing.residual


def test_batchnorm_of_the_batch_stops_it() -> None:
    module = network(*NETWORKS["leaky ReLU, BatchNorm"])
    found = features(observed(module, picture(), mode="train"))
    assert found.reason.startswith("layer 4.1 (BatchNorm2d)")


def test_max_pooling_is_undone_in_the_convnet_of_inverting_gradients() -> None:
    """The features below the second pooling are exact; those below the first give the picture in a search."""
    architecture, private = Architecture("convnet64", (3, 32, 32), 10), load("embedded", indices=[0])
    module = architecture.build(0).eval()
    observation, _ = capture_gradient(Model.of(module, architecture), private)
    found = features(observation)
    assert (found.layer, found.reason.split(",")[0]) == (20, "layer 19 (MaxPool2d)")
    assert isinstance(module, nn.Sequential)
    truth = module[:20](private.images)[0].detach()
    assert float((found.input.value - truth).norm() / truth.norm()) < 1e-5


# --- Rounding and noise ---


def lenet(row: int, noise: float = 0.0, size: int = 16) -> tuple[PictureObservation, Tensor]:
    architecture = Architecture("lenet", (3, size, size), 10)
    private = load("embedded", indices=[row], resize=(size, size))
    observation, _ = capture_gradient(Model.of(architecture.build(row), architecture), private)
    generator = seed(row)
    released = {k: g + noise * torch.randn(g.shape, generator=generator) for k, g in observation.released.items()}
    return replace(observation, released=released), private.images[0]


def psnr_db_of(attack: Recursive, noise: float, *, rows: int = 2, size: int = 16) -> float:
    scores = []
    for row in range(rows):
        observation, truth = lenet(row, noise, size)
        scores.append(psnr_db_by_hand(attack(observation, generator=seed()).value[0], truth))
    return sum(scores) / rows


def test_a_gradient_in_float32_gives_the_lenet_picture_to_four_digits() -> None:
    assert psnr_db_of(Recursive(), 0.0, rows=1, size=32) > 80


def test_noise_costs_no_more_than_it_must() -> None:
    """Ten times the noise is 20 dB of a linear system; where it drowns equations, the prior fills them in."""
    levels = [psnr_db_of(Recursive(evaluations=0), noise) for noise in (0.0, 1e-4, 1e-3, 1e-2)]
    assert levels == sorted(levels, reverse=True)
    assert levels[1] > 25
    assert levels[2] > 18
    assert levels[3] > 12  # a grey picture has about 12 dB


def test_the_search_after_it_makes_use_of_what_the_recursion_left() -> None:
    """The recursion takes the errors of one layer for independent; the search knows where they come from."""
    closed, searched = (psnr_db_of(Recursive(evaluations=n), 1e-3, rows=1) for n in (0, 40))
    assert searched > closed + 2


@pytest.mark.parametrize("noise", [1e-5, 1e-3, 1e-1])
def test_the_last_layer_tells_how_much_noise_there_is(noise: float) -> None:
    # 9 x 192 entries are left beside the matrix of rank one: their standard deviation is known to 2 %.
    assert features(lenet(0, noise)[0]).noise == pytest.approx(noise, rel=0.05)


def test_a_release_in_half_precision_is_refined() -> None:
    observation, truth = lenet(0)
    halved = {name: g.half().float() for name, g in observation.released.items()}
    found = Recursive(evaluations=30)(replace(observation, released=halved, precision="float16"), generator=seed())
    assert found.iterations == 30
    assert psnr_db_by_hand(found.value[0], truth) > 30


# --- What it takes and what it refuses ---


def test_an_update_of_one_step_is_a_gradient() -> None:
    module = network(*NETWORKS["tanh"])
    gradient = observed(module, picture())
    recipe = Recipe(learning_rate=0.1, steps=1)
    change = {name: -0.1 * g for name, g in gradient.released.items()}
    update = replace(gradient, release=Update(recipe=recipe), released=change)
    found = Recursive()(update, generator=seed())
    assert psnr_db_by_hand(found.value[0], picture()[0]) > 100
    with pytest.raises(NotObserved, match="2 steps were taken"):
        Recursive()(replace(update, release=Update(recipe=replace(recipe, steps=2))), generator=seed())


def test_a_frozen_layer_gives_its_output_only() -> None:
    """16 units of stride 2 see 12 numbers each: enough without the layer's gradient."""
    module = network(conv(3, 16, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(256, 10))
    module[1].requires_grad_(False)
    found = Recursive()(observed(module, picture()), generator=seed())
    assert psnr_db_by_hand(found.value[0], picture()[0]) > 100


def test_a_few_pictures_are_taken_apart_at_the_last_layer() -> None:
    """Two of one label among them. In float64 the equations lose at most what their smallest singular value does, which is 1e-4 of the
    largest here: features are right to 1e-8. They are four times as many as pixels, so that a search that ends has 1e-2 of the range at most
    (40 dB); a mean colour has the deviation of uniform pixels, 11 dB. Another batch's gradient gives another batch."""
    module, images, labels = (
        network(conv(3, 12), nn.Tanh(), nn.Flatten(), nn.Linear(768, 10)),
        torch.cat([picture(k) for k in (1, 2, 3)]),
        torch.tensor([4, 0, 4]),
    )
    model = Model.of(module, TINY)
    released = gradient_by_autograd(module, images, labels)
    seen = Observation(model=model, released=released, batch_size=3, precision="float64", labels=labels)
    _, told, left = taken_apart(seen)
    truth = module[:-1](images)
    rows = torch.cdist(truth, told).argmin(1)  # those of one label come in either order
    assert rows.sort().values.tolist() == [0, 1, 2]
    assert labels[rows].tolist() == labels.tolist()
    assert left < 1e-12
    torch.testing.assert_close(told[rows], truth, rtol=0, atol=1e-6)
    found = Recursive(evaluations=200)(seen, generator=seed())
    assert min(psnr_db_by_hand(found.value[row], image) for row, image in zip(rows, images, strict=True)) > 40
    assert found.status.startswith("3 images taken apart at the last layer")


def test_what_it_refuses() -> None:
    seen = observed(network(*NETWORKS["tanh"]), picture())
    silent = {name: torch.zeros_like(g) for name, g in seen.released.items()}
    unbiased = network(nn.Flatten(), nn.Linear(192, 10, bias=False))
    unlinear = network(nn.Flatten(), nn.Linear(192, 10), nn.Hardtanh())
    factors = {"4.lora_A": torch.ones(1, 512).double(), "4.lora_B": torch.zeros(64, 1).double()}
    adapter = replace(seen, release=Adapter(start=factors, scaling={"4": 1.0}), released=factors)
    refusals: list[tuple[Callable[[], PictureObservation], str]] = [
        (lambda: replace(seen, batch_size=2), "2 images"),
        (lambda: replace(seen, batch_size=10), "The batch has 10 images: the recursion is for one, or for up to 9"),
        (lambda: replace(seen, batch_size=None), "batch size was withheld"),
        (lambda: replace(seen, released=silent), "last layer 6 is zero"),
        (lambda: observed(unbiased, picture()), "last layer 2 was released"),
        (lambda: observed(unlinear, picture()), "ends in 3, a Hardtanh"),
        (
            lambda: observed(
                nn.Sequential(ResidualBlock(3, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double(), picture()
            ),
            "a Flatten",
        ),
        (lambda: adapter, "reads a gradient or an update, and what was released is an adapter"),
    ]
    for observation, reason in refusals:
        with pytest.raises(NotObserved, match=reason):
            Recursive()(observation(), generator=seed())


# --- Its parts ---


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 2])
def test_a_linear_map_is_the_convolution(stride: int, padding: int) -> None:
    layer = nn.Conv2d(3, 4, 5, stride, padding).double()
    u = picture()[0].requires_grad_()
    plain = linear_map(layer, SHAPE)
    output = layer(u[None])[0]
    assert (plain(u.flatten()) + plain.bias[:, None]).view_as(output).allclose(output)
    delta = torch.rand(output.shape, generator=seed(1)).double()
    back, weight = torch.autograd.grad((output * delta).sum(), (u, layer.weight))
    assert plain.adjoint(delta.flatten(1)).view(SHAPE).allclose(back)
    found = plain.correlations(delta.flatten(1)) @ u.view(3, -1).T  # (out * taps, channels)
    assert found.view(4, 25, 3).transpose(1, 2).flatten(1).allclose(weight.flatten(1))
    pooled = linear_map(layer, SHAPE, pool=2)
    mean = F.avg_pool2d(output, 2)
    assert (pooled(u.flatten()) + pooled.bias[:, None]).view_as(mean).allclose(mean)


@pytest.mark.parametrize("outputs", [2, 6, 40], ids=["few equations of the output", "many", "more than unknowns"])
def test_the_solution_is_that_of_the_stacked_weighted_equations(outputs: int) -> None:
    layer, shape, generator = nn.Conv2d(2, outputs, 3, 1, 1).double(), (2, 5, 5), seed(2)
    plain = linear_map(layer, shape)

    def belief(*size: int) -> Belief:
        return Belief(*(torch.rand(size, generator=generator).double() for _ in range(2)))

    noise = torch.full((outputs, 18), 0.3).double()
    gradient, values, prior = Belief(belief(outputs, 18).value, noise), belief(outputs, 25), belief(50)
    prior = Belief(prior.value, torch.full((50,), 2.0).double())
    delta = Belief(belief(outputs, 25).value, torch.zeros(outputs, 25).double())
    found, _ = Equations(plain, gradient, delta, plain, values, prior).solve()

    basis = torch.eye(50).double().view(50, *shape)
    forward = F.conv2d(basis, layer.weight, padding=1).flatten(1).T  # (outputs * 25, 50)
    columns = []
    for image in basis:
        w = layer.weight.detach().requires_grad_()
        loss = (F.conv2d(image[None], w, padding=1)[0].flatten(1) * delta.value).sum()
        columns.append(torch.autograd.grad(loss, w)[0].flatten())
    rows = torch.cat([forward, torch.stack(columns, 1), torch.eye(50).double()]).detach()
    bias = layer.bias.detach()[:, None]  # type: ignore[union-attr]
    right = torch.cat([(values.value - bias).flatten(), gradient.value.flatten(), prior.value])
    std = torch.cat([values.variance.flatten(), noise.flatten(), prior.variance]).sqrt()
    expected = torch.linalg.lstsq(rows / std[:, None], right / std).solution
    assert found.value.allclose(expected, atol=1e-9)
    inverse = torch.linalg.inv((rows / std[:, None]).T @ (rows / std[:, None]))
    assert found.variance.allclose(inverse.diagonal(), rtol=1e-6)


@pytest.mark.parametrize("layer", [nn.Sigmoid(), nn.Tanh(), nn.LeakyReLU(0.2), nn.GELU(), nn.ReLU()], ids=str)
def test_an_activation_is_inverted_with_its_slope(layer: nn.Module) -> None:
    z = torch.linspace(-2.95, 2.95, 60).double().requires_grad_()  # no point at 0, where a slope jumps
    a = layer(z)
    (slope,) = torch.autograd.grad(a.sum(), z)
    guess = z.detach() + 0.01
    found, steep = ACTIVATIONS[type(layer)](layer, Belief(a.detach(), torch.full_like(a, 1e-20)), guess[None], guess)
    known = slope.abs() > 1e-2  # elsewhere the output hardly depends on the input
    assert found.value[known] == pytest.approx(z.detach()[known], abs=1e-6)
    assert steep.value[known] == pytest.approx(slope[known], abs=1e-6)
    if isinstance(layer, nn.ReLU):
        assert found.variance[z < -0.1].isinf().all()
