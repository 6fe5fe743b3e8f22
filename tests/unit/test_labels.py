"""Label recovery: the sign rule, counts for batches, and labels of known images."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad

from gradleak.attacks.ilrg import ilrg
from gradleak.attacks.labels import apportion, labels_of_images, recover_labels, soft_label_sum, soft_labels
from gradleak.errors import NotObserved
from gradleak.modalities.losses import CrossEntropy
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.training import Recipe
from gradleak.victims.gradient import capture_gradient, share_update
from oracles import shared_labels

LENET = Architecture("lenet", (1, 8, 8), 10)
MLP = Architecture("mlp", (1, 8, 8), 10)
TEST = load("digits")


def some(rows: Tensor) -> Pictures:
    return replace(TEST, images=TEST.images[rows], labels=TEST.labels[rows])


def observe(module: nn.Module, architecture: Architecture, private: Pictures) -> PictureObservation:
    return capture_gradient(Model.of(module, architecture), private)[0]


@pytest.mark.parametrize("architecture", [LENET, MLP, Architecture("resnet20", (1, 8, 8), 10)], ids=lambda a: a.name)
def test_one_label_is_never_missed(architecture: Architecture) -> None:
    # p_c - 1 < 0 <= p_k for every other class: the rule has no exception.
    for seed in range(12):
        observation = observe(architecture.build(seed), architecture, some(torch.tensor([seed])))
        assert recover_labels(observation).tolist() == TEST.labels[[seed]].tolist()


@pytest.mark.parametrize("architecture", [LENET, MLP], ids=lambda a: a.name)
@pytest.mark.parametrize("batch", [4, 8])
def test_labels_of_batches(architecture: Architecture, batch: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    right = 0
    for number in range(25):
        rows = torch.randperm(len(TEST.labels), generator=generator)[:batch]
        observation = observe(architecture.build(number), architecture, some(rows))
        found = recover_labels(observation)
        assert len(found) == batch
        assert found.tolist() == sorted(found.tolist())
        right += shared_labels(found.tolist(), TEST.labels[rows].tolist())
    # The project's target is 95 % of the labels. A guess of all-different classes would be right in about 60 %.
    assert right >= 0.95 * 25 * batch


def test_the_sum_over_a_batch_gives_the_same_labels_as_its_mean() -> None:
    module, private = MLP.build(0), some(torch.arange(6))
    mean = observe(module, MLP, private)
    summed = Observation(
        model=Model.of(module, MLP, criterion=CrossEntropy(reduction="sum")),
        released={name: 6 * tensor for name, tensor in mean.released.items()},
        batch_size=6,
    )
    assert recover_labels(summed).tolist() == recover_labels(mean).tolist()
    assert labels_of_images(summed, private.images).tolist() == private.labels.tolist()


def test_labels_of_an_update_of_one_step() -> None:
    private = some(torch.arange(4))
    gradient, secret = capture_gradient(Model.of(MLP.build(1), MLP), private)
    update = share_update(gradient, secret, Recipe(learning_rate=0.1, steps=1))
    assert recover_labels(update).tolist() == recover_labels(gradient).tolist()


@pytest.mark.parametrize("architecture", [LENET, MLP], ids=lambda a: a.name)
def test_labels_of_known_images_are_exact(architecture: Architecture) -> None:
    for seed in range(5):
        rows = torch.randperm(len(TEST.labels), generator=torch.Generator().manual_seed(seed))[:16]
        observation = observe(architecture.build(seed), architecture, some(rows)).to(torch.float64)
        found = labels_of_images(observation, TEST.images[rows].double())
        assert found.tolist() == TEST.labels[rows].tolist()  # in order, repeated labels included


@pytest.mark.parametrize("seed", range(20))
def test_apportion_gives_whole_numbers_that_sum_up(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = 3 * torch.randn(10, generator=generator, dtype=torch.float64)
    present = torch.rand(10, generator=generator) < 0.3
    total = 8 + seed % 5
    counts = apportion(raw, present, total)
    assert counts.sum() == total
    assert (counts >= 0).all()
    assert (counts == counts.round()).all()
    assert (counts[present] >= 1).all()  # at most 10 are present, and there are enough to go round


def test_apportion_keeps_what_is_whole_and_gives_the_rest_to_the_largest_remainder() -> None:
    nobody = torch.zeros(4, dtype=torch.bool)
    raw = torch.tensor([2.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    assert apportion(raw, nobody, 4).tolist() == raw.tolist()
    raw = torch.tensor([1.6, 0.7, 0.3, 1.4], dtype=torch.float64)
    assert apportion(raw, nobody, 4).tolist() == [2, 1, 0, 1]
    assert apportion(raw, torch.tensor([False, False, True, False]), 4).tolist() == [1, 1, 1, 1]


def test_apportion_ends_when_more_classes_are_present_than_images() -> None:
    counts = apportion(torch.ones(5, dtype=torch.float64), torch.ones(5, dtype=torch.bool), 3)
    assert counts.sum() == 3
    assert (counts >= 0).all()


def test_a_withheld_batch_size_is_named() -> None:
    observation = replace(observe(MLP.build(0), MLP, some(torch.arange(2))), batch_size=None)
    with pytest.raises(NotObserved, match="batch size was withheld"):
        recover_labels(observation)


@pytest.mark.parametrize(
    "tail",
    [[nn.Linear(64, 10, bias=False)], [nn.Linear(64, 10), nn.LayerNorm(10)], [nn.Linear(64, 20), nn.MaxPool1d(2)]],
    ids=["no bias", "not linear", "not the logits"],
)
def test_a_model_that_ends_otherwise_is_named(tail: list[nn.Module]) -> None:
    module = nn.Sequential(nn.Flatten(), *tail)
    observation = observe(module, Architecture("own", (1, 8, 8), 10), some(torch.arange(2)))
    with pytest.raises(NotObserved, match="no linear layer with bias"):
        recover_labels(observation)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_frozen_last_layer_is_not_observed(batch: int) -> None:
    module = MLP.build(0)
    for name in ("6.weight", "6.bias"):
        module.get_parameter(name).requires_grad_(False)
    with pytest.raises(NotObserved):
        recover_labels(observe(module, MLP, some(torch.arange(batch))))


def test_ilrg_counts_classes_of_equal_samples_exactly() -> None:
    """Where predictions do not hang on the features, the paper's equations are exact, and have one solution."""
    weight = torch.zeros(10, 30, dtype=torch.float64)
    counts = torch.tensor([0, 3, 0, 1, 2, 0, 0, 5, 1, 0])
    features = torch.rand(12, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(10).repeat_interleave(counts)
    rest = 0.1 - torch.eye(10, dtype=torch.float64)[labels]  # p - e_y
    found = ilrg(rest.T @ features / 12, rest.mean(0), weight, torch.zeros(10), 12)
    assert found.tolist() == counts.tolist()


def observe_soft(targets: Tensor, images: Tensor, criterion: CrossEntropy, seed: int) -> PictureObservation:
    """The gradient of a cross entropy against distributions of labels, in float64."""
    model = Model.of(MLP.build(seed), MLP, criterion=criterion).to(torch.float64)
    released = grad(model.loss)(model.parameters, images.double(), targets.double())
    return Observation(model=model, released=released, batch_size=len(images))


def mixed(count: int, seed: int = 0) -> Tensor:
    """Mix-up: lam e_a + (1 - lam) e_b, (count, 10)."""
    generator = torch.Generator().manual_seed(seed)
    lam, ends = torch.rand(count, 1, generator=generator), torch.randint(10, (2, count), generator=generator)
    return lam * torch.eye(10)[ends[0]] + (1 - lam) * torch.eye(10)[ends[1]]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_soft_label_is_read_exactly(reduction: Literal["mean", "sum"]) -> None:
    """y = p - db, and p is known by the features dW^T db / ||db||^2."""
    for seed in range(5):
        target = mixed(1, seed)
        observation = observe_soft(target, TEST.images[[seed]], CrossEntropy(reduction=reduction), seed)
        torch.testing.assert_close(
            soft_labels(observation), target.double(), rtol=0, atol=1e-9
        )  # float64, 100 products
        torch.testing.assert_close(soft_label_sum(observation), target[0].double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_soft_labels_of_known_images_are_exact(reduction: Literal["mean", "sum"]) -> None:
    targets = mixed(12)
    observation = observe_soft(targets, TEST.images[:12], CrossEntropy(reduction=reduction), 1)
    found = soft_labels(observation, TEST.images[:12].double())
    torch.testing.assert_close(found, targets.double(), rtol=0, atol=1e-6)  # a pseudoinverse of condition 1e3 or so
    with pytest.raises(NotObserved, match="one picture"):
        soft_labels(observation)


def test_soft_labels_add_up_over_a_batch() -> None:
    """sum_n y_n = sum_n p_n - B db. The mean's features err by how much predictions differ: here, not at all, as the last layer is 0."""
    targets = mixed(8)
    module = MLP.build(2)
    module.get_parameter("6.weight").data.zero_()
    model = Model.of(module, MLP).to(torch.float64)
    released = grad(model.loss)(model.parameters, TEST.images[:8].double(), targets.double())
    observation = Observation(model=model, released=released, batch_size=8)
    torch.testing.assert_close(soft_label_sum(observation), targets.double().sum(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("batch", [1, 6])
def test_labels_are_read_through_smoothing(batch: int) -> None:
    """The same bound as without."""
    right = 0
    for seed in range(12):
        rows = torch.randperm(len(TEST.labels), generator=torch.Generator().manual_seed(seed))[:batch]
        model = Model.of(MLP.build(seed), MLP, criterion=CrossEntropy(label_smoothing=0.2))
        found = recover_labels(capture_gradient(model, some(rows))[0])
        right += shared_labels(found.tolist(), TEST.labels[rows].tolist())
    assert right >= (1 if batch == 1 else 0.95) * 12 * batch


def test_labels_that_are_no_part_of_the_loss_are_not_told() -> None:
    model = Model.of(MLP.build(0), MLP, criterion=CrossEntropy(label_smoothing=1.0))
    with pytest.raises(NotObserved, match="no part of the loss"):
        recover_labels(capture_gradient(model, some(torch.arange(2)))[0])
