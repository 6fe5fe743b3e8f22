"""Inverting Gradients: its objective is equation 4 computed plainly, and what measuring it from the shared part is worth.

The objective at a picture is read off the trace: the search reports the best value so far, and its first is that at the start.
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.attacks.inverting_gradients import InvertingGradients, shared_part, smooth_pictures
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.search.start import Given
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.observations.training import Recipe
from gradleak.victims.adapter import share_adapter
from gradleak.victims.gradient import capture_gradient, keep_secret, share_update
from oracles import gradient_by_autograd, labels_of, psnr_db_by_hand

LENET = Architecture("lenet", (1, 8, 8), 10)
MLP = Architecture("mlp", (1, 8, 8), 10)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def digits(*rows: int) -> Pictures:
    return load("digits", indices=rows)


def model(architecture: Architecture = MLP) -> Model[Architecture]:
    return Model.of(architecture.build(0), architecture)


def observe(private: Pictures, architecture: Architecture = MLP) -> PictureObservation:
    return capture_gradient(model(architecture), private, reveal_labels=True)[0]


def given(images: Tensor, labels: Tensor) -> Given:
    return Given(Reconstruction(images, labels, 0.0, "Given.", Outcome.SOLVED))


def at(observation: PictureObservation, images: Tensor, attack: InvertingGradients) -> float:
    """The objective of the attack at these pictures."""
    assert observation.labels is not None
    made = replace(attack, steps=1, start=given(images, observation.labels))(observation, generator=seed())
    assert torch.equal(made.value, images)  # the better of two iterates, or of one
    return made.trace[0][1]


def flat(gradient: dict[str, Tensor]) -> np.ndarray:
    return np.concatenate([gradient[name].double().flatten().numpy() for name in sorted(gradient)])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(1 - a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def variation(images: Tensor) -> float:
    """Mean absolute difference of neighbours, horizontal plus vertical, in loops."""
    n, channels, height, width = images.shape
    across, down = list[float](), list[float]()
    for picture in images.view(n * channels, height, width).tolist():
        across += [abs(row[j + 1] - row[j]) for row in picture for j in range(width - 1)]
        down += [abs(picture[i + 1][j] - picture[i][j]) for i in range(height - 1) for j in range(width)]
    return sum(across) / len(across) + sum(down) / len(down)


def shared_by_hand(released: np.ndarray, labels: Tensor, generator: torch.Generator) -> np.ndarray:
    """The mean gradient of six random pictures with these labels, by autograd, in the length that fits the release best."""
    module, total = MLP.build(0), np.zeros_like(released)
    for _ in range(6):
        pictures = smooth_pictures((1, len(labels), 1, 8, 8), generator)[0]
        total += flat(gradient_by_autograd(module, pictures, labels)) / 6
    return np.asarray(total * (total @ released) / (total @ total))


# --- The objective ---


@pytest.mark.parametrize("rows", [(3,), (3, 4)], ids=["one", "two"])
def test_the_objective_is_equation_4(rows: tuple[int, ...]) -> None:
    private = digits(*rows)
    observation, other = observe(private), digits(*(row + 5 for row in rows)).images
    own = flat(gradient_by_autograd(MLP.build(0), other, private.labels))
    expected = distance(own, flat(observation.released)) + 0.2 * variation(other)
    # float32: a cosine is a sum of 84,000 products of either sign.
    attack = InvertingGradients(tv_weight=0.2, centre=False)
    assert at(observation, other, attack) == pytest.approx(expected, abs=1e-5)


def test_the_centred_objective_is_measured_from_the_shared_part() -> None:
    private = digits(3)
    observation, other = observe(private), digits(8).images
    generator = seed()
    torch.randn(1, 1, 1, 8, 8, generator=generator)  # the noise of the start comes first
    released = flat(observation.released)
    origin = shared_by_hand(released, private.labels, generator)
    own = flat(gradient_by_autograd(MLP.build(0), other, private.labels))
    expected = distance(own - origin, released - origin)
    plain = distance(own, released)
    found = at(observation, other, InvertingGradients(tv_weight=0.0))
    assert found == pytest.approx(expected, abs=1e-5)
    assert abs(found - plain) > 0.05  # it is another objective


@pytest.mark.parametrize(
    ("kind", "centre"), [("gradient", False), ("gradient", True), ("update", True), ("adapter", True)]
)
def test_it_vanishes_at_the_truth(kind: str, centre: bool) -> None:
    private = digits(3, 4)
    observation, secret = capture_gradient(model(), private, reveal_labels=True)
    if kind == "update":
        observation = share_update(observation, secret, Recipe(learning_rate=0.1, steps=2, batch_size=1))
    elif kind == "adapter":
        recipe = Recipe(learning_rate=0.1, steps=1)
        secret = keep_secret(model(), private)
        observation = share_adapter(model(), secret, modules=["2", "4", "6"], rank=4, recipe=recipe)
        observation = replace(observation, labels=private.labels)
    attack = InvertingGradients(tv_weight=0.0, centre=centre)
    # float32: one minus a sum of 84,000 products. The misfit itself, 1e-5 for the difference of two states, enters squared.
    assert abs(at(observation, private.images, attack)) < 1e-5


@dataclass(frozen=True)
class Darkness:
    """A prior of somebody's own."""

    def energy(self, images: Tensor) -> Tensor:
        return 0.5 * images.mean()


def test_another_prior_takes_the_place_of_the_total_variation() -> None:
    observation, other = observe(digits(3)), digits(8).images
    assert observation.labels is not None
    own = flat(gradient_by_autograd(MLP.build(0), other, observation.labels))
    expected = distance(own, flat(observation.released)) + 0.5 * float(other.mean())
    found = at(observation, other, InvertingGradients(centre=False, prior=Darkness()))
    assert found == pytest.approx(expected, abs=1e-5)


# --- The shared part ---


def test_the_shared_part_is_the_projection_of_what_was_released() -> None:
    """In its length it explains as much as it can: what is left is orthogonal to it, row by row."""
    rows = [observe(digits(3)), observe(digits(4))]
    labels = torch.stack([o.labels for o in rows if o.labels is not None])
    released = {name: torch.stack([o.released[name] for o in rows]) for name in rows[0].released}
    found = shared_part(rows[0], labels, released, seed(1))
    for k, o in enumerate(rows):
        origin, seen = flat({name: tensor[k] for name, tensor in found.items()}), flat(o.released)
        assert abs(origin @ (seen - origin)) < 1e-5 * (origin @ origin)
        assert distance(origin, seen) < 0.7  # and it is no small part
    alone = {name: tensor[:1] for name, tensor in released.items()}
    expected = shared_by_hand(flat(rows[0].released), labels[0], seed(1))
    one = flat({name: tensor[0] for name, tensor in shared_part(rows[0], labels[:1], alone, seed(1)).items()})
    assert np.linalg.norm(one - expected) < 1e-4 * np.linalg.norm(expected)  # float32


def test_random_pictures_are_smooth_and_within_range() -> None:
    pictures = smooth_pictures((50, 2, 1, 16, 16), seed())
    assert pictures.shape == (50, 2, 1, 16, 16)
    assert 0 <= float(pictures.min()) < float(pictures.max()) <= 1
    assert float(pictures.flatten(0, 2).std(0).mean()) > 0.1
    power = torch.fft.rfft(pictures - pictures.mean((-2, -1), keepdim=True)).abs().square().mean((0, 1, 2, 3))
    assert float(power[1]) > 3 * float(power[4]) > 3 * float(power[8])  # more of it at coarse scales


# --- The search ---


def test_in_an_untrained_network_the_shared_part_is_nearly_all() -> None:
    """The deviation from the paper and its reason: a cosine of 0.9 with pictures that have nothing to do with it, and 3 dB,
    half the squared error, that measuring from there is worth in the same number of steps."""
    private = [digits(0), digits(1)]
    rows = [observe(p, LENET) for p in private]
    centred, plain = (InvertingGradients(steps=100, centre=c).many(rows, generator=seed()) for c in (True, False))
    for o, p, a, b in zip(rows, private, centred, plain, strict=True):
        released = {name: tensor[None] for name, tensor in o.released.items()}
        origin = {name: tensor[0] for name, tensor in shared_part(o, p.labels[None], released, seed()).items()}
        assert distance(flat(origin), flat(o.released)) < 0.1
        better, worse = (psnr_db_by_hand(found.value[0], p.images[0]) for found in (a, b))
        assert better > worse + 3


def test_a_stronger_prior_makes_smoother_pictures() -> None:
    """Of the minimisers of f + w TV, one with a larger w has less of TV and more of f, whatever they are."""
    observation = observe(digits(2))
    found = [InvertingGradients(steps=60, tv_weight=w)(observation, generator=seed()) for w in (0.0, 1.0)]
    assert variation(found[1].value) < variation(found[0].value)
    assert found[1].residual > found[0].residual


def test_side_by_side_is_one_by_one() -> None:
    rows = [observe(digits(3)), observe(digits(4))]
    attack = InvertingGradients(steps=20, centre=False, start=given(torch.full((1, 1, 8, 8), 0.5), torch.tensor([0])))
    together = attack.many(rows, generator=seed())
    for one, found in zip(rows, together, strict=True):
        alone = attack(one, generator=seed())
        assert torch.allclose(alone.value, found.value, atol=1e-3)  # signs of a gradient that is rounding, 20 of them
        assert alone.residual == pytest.approx(found.residual, rel=1e-3)


def test_more_restarts_are_no_worse_by_the_objective() -> None:
    observation = observe(digits(5), LENET)
    attack = InvertingGradients(steps=15, centre=False)
    one, four = (replace(attack, restarts=n)(observation, generator=seed()) for n in (1, 4))
    assert four.trace[-1][1] <= one.trace[-1][1] + 1e-6  # the first of the four starts is the one


def test_labels_are_recovered_or_named() -> None:
    private = digits(3, 4, 4)
    observation, _ = capture_gradient(model(), private)
    found = InvertingGradients(steps=1)(observation, generator=seed())
    assert sorted(labels_of(found)) == sorted(private.labels.tolist())
    with pytest.raises(NotObserved, match="batch size was withheld"):
        InvertingGradients(steps=1)(replace(observation, batch_size=None), generator=seed())


def test_a_model_that_is_not_finite_is_reported() -> None:
    observation = observe(digits(0))
    broken = {name: p * torch.nan for name, p in observation.model.parameters.items()}
    observation = replace(observation, model=replace(observation.model, parameters=broken))
    found = InvertingGradients(steps=2)(observation, generator=seed())
    assert found.status.startswith("Not started")
    assert found.outcome is Outcome.DIVERGED
    assert F.relu(found.value).equal(found.value)
