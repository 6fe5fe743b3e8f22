"""Several pictures behind steps of Adam."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gradleak.attacks.adam_unmixing.adam_unmixing import AdamUnmixing
from gradleak.attacks.adam_unmixing.second_step import moved, second_step
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.seed import with_start_recovered
from gradleak.audit.metrics.matching import match
from gradleak.audit.metrics.pictures import psnr_db
from gradleak.errors import NotObserved
from gradleak.formats.peft import read_adapter
from gradleak.modalities import pictures
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.observations.training import OPTIMISERS, Optimizer, Recipe
from gradleak.victims.adapter import fine_tune

GREY = Architecture("mlp", (1, 8, 8), 10)
TWO: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 1e-3, "steps": 2}


def digits(first: int, count: int) -> Pictures:
    return pictures.load("digits", "test", indices=range(first, first + count))


def folder(
    out: Path, data: Pictures, *, told: bool = False, number: int = 1, seed: int = 42, **recipe: Any
) -> PictureObservation:
    """The folder of a real PEFT adapter as somebody reads it who has the base model."""
    precision = recipe.pop("precision", torch.float32)
    taught, model = Recipe(**recipe), Model.of(GREY.build(0), GREY)
    fine_tune(model, data, rank=16, recipe=taught, out=out, seed=seed, precision=precision)
    return with_start_recovered(
        read_adapter(out / "adapter", model, recipe=taught if told else None, batch_size=number)
    )


def attacked(observation: PictureObservation) -> Reconstruction:
    return AdamUnmixing()(observation, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_gradient_behind_the_second_step_of_torch_comes_back(optimizer: Optimizer, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    g = 1e-4 * torch.randn(16, rank, generator=generator) @ torch.randn(rank, 400, generator=generator)
    start = 0.03 * torch.randn(16, 400, generator=generator)
    A = torch.nn.Parameter(start.clone())
    trained = OPTIMISERS[optimizer]([A], 1e-3)
    for gradient in (torch.zeros_like(g), g):
        A.grad = gradient
        trained.step()
    change, recipe = A.detach() - start, Recipe(optimizer=optimizer, learning_rate=1e-3, steps=2)
    # What is left of u is the rounding of A, at most half a neighbour's distance of 2^-27 for numbers under 1/8, and of u itself
    assert (moved(change, start, recipe) - 0.7441).abs().min() < 1e-2
    found = second_step(change, start, recipe, "float32", None)
    assert int(torch.linalg.matrix_rank(found.gradient, rtol=1e-9)) == rank
    # A number of 1e-4 is known to (.7 |g| + epsilon)^2 / (.5 epsilon) times 1e-6, a hundredth; each is one of hundreds
    assert (found.gradient - g).norm() < 0.01 * g.norm()


def test_a_start_read_with_its_recipe_is_that_of_training_to_the_last_bit(tmp_path: Path) -> None:
    """In one step from B = 0, AdamW does nothing to A but shrink it: once in float32."""
    seen = folder(tmp_path, digits(3, 2), told=True, **{**TWO, "steps": 1})
    [saved] = [load_file(path) for path in tmp_path.rglob("adapter_model.safetensors") if "initial" not in str(path)]
    for name, start in seen.adapter.start.items():
        if name.endswith("lora_A"):
            [ended] = [tensor for key, tensor in saved.items() if key.endswith(f"{name}.weight")]
            assert torch.equal(start * (1 - 1e-3 * 0.01), ended)
            assert torch.equal(start + seen.released[name], ended)


@pytest.mark.parametrize("count", [2, 4])
def test_several_pictures_behind_two_steps(tmp_path: Path, count: int) -> None:
    data = digits(0, count)
    found = attacked(folder(tmp_path, data, **TWO))
    assert found.outcome is Outcome.CLOSE, found.status
    assert len(found.value) == count
    order = match(found.value, data.images)
    # A tenth of the range: pictures of digits are 9 to 12 dB from each other
    assert psnr_db(found.value[order], data.images).min() > 20
    assert found.labels is not None
    assert found.labels[order].tolist() == data.labels.tolist()
    others = digits(20, count)
    assert psnr_db(found.value[match(found.value, others.images)], others.images).max() < 20


def test_many_steps_tell_directions(tmp_path: Path) -> None:
    data = digits(0, 2)
    found = attacked(folder(tmp_path, data, number=2, **{**TWO, "steps": 20}))
    assert found.outcome is Outcome.GUESSED
    own, others = (
        psnr_db(found.value[match(found.value, some.images)], some.images).mean() for some in (data, digits(20, 2))
    )
    assert own > others + 3  # half the power of a blind guess's error


@pytest.mark.parametrize(
    ("told", "recipe", "why"),
    [
        (True, {**TWO, "optimizer": "sgd"}, "what Adam made"),
        (False, {**TWO, "steps": 20}, "number of samples has to be told"),
        (True, {**TWO, "batch_size": 2}, "different samples"),
        (True, {**TWO, "precision": torch.bfloat16}, "Rounding covers"),
        (False, {**TWO, "seed": 987_654}, "A_0 is not known"),
    ],
)
def test_what_it_cannot_read_is_refused(tmp_path: Path, told: bool, recipe: dict[str, Any], why: str) -> None:
    with pytest.raises(NotObserved, match=why):
        attacked(folder(tmp_path, digits(0, 4), told=told, **recipe))


def test_other_samples_in_the_second_step_are_not_those_of_the_first(tmp_path: Path) -> None:
    """Nobody tells of batches: then what comes back explains the gradient no more than chance, and the outcome says so."""
    found = attacked(folder(tmp_path, digits(0, 4), **TWO, batch_size=2))
    assert found.outcome is Outcome.STUCK


@pytest.mark.parametrize(("weakest", "outcome"), [(0.4, Outcome.CLOSE), (0.021, Outcome.GUESSED)])
def test_what_is_left_must_be_below_the_weakest_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weakest: float, outcome: Outcome
) -> None:
    """A sample that the model knows already sends back next to nothing: one of .021 of the gradient is not confirmed where .009 is left."""
    x, labels = torch.rand(2, 64, dtype=torch.float64), torch.zeros(2).long()
    monkeypatch.setattr(AdamUnmixing, "exact", lambda *_: (x, labels, 0.009, weakest))
    found = attacked(folder(tmp_path, digits(3, 2), **TWO))
    assert found.outcome is outcome
    assert ("a guess" in found.status) == (outcome is Outcome.GUESSED)
