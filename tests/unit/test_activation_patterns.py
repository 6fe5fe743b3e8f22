"""One picture out of the adapter of a ReLU network: the evidence is exact, the estimate far better than a blind one."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from gradleak.attacks.activation_patterns.activation_patterns import ActivationPatterns, read
from gradleak.errors import BadInput, NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load, public_pool
from gradleak.observations.adapter import Adapter
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.training import Recipe
from gradleak.priors.gaussian import GaussianPrior
from gradleak.victims.training import train
from oracles import gradient_by_autograd, labels_of, psnr_db_by_hand

TEST = load("digits")
PUBLIC = public_pool("digits", shape=(1, 8, 8), limit=1297)
ONE_STEP = Recipe(learning_rate=0.1, steps=1)
PRIOR = GaussianPrior.fit(PUBLIC.images)


@cache
def victim(classes: int) -> tuple[nn.Module, Architecture]:
    """mlp1000, which tells odd from even, or the ten classes of mlp, after one pass over the public digits."""
    architecture = Architecture("mlp1000" if classes == 2 else "mlp", (1, 8, 8), classes)
    module = architecture.build(0)
    train(module, of_classes(PUBLIC, classes), epochs=1, seed=0)
    return module, architecture


def of_classes(pictures: Pictures, classes: int) -> Pictures:
    return replace(pictures, labels=pictures.labels % classes)


def adapter(
    module: nn.Module, architecture: Architecture, images: Tensor, labels: Tensor, rank: int = 4
) -> PictureObservation:
    """PEFT's start, B = 0, and one SGD step: B's change is -lr s G A^T (Hu et al. 2021, equation 3, by the chain rule)."""
    G = gradient_by_autograd(module, images, labels, mode="eval")
    generator = torch.Generator().manual_seed(1)
    start, released = dict[str, Tensor](), dict[str, Tensor]()
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    for name in names:
        out, width = G[f"{name}.weight"].shape
        A = (torch.rand(rank, width, generator=generator) * 2 - 1) / width**0.5
        start |= {f"{name}.lora_A": A, f"{name}.lora_B": torch.zeros(out, rank)}
        released[f"{name}.lora_B"] = -ONE_STEP.learning_rate * 2.0 * G[f"{name}.weight"] @ A.T
    release = Adapter(start=start, scaling=dict.fromkeys(names, 2.0), recipe=ONE_STEP)
    model = Model.of(module, architecture)
    return Observation(model=model, release=release, released=released, batch_size=len(images))


def trained_by(observation: PictureObservation, recipe: Recipe | None) -> PictureObservation:
    """The same, with another belief about the recipe."""
    return replace(observation, release=replace(observation.adapter, recipe=recipe))


def observe(rows: list[int], classes: int = 2) -> tuple[PictureObservation, Tensor, Tensor]:
    images, labels = TEST.images[rows], TEST.labels[rows] % classes
    return adapter(*victim(classes), images, labels), images, labels


def attack(observation: PictureObservation) -> Tensor:
    image: Tensor = ActivationPatterns(prior=PRIOR)(observation, generator=torch.Generator()).value[0]
    return image


def pre_activations(model: PictureModel, images: Tensor) -> Tensor:
    """All of the hidden layers, one after the other, in float64."""
    mean, std = torch.tensor([0.1307, 0.3081]).double()  # the first layer for grey pictures, its constants in float32
    h, found = (images.double().flatten() - mean) / std, []
    linear = [name for name, layer in model.module.named_modules() if isinstance(layer, nn.Linear)]
    for name in linear[:-1]:
        z = model.parameters[f"{name}.weight"].double() @ h + model.parameters[f"{name}.bias"].double()
        found.append(z)
        h = z.clamp_min(0)
    return torch.cat(found)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_the_evidence_holds_at_the_truth(row: int, classes: int) -> None:
    observation, images, labels = observe([row], classes)
    seen, x = read(observation.to(torch.float64)), images.double().flatten()
    margins = seen.sides @ x + seen.side_offsets
    true = pre_activations(observation.model, images)
    assert seen.units == len(true)
    assert len(margins) >= 0.99 * seen.units  # a unit is left out where its outgoing weights cancel, by chance
    # Each decided unit's half-space is its own pre-activation with its own sign. float32 rounds those within 1e-6 of 0.
    assert float(margins.min()) > -1e-6
    if len(margins) == len(true):
        torch.testing.assert_close(margins, true.abs(), atol=1e-9, rtol=1e-9)
    # Equations (2) at the t that fits best: float32 rounds to 6e-8, and sums of 1,000 terms lose one or two digits.
    left = seen.rows @ x + seen.row_offsets
    t = left @ seen.row_scales / seen.row_scales.square().sum()
    assert float((left - t * seen.row_scales).norm() / left.norm()) < 1e-5
    # The same t turns the shares into p - onehot(y), and the cell's affine map into the logits.
    logits = observation.model.logits({}, images)[0].double()
    expected = logits.softmax(0) - torch.nn.functional.one_hot(labels[0], classes)
    torch.testing.assert_close(seen.shares / t, expected, atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(seen.output @ x + seen.bias, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("classes", [2, 10])
def test_better_than_the_mean_image(classes: int) -> None:
    better, mean = 0, PUBLIC.images.mean(0)
    for row in range(10):
        observation, images, labels = observe([row], classes)
        found = ActivationPatterns(prior=PRIOR)(observation, generator=torch.Generator())
        better += psnr_db_by_hand(found.value[0], images[0]) > psnr_db_by_hand(mean, images[0]) + 3
        assert labels_of(found) == labels.tolist()
        assert found.residual < 0.1
        assert found.value.shape == (1, 1, 8, 8)
        assert found.value.dtype == torch.float32
        assert 0 <= float(found.value.min()) <= float(found.value.max()) <= 1
        assert len(found.trace) == found.iterations
    assert better >= 9  # the design's target is 90 %; by 3 dB, half the squared error, so that it is no hair's breadth


def test_without_public_pictures_or_recipe() -> None:
    mean = PUBLIC.images.mean(0)
    for row in range(5):
        observation, images, labels = observe([row])
        found = ActivationPatterns()(trained_by(observation, None), generator=torch.Generator())
        # 2,000 half-spaces in 64 dimensions say more than the mean of 1,297 digits.
        assert psnr_db_by_hand(found.value[0], images[0]) > psnr_db_by_hand(mean, images[0])
        assert labels_of(found) == labels.tolist()
        assert found.residual < 0.1  # in the learning rate that fits best


def test_adam_keeps_the_zeros() -> None:
    observation, images, _ = observe([3])
    adam = trained_by(observation, Recipe(optimizer="adam", learning_rate=1e-3, steps=1))
    adam = replace(adam, released=adam.simulate(images, TEST.labels[[3]] % 2))
    margins = read(adam.to(torch.float64))
    # Adam's epsilon swamps units with a gradient of 1e-8 and below.
    right = margins.sides @ images.double().flatten() + margins.side_offsets > 0
    assert float(right.double().mean()) > 0.99
    assert psnr_db_by_hand(attack(adam), images[0]) > psnr_db_by_hand(PUBLIC.images.mean(0), images[0])


def test_the_observation_is_not_changed_and_the_answer_repeats() -> None:
    observation, _, _ = observe([4])
    before = {name: tensor.clone() for name, tensor in observation.released.items()}
    first, second = attack(observation), attack(observation)
    assert torch.equal(first, second)
    assert all(torch.equal(tensor, observation.released[name]) for name, tensor in before.items())


def test_what_was_not_observed() -> None:
    observation, images, labels = observe([0])
    seed = torch.Generator()
    module, architecture = victim(2)

    gradient = Observation(model=observation.model, released=gradient_by_autograd(module, images, labels))
    with pytest.raises(NotObserved, match="reads an adapter, and what was released is a gradient"):
        ActivationPatterns()(gradient, generator=seed)

    two, _, _ = observe([0, 3])
    with pytest.raises(NotObserved, match="2 images"):
        ActivationPatterns()(two, generator=seed)
    with pytest.raises(NotObserved, match="rank 2"):
        ActivationPatterns()(replace(two, batch_size=None), generator=seed)

    first = {k: v for k, v in observation.released.items() if k.startswith("2.")}
    with pytest.raises(NotObserved, match="lora_B of 4"):
        ActivationPatterns()(replace(observation, released=first), generator=seed)

    zero = {k: torch.zeros_like(v) for k, v in observation.released.items()}
    with pytest.raises(NotObserved, match="did not change"):
        ActivationPatterns()(replace(observation, released=zero), generator=seed)

    sigmoid = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Sigmoid(), nn.Linear(10, 2))
    with pytest.raises(NotObserved, match="Sigmoid"):
        ActivationPatterns()(adapter(sigmoid, architecture, images, labels), generator=seed)

    with pytest.raises(BadInput, match="prior"):
        ActivationPatterns(prior=GaussianPrior.smooth((1, 6, 6)))(observation, generator=seed)
