"""Flags: raised when they should be, and only then."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.audit.checks import check_observation, check_result, information, replay
from gradleak.audit.scoring import SCORING
from gradleak.formats.secret_file import Secret
from gradleak.modalities.losses import CrossEntropy
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load
from gradleak.observations.adapter import Adapter
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.training import Recipe
from gradleak.report.record import Flag
from gradleak.victims.adapter import lora_start
from gradleak.victims.gradient import capture_gradient, share_update

MLP = Architecture("mlp", (1, 8, 8), 10)
RESNET = Architecture("resnet20", (1, 8, 8), 10)
PUBLIC = load("digits", "train", limit=20)


def private() -> Pictures:
    return load("digits", indices=(3, 1, 4))


def victim(architecture: Architecture) -> nn.Module:
    module = architecture.build(5).train()
    with torch.no_grad():
        module(PUBLIC.images)
    return module


def captured(
    architecture: Architecture = MLP, mode: Any = "eval", **arguments: Any
) -> tuple[PictureObservation, Secret]:
    return capture_gradient(Model.of(victim(architecture), architecture, mode=mode), private(), **arguments)


def named(flags: list[Flag]) -> dict[str, Flag]:
    assert len({f["name"] for f in flags}) == len(flags)
    return {f["name"]: f for f in flags}


# --- Before an attack ---


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("architecture", [MLP, RESNET], ids=lambda a: a.name)
def test_an_ordinary_gradient_raises_nothing(architecture: Architecture, mode: str) -> None:
    flags = named(check_observation(captured(architecture, mode=mode)[0]))
    assert all(flag["level"] == "info" for flag in flags.values())  # a ReLU network may have dead tensors


def test_a_vanishing_gradient() -> None:
    observation, _ = captured()
    small = {name: 1e-9 * tensor for name, tensor in observation.released.items()}
    flags = named(check_observation(replace(observation, released=small)))
    assert flags["vanishing_gradient"]["level"] == "warning"
    assert "fitted" in flags["vanishing_gradient"]["sentence"]


def test_an_update_is_judged_in_units_of_a_gradient() -> None:
    gradient, secret = captured()
    update = share_update(gradient, secret, Recipe(learning_rate=1e-3, steps=1, batch_size=3))
    small = {name: 1e-4 * tensor for name, tensor in update.released.items()}  # norm 1e-7, of a gradient 1e-4
    flags = named(check_observation(replace(update, released=small)))
    assert "vanishing_gradient" not in flags


def test_zero_tensors_are_counted_and_named() -> None:
    observation, _ = captured()
    zero = {name: tensor * (name != "2.weight") for name, tensor in observation.released.items()}
    flags = named(check_observation(replace(observation, released=zero)))
    assert flags["zero_tensors"]["sentence"].startswith("1 of 6 released tensors")
    assert "2.weight" in flags["zero_tensors"]["sentence"]


def test_dropout_in_train_mode() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))
    for mode, flagged in (("train", True), ("eval", False)):
        observation, _ = capture_gradient(Model.of(module, MLP, mode=mode), private())  # type: ignore[arg-type]
        assert ("dropout" in named(check_observation(observation))) == flagged


def test_another_loss_than_cross_entropy() -> None:
    module, data = victim(MLP), private()
    nn.functional.mse_loss(module(data.images), torch.zeros(3, 10)).backward()  # type: ignore[no-untyped-call]
    released = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    observation = Observation(model=Model.of(module, MLP), released=released, batch_size=3)
    assert named(check_observation(observation))["not_cross_entropy"]["level"] == "warning"


# --- Replay ---


@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_replay_confirms_the_truth(mode: str, precision: torch.dtype) -> None:
    observation, secret = captured(RESNET, mode=mode, precision=precision)
    (flag,) = replay(observation, secret.inputs, secret.labels)
    assert flag["level"] == "info"
    assert "reproduces" in flag["sentence"]


def test_replay_confirms_an_update() -> None:
    gradient, secret = captured(RESNET, mode="train")
    update = share_update(gradient, secret, Recipe(learning_rate=0.1, steps=3, batch_size=2))
    (flag,) = replay(update, secret.inputs, secret.labels)
    assert flag["level"] == "info"


def replayed(observation: PictureObservation, secret: Secret, **beliefs: Any) -> str:
    wrong = replace(observation, model=observation.model.assume(**beliefs))
    (flag,) = replay(wrong, secret.inputs, secret.labels)
    assert flag["name"] == "replay"
    assert flag["level"] == "error"
    return flag["sentence"]


@pytest.mark.parametrize(("true", "believed"), [("train", "eval"), ("eval", "train")])
def test_replay_names_the_mode_that_fits(true: str, believed: str) -> None:
    observation, secret = captured(RESNET, mode=true)
    sentence = replayed(observation, secret, mode=believed)
    assert "does not reproduce" in sentence
    assert sentence.endswith(f"but it does in {true} mode, mean reduction.")


def test_replay_names_the_reduction_that_fits() -> None:
    observation, secret = captured(RESNET)
    assert replayed(observation, secret, criterion=CrossEntropy(reduction="sum")).endswith(
        "but it does in eval mode, mean reduction."
    )


def test_replay_names_both_modes_where_there_is_no_batch_norm() -> None:
    observation, secret = captured(MLP)
    sentence = replayed(observation, secret, criterion=CrossEntropy(reduction="sum"))
    assert "train mode, mean reduction" in sentence
    assert "eval mode, mean reduction" in sentence


def test_replay_names_the_other_buffers() -> None:
    observation, secret = captured(RESNET)
    true = observation.model.buffers
    assert true is not None
    shifted = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in true.items()}
    wrong = replace(observation, model=observation.model.assume(buffers=shifted))
    (flag,) = replay(wrong, secret.inputs, secret.labels, buffers=true)
    assert "but it does in eval mode, mean reduction, the other buffers" in flag["sentence"]


def test_replay_of_other_images_fits_nothing() -> None:
    observation, secret = captured(RESNET)
    (flag,) = replay(observation, 1 - secret.inputs, secret.labels)
    assert "weights, buffers, loss or preprocessing differ" in flag["sentence"]


# --- After an attack ---


def result(images: Tensor, labels: Tensor | None, residual: float) -> Reconstruction:
    return Reconstruction(images, labels, residual, "made by hand", Outcome.CLOSE)


def after(
    observation: PictureObservation,
    secret: Secret,
    *,
    residual: float = 1e-3,
    psnr_db: tuple[float, ...] = (30.0, 30.0, 30.0),
    blind_psnr_db: tuple[float, ...] = (12.0, 12.0, 12.0),
    public: Tensor = PUBLIC.images,
) -> dict[str, Flag]:
    flags = check_result(
        observation,
        SCORING["pictures"],
        result(secret.inputs, secret.labels, residual),
        secret,
        leads=[own - blind for own, blind in zip(psnr_db, blind_psnr_db, strict=True)],
        public=replace(PUBLIC, images=public),
    )
    return named(flags)


def test_a_good_result_raises_nothing() -> None:
    assert after(*captured()) == {}


def test_a_result_that_explains_more_than_the_truth() -> None:
    observation, secret = captured()
    defended = {name: tensor + 0.1 * tensor.std() for name, tensor in observation.released.items()}
    flags = after(replace(observation, released=defended), secret, residual=1e-4)
    assert flags["better_than_truth"]["level"] == "error"
    assert "better" in flags["better_than_truth"]["sentence"]


@pytest.mark.parametrize("precision", [torch.float32, torch.float16], ids=str)
def test_rounding_is_no_reason_to_distrust_an_exact_result(precision: torch.dtype) -> None:
    """An exact attack may fit the rounding of the release a little better than the truth does."""
    observation, secret = captured(precision=precision)
    assert "better_than_truth" not in after(observation, secret, residual=0.0)


def test_no_better_than_blind_counts_the_images() -> None:
    flags = after(*captured(), psnr_db=(30.0, 12.0, 11.0))
    assert flags["no_better_than_blind"]["level"] == "warning"
    assert flags["no_better_than_blind"]["sentence"].startswith("2 of 3 images")


def test_a_secret_in_the_public_pool_is_noticed() -> None:
    observation, secret = captured()
    flags = after(observation, secret, public=torch.cat([PUBLIC.images, secret.inputs[1:2]]))
    assert flags["secret_is_public"]["level"] == "error"
    assert flags["secret_is_public"]["sentence"].startswith("1 private images")


def test_a_result_that_explains_little() -> None:
    assert after(*captured(), residual=0.7)["unexplained"]["level"] == "warning"


def test_a_diverged_result_is_not_passed_over() -> None:
    flags = after(*captured(), residual=float("nan"), psnr_db=(float("nan"),) * 3)
    assert {"no_better_than_blind", "unexplained"} <= set(flags)


# --- Where training leaves room ---


@pytest.mark.parametrize(("images", "level"), [("true", "warning"), ("other", "error")])
def test_what_training_leaves_uncertain_is_no_error_but_unrelated_data_are(images: str, level: str) -> None:
    """An update that is believed to be one of two steps of Adam: its direction is kept, its size is not."""
    gradient, secret = captured()
    update = share_update(gradient, secret, Recipe(learning_rate=0.1, steps=2, batch_size=2))
    believed = replace(
        update, release=replace(update.release, recipe=Recipe(learning_rate=0.05, steps=2, batch_size=2))
    )
    inputs = secret.inputs if images == "true" else 5 * (1 - secret.inputs)
    (flag,) = replay(believed, inputs, secret.labels)
    assert flag["level"] == level


def test_unknown_defenses_are_told() -> None:
    observation, _ = captured()
    assert named(check_observation(replace(observation, defenses=None)))["defense_unknown"]["level"] == "warning"


@pytest.mark.parametrize(
    ("recipe", "counted"),
    [
        (Recipe(learning_rate=0.01, steps=1), True),
        (Recipe(learning_rate=0.01, steps=50), False),
        (Recipe(optimizer="adam", learning_rate=1e-3, steps=1), False),
        (None, False),
    ],
)
def test_what_is_missing_is_said_of_one_sketch_and_of_nothing_else(recipe: Recipe | None, counted: bool) -> None:
    """One row of A sees one direction of the gradient: one step tells part of 64 pixels at most. After
    fifty, A has moved within the span of the pictures, which a bound for one step does not count."""
    model = Model.of(MLP.build(0), MLP)
    start = lora_start(model, [last_linear(model)], 1, torch.Generator())
    adapter = Adapter(start=start, scaling=dict.fromkeys({n.rpartition(".")[0] for n in start}, 1.0), recipe=recipe)
    one = load("digits", "test", indices=[0])
    blank = {k: torch.zeros_like(t) for k, t in start.items() if k.endswith("lora_B")}
    seen = Observation(model=model, release=adapter, released=blank, batch_size=1)
    seen = replace(seen, released={k: t.detach() for k, t in seen.simulate(one.images, one.labels).items()})
    [flag] = information(seen, one.images, one.labels, "at the truth")
    assert (flag["name"] in ("information_absent", "information_partial")) is counted
    assert ("is not counted" in flag["sentence"]) is not counted
    assert counted or "is absent" not in flag["sentence"]


def last_linear(model: PictureModel) -> str:
    return [name.removesuffix(".weight") for name, t in model.parameters.items() if t.dim() == 2][-1]
