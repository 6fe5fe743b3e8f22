"""What Adam's epsilon gives away: the gradient behind one step, one picture behind many."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradleak.attacks.activation_patterns.activation_patterns import ActivationPatterns
from gradleak.attacks.adam_epsilon import AdamEpsilon
from gradleak.attacks.adam_step import KEPT, recognised, undone, with_step_undone
from gradleak.attacks.reconstruction import Outcome
from gradleak.attacks.seed import with_start_recovered
from gradleak.audit.metrics.pictures import psnr_db
from gradleak.errors import NotObserved
from gradleak.formats.peft import read_adapter
from gradleak.modalities import pictures
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.observation import PictureObservation
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.tensors import flatten
from gradleak.observations.training import EPSILON, OPTIMISERS, Optimizer, Recipe, train
from gradleak.victims.adapter import fine_tune

GREY = Architecture("mlp", (1, 8, 8), 10)
ADAMS: tuple[Optimizer, ...] = ("adam", "adamw")


def digits(first: int = 0, count: int = 1) -> Pictures:
    return pictures.load("digits", "test", indices=range(first, first + count))


def perceptron() -> PictureModel:
    return Model.of(GREY.build(0), GREY)


def folder(out: Path, data: Pictures, *, told: bool = False, seed: int = 42, **recipe: Any) -> PictureObservation:
    """The folder of a real PEFT adapter as somebody reads it who has the base model."""
    precision = recipe.pop("precision", torch.float32)
    taught, model = Recipe(**recipe), perceptron()
    fine_tune(model, data, rank=8, recipe=taught, out=out, seed=seed, precision=precision)
    seen = read_adapter(out / "adapter", model, recipe=taught if told else None, batch_size=len(data.labels))
    return with_start_recovered(seen)


def update(data: Pictures, recipe: Recipe) -> PictureObservation:
    """What a client sends, trained in float32 by torch's own optimizer."""
    model = perceptron()
    weights = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in model.parameters.items()}
    optimizer = OPTIMISERS[recipe.optimizer](list(weights.values()), recipe.learning_rate)
    for _ in range(recipe.steps):
        optimizer.zero_grad()
        gradient = torch.autograd.grad(model.loss({**weights}, data.images, data.labels), list(weights.values()))
        for weight, g in zip(weights.values(), gradient, strict=True):
            weight.grad = g
        optimizer.step()
    released = {name: weights[name].detach() - tensor for name, tensor in model.parameters.items()}
    return PictureObservation(
        model=model, release=Update(recipe=recipe), released=released, batch_size=len(data.labels)
    )


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# --- One step ---


@pytest.mark.parametrize("optimizer", ADAMS)
@pytest.mark.parametrize("rate", [1e-3, 2e-4, 0.1])
def test_the_gradient_behind_a_step_of_torch_comes_back(optimizer: Optimizer, rate: float) -> None:
    size = 10 ** (torch.rand(20_000, generator=generator()) * 9 - 9)  # 1e-9 to 1
    g = torch.where(torch.rand(size.shape, generator=generator()) < 0.5, size, -size)
    parameter = torch.nn.Parameter(torch.zeros_like(g))
    parameter.grad = g.clone()
    OPTIMISERS[optimizer]([parameter], rate).step()
    found, error = undone(
        parameter.detach(), torch.zeros_like(g), Recipe(optimizer=optimizer, learning_rate=rate, steps=1), "float32"
    )
    assert torch.equal(found.sign(), g.double().sign())
    # Ten roundings of float32 at most are behind u: each is 2^-24, where KEPT is a deviation of 0.8 of them.
    bound = (g.double().abs() + EPSILON).square() / EPSILON * 10 * 2**-24
    sure = bound < 0.1 * g.double().abs()  # where the formula is linear
    assert sure.double().mean() > 0.6  # those below 1e-3 are two thirds of them
    assert bool(((found - g.double()).abs() <= bound)[sure].all())
    assert bool((error >= (g.double().abs() + EPSILON).square() / EPSILON * KEPT / 4)[sure].all())


def test_weight_decay_is_taken_off() -> None:
    """As the other way: a step of train, in float64, whose gradient is known."""
    start = torch.randn(500, generator=generator(), dtype=torch.float64)
    target = torch.randn(500, generator=generator(), dtype=torch.float64) * 1e-4

    def loss(parameters: dict[str, Tensor], inputs: Any, labels: Any) -> Tensor:
        return (parameters["w"] * target).sum()

    for optimizer in ADAMS:
        for decay in (0.0, 0.1 if optimizer == "adamw" else 1e-4):
            recipe = Recipe(optimizer=optimizer, learning_rate=1e-3, steps=1, weight_decay=decay)
            after = train(loss, {"w": start}, torch.zeros(1), None, recipe)["w"]
            found = undone(after - start, start, recipe, "float64")[0]
            # What float32 would add to u, 1e-7, beside 1 - u of 3e-5
            assert (found - target).abs().max() < 1e-2 * target.abs().max()


def test_an_adapter_of_one_step_gives_its_picture_as_if_it_were_a_gradient(tmp_path: Path) -> None:
    data = digits(3)
    for name, told in (("told", True), ("recognised", False)):
        seen = folder(tmp_path / name, data, told=told, optimizer="adamw", learning_rate=2e-4, steps=1)
        read = with_step_undone(seen)
        release = read.adapter
        assert release.gradient
        assert release.undone is not None
        assert release.undone.recipe.learning_rate == 2e-4
        true = release.simulate(read.model, read.released, data.images, data.labels)
        off = float((flatten(true) - flatten(read.released)).norm() / flatten(true).norm())
        assert off < 2 * release.undone.error < 0.2
        assert [r[0] for r in read.reservations()].count("step_undone") == 1
        found = ActivationPatterns()(read, generator=generator())
        # Its errors are of the size of the tenth of a signal: 20 dB. By the signs alone it has 17 dB.
        assert psnr_db(found.value, data.images).item() > 20


def test_an_update_of_one_step_becomes_a_gradient() -> None:
    seen = update(digits(3), Recipe(optimizer="adam", learning_rate=0.1, steps=1))
    read = with_step_undone(seen)
    assert isinstance(read.release, Gradient)
    assert read.release.undone is not None
    true = flatten(read.simulate(digits(3).images, digits(3).labels))
    known = true.abs() < 1e-3  # to one percent and what the weights' own rounding adds: 4e-9 of a step of 0.1
    assert (flatten(read.released) - true)[known].norm() < 0.05 * true[known].norm()


@pytest.mark.parametrize(
    ("told", "recipe"),
    [
        (True, {"optimizer": "sgd", "learning_rate": 0.1, "steps": 1}),
        (False, {"optimizer": "sgd", "learning_rate": 0.1, "steps": 1}),
        (True, {"optimizer": "adamw", "learning_rate": 1e-3, "steps": 2}),
        (False, {"optimizer": "adamw", "learning_rate": 1e-3, "steps": 2}),
        (False, {"optimizer": "adamw", "learning_rate": 1e-5, "steps": 3}),
        (True, {"optimizer": "adamw", "learning_rate": 1e-3, "steps": 1, "precision": torch.bfloat16}),
    ],
)
def test_other_trainings_stay_as_they_are(tmp_path: Path, told: bool, recipe: dict[str, Any]) -> None:
    seen = folder(tmp_path, digits(3), told=told, **recipe)
    assert with_step_undone(seen) is seen
    if not told:
        assert recognised(seen) is None


def test_without_the_start_a_step_is_not_recognised(tmp_path: Path) -> None:
    """Two steps would look the same: what they did to A is not known."""
    seen = folder(tmp_path, digits(3), seed=987_654, optimizer="adamw", learning_rate=1e-3, steps=1)
    assert seen.adapter.origin == "unknown"
    assert with_step_undone(seen) is seen


# --- Many steps ---


@pytest.mark.parametrize("optimizer", ADAMS)
def test_one_picture_behind_many_steps(tmp_path: Path, optimizer: Optimizer) -> None:
    for row in (3, 8):
        data = digits(row)
        out = tmp_path / str(row)
        found = AdamEpsilon()(
            folder(out, data, optimizer=optimizer, learning_rate=1e-3, steps=20), generator=generator()
        )
        assert found.outcome is Outcome.SOLVED
        # Grey levels of 1 / 16; half of one is 30 dB
        assert psnr_db(found.value, data.images).item() > 20
        assert found.labels is not None
        assert found.labels.tolist() == data.labels.tolist()
        assert psnr_db(found.value, digits(row + 1).images).item() < 20


def test_one_picture_behind_a_client_s_update() -> None:
    data = digits(3)
    found = AdamEpsilon()(update(data, Recipe(optimizer="adam", learning_rate=1e-2, steps=10)), generator=generator())
    assert psnr_db(found.value, data.images).item() > 20
    assert found.labels is not None
    assert found.labels.tolist() == data.labels.tolist()


def test_in_bfloat16_only_signs_are_left(tmp_path: Path) -> None:
    data = digits(3)
    seen = folder(tmp_path, data, optimizer="adamw", learning_rate=1e-3, steps=20, precision=torch.bfloat16)
    found = AdamEpsilon()(seen, generator=generator())
    assert found.outcome is Outcome.GUESSED
    assert "signs only" in found.status
    mean = 0.1307 if GREY.input_shape[0] == 1 else 0.5
    dark = (found.value - found.value.min()) < (found.value.max() - found.value.min()) / 2
    assert float((dark == (data.images < mean)).double().mean()) > 0.95


@pytest.mark.parametrize(
    ("count", "recipe", "why"),
    [
        (1, {"optimizer": "sgd", "learning_rate": 0.1, "steps": 20}, "no step divided"),
        (4, {"optimizer": "adamw", "learning_rate": 1e-3, "steps": 20}, "there were several"),
        (1, {"optimizer": "adamw", "learning_rate": 1e-3, "steps": 1}, "did not move|several|no step"),
    ],
)
def test_what_is_not_one_picture_under_adam_is_refused(
    tmp_path: Path, count: int, recipe: dict[str, Any], why: str
) -> None:
    seen = folder(tmp_path, digits(3, count), **recipe)
    with pytest.raises(NotObserved, match=why):
        AdamEpsilon()(seen, generator=generator())


def test_an_unknown_start_is_refused(tmp_path: Path) -> None:
    seen = folder(tmp_path, digits(3), seed=987_654, optimizer="adamw", learning_rate=1e-3, steps=20)
    with pytest.raises(NotObserved, match="A_0 is not known"):
        AdamEpsilon()(seen, generator=generator())
