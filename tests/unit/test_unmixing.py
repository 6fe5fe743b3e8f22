"""Unmixing: pictures of a batch, or of a fine-tuning, out of the first layer of a ReLU network."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradleak.attacks.membership.certificate import certificate
from gradleak.attacks.reconstruction import Outcome
from gradleak.attacks.unmixing.span import span_of
from gradleak.attacks.unmixing.unmixing import Unmixing, explained, labelled
from gradleak.audit.metrics.matching import match
from gradleak.audit.metrics.pictures import psnr_db
from gradleak.errors import NotObserved
from gradleak.modalities import pictures
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.adapter import Adapter
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.training import Optimizer, Recipe
from gradleak.victims.adapter import fine_tune, lora_start

GREY, COLOUR = Architecture("mlp", (1, 8, 8), 10), Architecture("mlp", (3, 32, 32), 10)
MODULES = ("2", "4", "6")
N, RANK = 4, 8


def digits(first: int = 0, count: int = N) -> Pictures:
    return pictures.load("digits", "test", indices=range(first, first + count))


def colours(count: int = N) -> Pictures:
    return pictures.load("embedded", "test", indices=range(count))


def seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def adapter(
    architecture: Architecture,
    data: Pictures,
    *,
    rate: float = 0.05,
    steps: int = 60,
    batch: int | None = None,
    optimizer: Optimizer = "sgd",
    rank: int = RANK,
    modules: tuple[str, ...] = MODULES,
) -> PictureObservation:
    """An adapter with its start, trained in float32 as PEFT's; its size withheld."""
    model = Model.of(architecture.build(0), architecture)
    start = lora_start(model, modules, rank, torch.Generator().manual_seed(42))
    recipe = Recipe(learning_rate=rate, steps=steps, batch_size=batch, optimizer=optimizer)
    release = Adapter(start=start, scaling=dict.fromkeys(modules, 1.0), recipe=recipe, origin="given")
    change = release.simulate(model, start, data.images, data.labels)
    ended = {name: start[name] + step.detach() for name, step in change.items()}  # as it is saved, rounded
    return PictureObservation(
        model=model, release=release, released={name: tensor - start[name] for name, tensor in ended.items()}
    )


def gradient(architecture: Architecture, data: Pictures) -> PictureObservation:
    model = Model.of(architecture.build(0), architecture)
    released = Gradient().simulate(model, model.parameters, data.images, data.labels)
    return PictureObservation(model=model, released={name: tensor.detach() for name, tensor in released.items()})


def scores(found: Tensor, truth: Tensor) -> Tensor:
    """PSNR (n,) of the best pairing."""
    return psnr_db(found[match(found, truth)], truth)


@pytest.mark.parametrize("batch", [None, 2])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_digits_of_a_whole_fine_tuning_come_back(batch: int | None, optimizer: Optimizer) -> None:
    data = digits()
    rate = 0.05 if optimizer == "sgd" else 0.005
    found = Unmixing(polish=0)(adapter(GREY, data, batch=batch, optimizer=optimizer, rate=rate), generator=seed())
    assert found.value.shape == data.images.shape
    assert ((found.value >= 0) & (found.value <= 1)).all()
    assert scores(found.value, data.images).min() > 40
    assert found.status.startswith(f"{N} samples span the first layer, {N} told apart")
    assert found.labels is not None
    assert sorted(found.labels.tolist()) == sorted(data.labels.tolist())
    other = Unmixing(polish=0)(adapter(GREY, digits(100), batch=batch), generator=seed())
    assert scores(other.value, data.images).median() < 20


def test_natural_pictures_come_back_by_the_units_that_are_off() -> None:
    data = colours()
    found = Unmixing()(adapter(COLOUR, data, rate=1e-3, steps=100), generator=seed())
    assert "units that are off" in found.status
    assert scores(found.value, data.images).min() > 40
    mean = data.images.mean(0, keepdim=True).expand_as(data.images)
    assert psnr_db(mean, data.images).max() < 20


def test_the_replay_of_the_training_brings_an_adapter_that_moved_far_to_the_digits() -> None:
    data = colours()
    observation = adapter(COLOUR, data, rate=0.02, steps=100)
    rough, fine = (Unmixing(polish=p)(observation, generator=seed()) for p in (0, 8))
    assert fine.residual < rough.residual / 2
    assert scores(fine.value, data.images).median() > scores(rough.value, data.images).median() + 6
    assert [value for _, value in fine.trace] == sorted((value for _, value in fine.trace), reverse=True)


@pytest.mark.parametrize("architecture", [GREY, COLOUR])
def test_a_batch_comes_back_from_its_gradient_to_the_rounding_of_float32(architecture: Architecture) -> None:
    data = digits() if architecture is GREY else colours()
    found = Unmixing()(gradient(architecture, data), generator=seed())
    assert scores(found.value, data.images).min() > 80
    assert found.outcome is Outcome.SOLVED


@pytest.mark.parametrize("count", [24, 40])
def test_large_batches_come_back_to_the_rounding_of_float32(count: int) -> None:
    # 256 units have 6 rows for every unknown of 40 samples. The gradient's 24 bits are 144 dB; the condition of the inputs, the
    # ratio of their singular values, stays below 100 for pictures of noise, which is 40 dB; 20 dB are left for the sums.
    random = seed()
    images = torch.rand(count, 3, 32, 32, generator=random)
    labels = torch.randint(10, (count,), generator=random)
    model = Model.of(COLOUR.build(0), COLOUR)
    released = Gradient().simulate(model, model.parameters, images, labels)
    observation = PictureObservation(model=model, released={name: t.detach() for name, t in released.items()})
    found = Unmixing()(observation, generator=seed())
    assert scores(found.value, images).min() > 80
    assert found.outcome is Outcome.SOLVED
    # A batch and a gradient of another one do not explain each other.
    assert observation.residual(torch.rand(count, 3, 32, 32, generator=random), labels) > 0.1


def test_a_gradient_that_no_network_gave_is_not_called_solved() -> None:
    observation = gradient(COLOUR, colours())
    random = seed()
    name = "2.weight"
    wrong = torch.randn(256, 6, generator=random) @ torch.randn(6, 3072, generator=random)  # six samples without a ReLU
    released = {**observation.released, name: wrong * observation.released[name].norm() / wrong.norm()}
    found = Unmixing(searches=3)(replace(observation, released=released), generator=seed())
    assert found.outcome is not Outcome.SOLVED


def test_an_update_of_several_steps_holds_the_same_span() -> None:
    data = digits()
    model = Model.of(GREY.build(0), GREY)
    release = Update(recipe=Recipe(learning_rate=0.01, steps=6, batch_size=2))
    released = release.simulate(model, model.parameters, data.images, data.labels)
    observation = PictureObservation(
        model=model, release=release, released={k: t.detach() for k, t in released.items()}, batch_size=N
    )
    assert scores(Unmixing()(observation, generator=seed()).value, data.images).min() > 30


def test_the_truth_lies_in_the_span_and_explains_its_mixture() -> None:
    data = digits()
    observation = gradient(GREY, data).to(torch.float64)
    exact = PictureObservation(
        model=observation.model,
        released=Gradient().simulate(
            observation.model, observation.model.parameters, data.images.double(), data.labels
        ),
    )
    span = span_of(exact)
    x = span.network.inputs(data.images)
    c = x @ span.basis.T
    assert torch.allclose(c @ span.basis, x, atol=1e-9)
    left, d = explained(span, c)
    assert left < 1e-6
    assert torch.allclose(d.T @ x, exact.released["2.weight"], atol=1e-6)
    assert torch.equal(labelled(exact, span, c)[1], data.labels)


def test_given_labels_put_the_pictures_into_their_order() -> None:
    data = digits()
    assert len(set(data.labels.tolist())) == N
    found = Unmixing()(replace(gradient(GREY, data), labels=data.labels), generator=seed())
    assert psnr_db(found.value, data.images).min() > 80


def test_what_peft_trained_comes_back_with_the_adapter_before_training(tmp_path: Path) -> None:
    data, model = digits(), Model.of(GREY.build(0), GREY)
    settings: dict[str, Any] = {"rank": RANK, "seed": 42, "target_modules": "all-linear"}
    ended = fine_tune(model, data, out=tmp_path / "a", recipe=Recipe(learning_rate=0.05, steps=60), **settings)[0]
    with pytest.raises(NotObserved, match="A_0 is not known"):
        Unmixing()(replace(ended, release=replace(ended.adapter, origin="unknown")), generator=seed())
    # The first step of SGD moves B only.
    one = fine_tune(model, data, out=tmp_path / "b", recipe=Recipe(learning_rate=0.05, steps=1), **settings)[0]
    start = {name: t if name.endswith("lora_A") else 0 * t for name, t in one.adapter.ended(one.released).items()}
    release, released = ended.adapter.begun(ended.released, start, "given")
    found = Unmixing()(replace(ended, release=release, released=released), generator=seed())
    assert scores(found.value, data.images).min() > 40


def test_the_certificate_tells_members_from_others() -> None:
    data, others = digits(), pictures.load("digits", "train", limit=1_000)
    observation = adapter(GREY, data, batch=2, rank=16)
    for origin in ("given", "unknown"):
        seen = replace(observation, release=replace(observation.adapter, origin=origin))
        p = certificate(seen, torch.cat([data.images, others.images]))
        assert p[:N].max() < 1e-6
        assert p[N:].min() > 1e-6
        assert 0.3 < p[N:].mean() < 0.7
    with pytest.raises(NotObserved, match="more rows"):
        certificate(adapter(GREY, digits(0, 12)), data.images)


def test_the_same_generator_gives_the_same_pictures() -> None:
    observation = adapter(GREY, digits())
    a, b = (Unmixing()(observation, generator=seed()).value for _ in range(2))
    assert torch.equal(a, b)


def test_what_it_refuses() -> None:
    data = digits()
    cases = {
        "the span is full": replace(adapter(GREY, data, rank=2), batch_size=N),
        "no span is left": adapter(GREY, data, optimizer="adamw", rate=1e-3),
        "does not change 2": adapter(GREY, data, modules=("4", "6")),
        "fully connected ReLU": gradient(Architecture("lenet", (1, 8, 8), 10), data),
        "lora_A did not move": adapter(GREY, data, steps=1),
    }
    for reason, observation in cases.items():
        with pytest.raises(NotObserved, match=reason):
            Unmixing()(observation, generator=seed())
