"""Label counts from the last layers that are shared: what samples add, the paper's fit, the trained reader, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad

from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.attacks.label_counts.counter import Counter
from gradleak.attacks.label_counts.evidence import LARGEST, Evidence, added, evidence
from gradleak.attacks.label_counts.label_counts import LabelCounts, counts_by_means, label_counts
from gradleak.attacks.labels import recover_labels
from gradleak.audit.labels_told import labels_told
from gradleak.audit.loop import audit
from gradleak.audit.plan import effort_of
from gradleak.errors import NotObserved
from gradleak.modalities.losses import CrossEntropy
from gradleak.modalities.networks import Architecture, resnet
from gradleak.modalities.pictures import Pictures, load
from gradleak.observations.defenses import GaussianNoise
from gradleak.observations.model import Mode, Model, PictureModel
from gradleak.observations.observation import PictureObservation
from gradleak.victims.gradient import capture_gradient
from oracles import shared_labels

TEST, PUBLIC = load("digits"), load("digits", "train")
MLP = Architecture("mlp", (1, 8, 8), 10)
SHAPE = Architecture("own", (1, 8, 8), 10)


def some(pictures: Pictures, rows: Tensor) -> Pictures:
    return replace(pictures, images=pictures.images[rows], labels=pictures.labels[rows])


def residual(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return resnet((1, 1), 4)((1, 8, 8), 10)


def double(module: nn.Module, mode: Mode = "eval", criterion: CrossEntropy | None = None) -> PictureModel:
    return Model.of(module, SHAPE, mode=mode, criterion=criterion or CrossEntropy()).to(torch.float64)


def without_last(model: PictureModel, private: Pictures) -> PictureObservation:
    return capture_gradient(model, private, reveal_last_layer=False)[0]


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "batch norm": (residual, ("5.norm2", "5.shortcut.1")),
    "linear": (lambda: MLP.build(0), ("4", "6")),
    "convolution": (lambda: Architecture("lenet", (1, 8, 8), 10).build(0), ("5", "8")),
    "layer norm": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.LayerNorm(9), nn.Linear(9, 10)),
        ("1", "2"),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_what_samples_add_is_their_own_gradient(name: str, reduction: str) -> None:
    """In eval mode the batch's gradient is the sum of what each sample's gradient is by itself: an oracle of 5 backward passes."""
    build, layers = NETWORKS[name]
    model = double(build(), criterion=CrossEntropy(reduction=reduction, label_smoothing=0.1))  # type: ignore[arg-type]
    images, labels = TEST.images[:5].double(), TEST.labels[:5]
    through: dict[str, Tensor] = {}
    found = added(model, layers, images, labels, through)
    assert {full.rpartition(".")[0] for full in found} == set(layers)
    for i in range(5):
        alone = grad(model.loss)(model.parameters, images[i : i + 1], labels[i : i + 1])
        for full, told in found.items():
            expected = alone[full] @ through[full] if full in through else alone[full]
            torch.testing.assert_close(
                told[i], expected.flatten(), rtol=1e-9, atol=1e-12
            )  # float64, some hundred products


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_what_samples_add_sums_to_what_was_released(name: str, mode: Mode) -> None:
    """In train mode too, where samples meet in BatchNorm."""
    build, layers = NETWORKS[name]
    model = double(build(), mode)
    images, labels = TEST.images[:6].double(), TEST.labels[:6]
    through: dict[str, Tensor] = {}
    found = added(model, layers, images, labels, through)
    released = grad(model.loss)(model.parameters, images, labels)
    for full, told in found.items():
        expected = 6 * (released[full] @ through[full] if full in through else released[full])
        torch.testing.assert_close(told.sum(0), expected.flatten(), rtol=1e-9, atol=1e-12)


def test_a_matrix_too_large_to_be_read_is_told_by_the_mean_input() -> None:
    model = double(nn.Sequential(nn.Flatten(), nn.Linear(64, 100, bias=False), nn.ReLU(), nn.Linear(100, 10)))
    assert model.parameters["1.weight"].numel() > LARGEST
    through: dict[str, Tensor] = {}
    found = added(model, ("1",), TEST.images[:4].double(), TEST.labels[:4], through)
    assert found["1.weight"].shape == (4, 100)
    torch.testing.assert_close(through["1.weight"], TEST.images[:4].double().flatten(1).mean(0))


def test_the_equation_of_the_paper_behind_the_last_batch_norm() -> None:
    """dL/db = (1/B) sum_n m_n * W^T (p_n - e_y), m_n the share of positions at which the block's ReLUs are on."""
    module = nn.Sequential(
        nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 10)
    )
    model = double(module)
    images, labels = TEST.images[:7].double(), TEST.labels[:7]
    sent = grad(model.loss)(model.parameters, images, labels)["1.bias"]
    z = module[:2].eval().double()(images)
    on = (z > 0).double().mean((2, 3))  # (7, 5)
    d = model.logits({}, images).softmax(1) - torch.eye(10, dtype=torch.float64)[labels]
    torch.testing.assert_close(sent, (on * (d @ model.parameters["5.weight"])).mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_samples_that_are_alike_within_classes_are_counted_exactly(mode: Mode) -> None:
    """Then B g is a combination of class means with the counts as its only non-negative solution, the means being independent."""
    ones = torch.stack([(TEST.labels == c).nonzero()[0, 0] for c in range(10)])
    model = double(MLP.build(3), mode)  # no BatchNorm: what a sample adds does not depend on its batch
    for seed in range(10):
        drawn = torch.randint(10, (16,), generator=torch.Generator().manual_seed(seed))
        private = some(TEST, ones[drawn])
        observation = without_last(model, replace(private, images=private.images.double()))
        seen = evidence(observation, some(TEST, ones.repeat(2)))
        assert seen.layers == ("2", "4")
        assert counts_by_means(seen, seen.total(observation)).tolist() == drawn.bincount(minlength=10).tolist()


def test_labels_without_the_last_layer() -> None:
    """The target is 95 %; the reading of another batch's gradient is no better than a guess by the frequencies of classes."""
    model = Model.of(MLP.build(0), MLP)
    order = torch.randperm(len(TEST.labels), generator=torch.Generator().manual_seed(0))
    batches = [some(TEST, order[12 * i : 12 * i + 12]) for i in range(6)]
    observations = [without_last(model, private) for private in batches]
    with pytest.raises(NotObserved, match="last layer"):
        recover_labels(observations[0])
    seen = evidence(observations[0], PUBLIC)
    counter = Counter.trained(seen, generator=torch.Generator().manual_seed(0), steps=60)
    found = [LabelCounts(*counter(seen.total(one)), seen.layers) for one in observations]
    right = other = guess = 0
    for i, private in enumerate(batches):
        truth = private.labels.tolist()
        assert len(found[i].labels) == 12
        assert 0 <= found[i].expected <= 1
        assert found[i].sentence().startswith("Labels are told by the gradient of 2 and 4: ")
        right += shared_labels(found[i].labels.tolist(), truth)
        other += shared_labels(found[i - 1].labels.tolist(), truth)
        guess += shared_labels([*range(10), 0, 1], truth)
    assert right >= 0.95 * 72
    assert other <= guess + 7  # two strange batches share 7 of 12 labels on average, give or take one and a half


def test_the_reader_is_certain_of_what_is_exact_and_counts_to_the_batch() -> None:
    """Classes that add unit vectors: the sum is the counts."""
    labels = torch.arange(4).repeat(50)
    contributions = torch.eye(4, dtype=torch.float64)[labels] + 1e-3 * torch.randn(
        200, 4, generator=torch.Generator().manual_seed(0)
    )
    seen = Evidence(contributions, labels, 4, 6, ("own",), {}, {})
    counter = Counter.trained(seen, generator=torch.Generator().manual_seed(0), steps=50)
    for truth in ([6, 0, 0, 0], [1, 2, 3, 0], [2, 2, 1, 1]):
        counts, expected = counter(torch.tensor(truth, dtype=torch.float64))
        assert counts.tolist() == truth
        assert expected > 0.9  # less than 10 % of the labels believed wrong, where none can be


def test_training_keeps_what_the_regression_that_it_starts_from_has_exact() -> None:
    """A batch of 64 of classes that add unit vectors: errors far below a half of a count, before training as after it."""
    labels = torch.arange(10).repeat(30)
    each = torch.eye(10, dtype=torch.float64)[labels] + 1e-3 * torch.randn(
        300, 10, generator=torch.Generator().manual_seed(0)
    )
    counter = Counter.trained(
        Evidence(each, labels, 10, 64, (), {}, {}), generator=torch.Generator().manual_seed(0), steps=40
    )
    for seed in range(5):
        truth = torch.randint(10, (64,), generator=torch.Generator().manual_seed(seed)).bincount(minlength=10)
        assert counter(truth.double())[0].tolist() == truth.tolist()


def test_the_same_generator_gives_the_same_counts() -> None:
    observation = without_last(Model.of(MLP.build(0), MLP), some(TEST, torch.arange(5)))
    first, second = (
        label_counts(observation, PUBLIC, generator=torch.Generator().manual_seed(4), steps=5) for _ in range(2)
    )
    assert first.counts.tolist() == second.counts.tolist()
    assert first.expected == second.expected


def test_audits_say_what_was_read_and_never_that_labels_are_safe(monkeypatch: pytest.MonkeyPatch) -> None:
    observation, secret = capture_gradient(
        Model.of(MLP.build(0), MLP), some(TEST, torch.arange(5)), reveal_last_layer=False
    )
    monkeypatch.setattr("gradleak.audit.labels_told.label_counts", partial(label_counts, steps=2))
    informed, [told] = labels_told(observation, PUBLIC, secret, 0)
    assert informed.labels is None  # read, not given
    assert (told["name"], told["level"]) == ("labels_told", "warning")
    assert "are expected to be right. " in told["sentence"]
    assert "of 5 are; the frequencies of classes alone give " in told["sentence"]
    for unread in (
        labels_told(observation, None, secret, 0),
        labels_told(replace(observation, batch_size=None), PUBLIC, None, 0),
    ):
        assert unread[0].read_labels is None
        assert [(flag["name"], flag["level"]) for flag in unread[1]] == [("labels_not_read", "warning")]
        assert unread[1][0]["sentence"].endswith("That does not show them to be safe.")
    whole = capture_gradient(Model.of(MLP.build(0), MLP), some(TEST, torch.arange(5)))[0]
    assert labels_told(whole, PUBLIC, None, 0) == (whole, [])  # attacks read them themselves, and say so in their rows
    given = replace(observation, labels=TEST.labels[:5])
    assert labels_told(given, PUBLIC, None, 0) == (given, [])


def test_a_search_takes_the_labels_that_were_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them it does not run; the control, another's observation, is searched under labels too."""
    monkeypatch.setattr("gradleak.audit.labels_told.label_counts", partial(label_counts, steps=2))
    private = some(TEST, torch.arange(3))
    observation, secret = capture_gradient(Model.of(MLP.build(0), MLP), private, reveal_last_layer=False)
    attacks = {"inverting-gradients": InvertingGradients(steps=2)}
    [blind] = audit(observation, attacks, None, bound=False)
    assert blind.reconstruction is None
    assert "last layer" in blind.result["status"]
    [found] = audit(observation, attacks, PUBLIC, secret=secret, bound=False)
    assert found.reconstruction is not None
    told = next(flag["sentence"] for flag in found.result["flags"] if flag["name"] == "labels_told")
    assert told.endswith("Attacks that need labels are given these.")
    for label in found.reconstruction.labels.unique():  # type: ignore[union-attr]
        count = int((found.reconstruction.labels == label).sum())
        assert f"{count} of class {label}" in told
    assert (
        effort_of(attacks["inverting-gradients"], observation) is not None
    )  # so that the plan knows what it will take


def test_what_cannot_be_read_is_named() -> None:
    generator = torch.Generator()
    private = some(TEST, torch.arange(4))
    seen = without_last(Model.of(MLP.build(0), MLP), private)
    assert seen.withheld() == ["6.weight", "6.bias"]
    assert "and nothing of 6.weight, 6.bias" in str(seen.threat_model()[0]["detail"])
    with pytest.raises(NotObserved, match="batch size was withheld"):
        label_counts(replace(seen, batch_size=None), PUBLIC, generator=generator)
    with pytest.raises(NotObserved, match="defense"):
        label_counts(replace(seen, defenses=(GaussianNoise(0.1),)), PUBLIC, generator=generator)
    with pytest.raises(NotObserved, match="too few"):
        label_counts(seen, some(PUBLIC, torch.zeros(9, dtype=torch.int64)), generator=generator)
    bare = nn.Sequential(
        nn.Conv2d(1, 48, 8, bias=False), nn.Conv2d(48, 100, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(100, 10)
    )
    only = without_last(Model.of(bare, SHAPE), private)
    with pytest.raises(NotObserved, match="no layer that was shared"):
        label_counts(replace(only, released={"1.weight": only.released["1.weight"]}), PUBLIC, generator=generator)
