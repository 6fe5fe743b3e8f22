"""Losses, defenses and models are values that an observation carries, through attacks and files."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradleak.attacks.inverting_gradients import InvertingGradients
from gradleak.attacks.labels import recover_labels
from gradleak.errors import BadInput, NotObserved
from gradleak.formats.observation_file import load_observation, save_observation
from gradleak.modalities.losses import BinaryCrossEntropy, CrossEntropy, FocalLoss, Loss, Reduction, SummedLoss
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.observations.defenses import Defense, GaussianNoise, Sign, TopK, defended
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.observation import Observation
from gradleak.observations.tensors import Tensors
from gradleak.victims.gradient import capture_gradient

MLP = Architecture("mlp", (1, 8, 8), 10)
PRIVATE = load("digits", indices=(3, 4, 5))
WEIGHTS = tuple(float(i + 1) for i in range(10))


@dataclass(frozen=True)
class Hinge:
    """A loss of somebody's own."""

    reduction: Reduction = "mean"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        others = 1 - torch.eye(logits.shape[1]).to(logits)[targets]
        margins = (1 - logits.gather(1, targets[:, None]) + logits).clamp_min(0) * others
        each = margins.sum(1) / logits.shape[1]
        return each.mean() if self.reduction == "mean" else each.sum()


def model(criterion: Loss) -> PictureModel:
    return Model.of(MLP.build(0), MLP, criterion=criterion)


LOSSES: list[tuple[Loss, Any]] = [
    (CrossEntropy(), lambda z, y: F.cross_entropy(z, y)),
    (CrossEntropy("sum"), lambda z, y: F.cross_entropy(z, y, reduction="sum")),
    (CrossEntropy(class_weights=WEIGHTS), lambda z, y: F.cross_entropy(z, y, torch.tensor(WEIGHTS))),
    (CrossEntropy(label_smoothing=0.1), lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1)),
    (BinaryCrossEntropy(), lambda z, y: F.binary_cross_entropy_with_logits(z, torch.eye(10)[y])),
    (FocalLoss(gamma=0), lambda z, y: F.cross_entropy(z, y)),  # gamma 0 is the cross entropy
    (Hinge(), lambda z, y: F.multi_margin_loss(z, y)),
]


@pytest.mark.parametrize(("loss", "plainly"), LOSSES, ids=lambda v: str(v) if not callable(v) else type(v).__name__)
def test_the_gradient_is_that_of_the_loss(loss: Loss, plainly: Any) -> None:
    """Against torch.autograd on the module; float32 sums of 64 x 256 terms in another order."""
    observation, secret = capture_gradient(model(loss), PRIVATE)
    module = MLP.build(0)
    plainly(module(secret.inputs), secret.labels).backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(observation.released[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert str(loss) in [row["detail"] for row in observation.threat_model()]


def test_the_focal_loss_is_equation_4() -> None:
    logits, targets = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, 0])
    p = logits.softmax(1)[torch.arange(5), targets]
    assert float(FocalLoss(gamma=2)(logits, targets)) == pytest.approx(
        float((-((1 - p) ** 2) * p.log()).mean()), rel=1e-5
    )
    assert float(FocalLoss("sum")(logits, targets)) == pytest.approx(5 * float(FocalLoss()(logits, targets)), rel=1e-5)


@pytest.mark.parametrize("loss", [Hinge(), BinaryCrossEntropy(), FocalLoss()], ids=str)
def test_a_search_works_under_any_loss(loss: Loss) -> None:
    """The residual falls: the attack minimises the loss that the observation carries."""
    observation, _ = capture_gradient(model(loss), PRIVATE, reveal_labels=True)
    attack = InvertingGradients(steps=60)
    first, last = (replace(attack, steps=n)(observation, generator=torch.Generator().manual_seed(0)) for n in (1, 60))
    assert last.residual < first.residual


@pytest.mark.parametrize(
    "loss",
    [BinaryCrossEntropy(), FocalLoss(), CrossEntropy(class_weights=(1.0,) * 9 + (2.0,)), Hinge()],
    ids=str,
)
def test_labels_are_read_off_a_cross_entropy_of_equal_weights_only(loss: Loss) -> None:
    observation, _ = capture_gradient(model(loss), PRIVATE)
    with pytest.raises(NotObserved, match="cross entropy of equal weights"):
        recover_labels(observation)


@pytest.mark.parametrize("loss", [loss for loss, _ in LOSSES[:-1]], ids=str)
def test_a_loss_survives_a_file(loss: Loss, tmp_path: Path) -> None:
    observation, secret = capture_gradient(model(loss), PRIVATE)
    save_observation(observation, tmp_path / "o.safetensors")
    back = load_observation(tmp_path / "o.safetensors")
    assert back.model.criterion == loss
    assert back.residual(secret.inputs, secret.labels) < 1e-6


def test_soft_labels_are_labels() -> None:
    """Mixed labels, as mixup makes them: given, they replay; the cross entropy is linear in them (arXiv:1710.09412, section 3)."""
    module, images = MLP.build(0), PRIVATE.images
    soft = 0.3 * F.one_hot(PRIVATE.labels, 10) + 0.7 * F.one_hot(PRIVATE.labels.flip(0), 10)
    for criterion, truth in (
        (CrossEntropy(), F.cross_entropy(module(images), soft)),
        (BinaryCrossEntropy(), F.binary_cross_entropy_with_logits(module(images), soft)),
    ):
        known = dict(module.named_parameters())
        released = dict(zip(known, torch.autograd.grad(truth, list(known.values())), strict=True))
        seen = Observation(
            model=Model.of(module, MLP, criterion=criterion), released=released, batch_size=3, labels=soft
        )
        assert seen.residual(images, soft) < 1e-6


def test_a_sum_of_losses_is_their_sum(tmp_path: Path) -> None:
    summed = SummedLoss("sum", ((2.0, "cross-entropy"), (-0.5, "focal")))
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    terms = 2 * CrossEntropy("sum")(logits, PRIVATE.labels) - 0.5 * FocalLoss("sum")(logits, PRIVATE.labels)
    assert summed(logits, PRIVATE.labels) == pytest.approx(float(terms), rel=1e-6)
    seen, _ = capture_gradient(model(summed), PRIVATE)
    save_observation(seen, tmp_path / "o.safetensors")
    assert load_observation(tmp_path / "o.safetensors").model.criterion == summed
    for wrong in (((1.0, "focal"),), ((1.0, "focal"), (1.0, "sum")), ((1.0, "focal"), (0.0, "focal"))):
        with pytest.raises(BadInput, match="two terms or more"):
            SummedLoss("mean", wrong)


def test_a_loss_of_ones_own_is_refused_by_files_in_a_sentence(tmp_path: Path) -> None:
    observation, _ = capture_gradient(model(Hinge()), PRIVATE)
    with pytest.raises(BadInput, match=r"Files know the loss .* not Hinge"):
        save_observation(observation, tmp_path / "o.safetensors")
    assert not list(tmp_path.iterdir())


# --- Defenses ---


@dataclass(frozen=True)
class Halved(Defense):
    """A defense of somebody's own."""

    random: ClassVar[bool] = False

    def apply(self, released: Tensors, generator: torch.Generator) -> Tensors:
        return {name: tensor / 2 for name, tensor in released.items()}

    def __str__(self) -> str:
        return "halved"


def test_a_defense_is_applied_told_and_kept(tmp_path: Path) -> None:
    plain, _ = capture_gradient(model(CrossEntropy()), PRIVATE)
    for defense in (GaussianNoise(0.1), Sign(), TopK(0.1)):
        observation, _ = capture_gradient(model(CrossEntropy()), PRIVATE, defenses=(defense,), seed=3)
        expected = defended(plain.released, (defense,), torch.Generator().manual_seed(3))
        assert all(torch.equal(observation.released[name], tensor) for name, tensor in expected.items())
        assert {"item": "defenses", "revealed": True, "detail": str(defense)} in observation.threat_model()
        save_observation(observation, tmp_path / "o.safetensors")
        assert load_observation(tmp_path / "o.safetensors").defenses == (defense,)
    unknown = replace(plain, defenses=None)
    save_observation(unknown, tmp_path / "o.safetensors")
    assert load_observation(tmp_path / "o.safetensors").defenses is None


def test_a_defense_of_ones_own_needs_no_registration() -> None:
    plain, _ = capture_gradient(model(CrossEntropy()), PRIVATE)
    observation, secret = capture_gradient(model(CrossEntropy()), PRIVATE, defenses=(Halved(),))
    assert all(torch.equal(2 * observation.released[name], tensor) for name, tensor in plain.released.items())
    other = observation.of_others(secret.inputs, secret.labels)  # the control goes through the same defense
    assert all(torch.allclose(other.released[name], tensor, atol=1e-7) for name, tensor in observation.released.items())


# --- Models ---


def test_a_model_holds_its_numbers_once() -> None:
    module = MLP.build(0)
    snapshot = Model.of(module, MLP)
    assert all(parameter.is_meta for parameter in snapshot.module.parameters())
    assert all(snapshot.parameters[name].data_ptr() != p.data_ptr() for name, p in module.named_parameters())
    own = snapshot.solid()
    assert torch.equal(own(PRIVATE.images), module(PRIVATE.images))
    own.zero_grad()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.zero_()
    assert torch.equal(snapshot.logits({}, PRIVATE.images), module(PRIVATE.images))


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight
            self.last = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.last(self.b(self.a(x.flatten(1)).relu()).relu())
            return logits

    module = Tied()
    snapshot = Model.of(module, Architecture("own", (1, 8, 8), 10))
    assert [name for name in snapshot.parameters if "weight" in name] == ["a.weight", "last.weight"]
    own: Any = snapshot.solid()
    assert own.a.weight is own.b.weight
    assert torch.equal(snapshot.logits({}, PRIVATE.images), module(PRIVATE.images))
