"""Exact inputs of a biased linear layer: equal to the truth up to rounding, or not claimed."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gradleak.attacks.analytic import Analytic, first_layer, isolated_inputs
from gradleak.errors import NotObserved
from gradleak.modalities.losses import CrossEntropy
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.observations.training import Recipe
from gradleak.victims.gradient import capture_gradient, share_update
from oracles import labels_of, psnr_db_by_hand

MLP = Architecture("mlp", (1, 8, 8), 10)
COLOUR = Architecture("mlp", (3, 32, 32), 10)
TEST = load("digits")


def some(*rows: int) -> Pictures:
    return replace(TEST, images=TEST.images[list(rows)], labels=TEST.labels[list(rows)])


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def observe(private: Pictures, architecture: Architecture = MLP, *, model: int = 0) -> PictureObservation:
    return capture_gradient(Model.of(architecture.build(model), architecture), private)[0]


def noisy(observation: PictureObservation, relative: float, number: int = 0) -> PictureObservation:
    """White Gaussian noise on every released number, `relative` times their root mean square."""
    released, generator = observation.released, seed(number)
    rms = torch.cat([t.flatten() for t in released.values()]).square().mean().sqrt()
    noise = {k: relative * rms * torch.randn(t.shape, generator=generator) for k, t in released.items()}
    return replace(observation, released={k: t + noise[k] for k, t in released.items()})


@pytest.mark.parametrize("row", [0, 7, 42])
def test_one_image_is_exact(row: int) -> None:
    private = some(row)
    found = Analytic()(observe(private, model=row), generator=seed())
    # float32 rounds a gradient to 6e-8; 256 units average that: errors below 1e-5 of the grey range are 100 dB.
    assert psnr_db_by_hand(found.value[0], private.images[0]) >= 100
    assert labels_of(found) == private.labels.tolist()
    assert found.residual < 1e-5
    assert found.value.dtype == torch.float32
    assert "1 of 1 images solved" in found.status
    assert found.iterations == 0


def test_one_colour_photograph_is_exact() -> None:
    private = load("embedded", indices=[1])
    found = Analytic()(observe(private, COLOUR), generator=seed())
    assert psnr_db_by_hand(found.value[0], private.images[0]) >= 100


def test_sum_and_mean_are_the_same_for_the_ratio() -> None:
    private, mean = some(3, 4), observe(some(3, 4))
    model = mean.model.assume(criterion=CrossEntropy(reduction="sum"))
    summed = replace(mean, model=model, released={k: 2 * t for k, t in mean.released.items()})
    a, b = (Analytic()(o, generator=seed()) for o in (mean, summed))
    torch.testing.assert_close(a.value, b.value, rtol=0, atol=1e-6)
    assert labels_of(a) == labels_of(b)
    assert sorted(labels_of(a)) == sorted(private.labels.tolist())


def test_an_update_of_one_step_is_exact_and_more_steps_say_so() -> None:
    private = some(5)
    gradient, secret = capture_gradient(Model.of(MLP.build(0), MLP), private)
    for steps in (1, 3):
        update = share_update(gradient, secret, Recipe(learning_rate=0.1, steps=steps))
        found = Analytic()(update, generator=seed())
        # A difference of two float32 states of size 0.1 is good to 1e-8, and the update is of size 1e-3: 1e-5.
        assert psnr_db_by_hand(found.value[0], private.images[0]) >= 80
        assert ("3 steps were taken, and their mean stands in" in found.status) == (steps > 1)


def test_least_squares_over_the_units_averages_noise_out() -> None:
    """The Differs line of the file: no unit's ratio alone is as good, not even that of the unit with most signal."""
    private = some(9)
    clean = observe(private).to(torch.float64)
    _, scale, shift = first_layer(clean.model)
    for number in range(3):
        observation = noisy(clean, 0.05, number)
        found = Analytic()(observation, generator=seed())
        weight, bias = observation.released["2.weight"], observation.released["2.bias"]
        unit = int(bias.abs().argmax())
        single = ((weight[unit] / bias[unit] - shift) / scale).clamp(0, 1).view(1, 8, 8)
        averaged, alone = (psnr_db_by_hand(x, private.images[0].double()) for x in (found.value[0], single))
        # Some 80 active units of unequal signal carry the least squares: 3 dB, twice the power, is the least to expect.
        assert averaged >= alone + 3


@pytest.mark.parametrize("batch", [2, 4, 8])
@pytest.mark.parametrize("withheld", [False, True], ids=["batch size known", "batch size withheld"])
def test_what_is_declared_solved_in_a_batch_is_one_of_its_images(batch: int, withheld: bool) -> None:
    for number in range(10):
        rows = torch.randperm(len(TEST.labels), generator=seed(number))[:batch].tolist()
        private, observation = some(*rows), observe(some(*rows), model=number)
        found = Analytic()(replace(observation, batch_size=None if withheld else batch), generator=seed())
        solved = [image for image in found.value if image.unique().numel() > 1]  # the rest is filled with grey
        assert found.status.startswith(f"{len(solved)} of {len(found.value)} images solved")
        assert len(found.value) == batch or (withheld and len(solved) <= batch)
        assert len(labels_of(found)) == len(found.value)
        nearest = [max(range(batch), key=lambda i: psnr_db_by_hand(image, private.images[i])) for image in solved]
        assert len(set(nearest)) == len(solved)  # each once
        for image, i in zip(solved, nearest, strict=True):
            # Units that see one image alone agree to 1e-5 or so in float32, 100 dB; 60 dB is far beyond coincidence.
            assert psnr_db_by_hand(image, private.images[i]) >= 60
        if len(solved) == batch:
            assert sorted(labels_of(found)) == sorted(private.labels.tolist())


def test_batches_of_four_are_mostly_solved() -> None:
    """An image is alone at a unit with chance 1/2^4 or so: 256 units leave none of four images without two such units."""
    counts = []
    for number in range(6):
        found = Analytic()(observe(some(*range(4 * number, 4 * number + 4)), model=number), generator=seed())
        counts.append(int(found.status.split()[0]))
    # Digits resemble each other, and so do the units they activate; half of the images is the project's own target.
    assert sum(counts) >= 12


def test_isolated_inputs_from_a_gradient_made_by_hand() -> None:
    generator = seed(3)
    x = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    alone = [0, 0, 0, 1, 1, 2]  # units that one input alone activates: input 2 has one only, which proves nothing
    deltas = torch.zeros(8, 3, dtype=torch.float64)
    for unit, n in enumerate(alone):
        deltas[unit, n] = 0.3 + unit
    deltas[6] = torch.tensor([0.5, 0.2, -0.4])  # a unit that all activate; unit 7 is dead
    found, support = isolated_inputs(deltas @ x, deltas.sum(1), 1e-6)
    torch.testing.assert_close(found, x[:2], rtol=1e-12, atol=0)
    assert support == [3, 2]


def test_a_dead_first_layer_gives_no_images_and_no_nan() -> None:
    observation = observe(some(0, 1))
    for batch in (1, 2):
        dead = {k: torch.zeros_like(t) if k.startswith("2.") else t for k, t in observation.released.items()}
        found = Analytic()(replace(observation, released=dead, batch_size=batch), generator=seed())
        assert found.value.isfinite().all()
        assert "0 of" in found.status or "no unit" in found.status


def linear(*first: nn.Module) -> nn.Module:
    return nn.Sequential(*first, nn.ReLU(), nn.Linear(16, 10))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Architecture("lenet", (1, 8, 8), 10).build(0), "first layer 1 is a Conv2d"),
        (linear(nn.Flatten(), nn.Linear(64, 16, bias=False)), "only a linear layer with bias"),
        (nn.Sequential(nn.AvgPool2d(2), linear(nn.Flatten(), nn.Linear(16, 16))), "sees .* not the whole picture"),
        (nn.Sequential(nn.Flatten(), nn.Softmax(1), linear(nn.Linear(64, 16))), "does not see the pixels one by one"),
    ],
    ids=["convolution", "no bias", "part of the picture", "mixed pixels"],
)
def test_what_is_not_observed_is_named(module: nn.Module, reason: str) -> None:
    observation = observe_module(module)
    with pytest.raises(NotObserved, match=reason):
        Analytic()(observation, generator=seed())


def test_a_frozen_first_layer_is_not_observed() -> None:
    module = MLP.build(0)
    for name in ("2.weight", "2.bias"):
        module.get_parameter(name).requires_grad_(False)
    with pytest.raises(NotObserved):
        Analytic()(observe_module(module), generator=seed())


def observe_module(module: nn.Module) -> PictureObservation:
    return capture_gradient(Model.of(module, Architecture("own", (1, 8, 8), 10)), some(0))[0]


def test_first_layer_undoes_any_normalisation_of_its_own() -> None:
    model = Model.of(MLP.build(0), MLP)
    name, scale, shift = first_layer(model)
    assert name == "2"
    pixels: Tensor = torch.rand(64, generator=seed(), dtype=torch.float64)
    normalised = (pixels - 0.1307) / 0.3081  # MNIST's mean and standard deviation
    torch.testing.assert_close(scale * pixels + shift, normalised, rtol=1e-6, atol=1e-6)  # the constants are float32
