"""What the attacker sees, against plain autograd and a plain torch.optim.SGD loop."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradleak.errors import BadInput
from gradleak.modalities.losses import CROSS_ENTROPY, CrossEntropy, Loss, Reduction
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.model import Mode, Model
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import GRADIENT, Update
from gradleak.observations.tensors import fingerprint
from gradleak.observations.training import Recipe
from gradleak.victims.gradient import capture_gradient, share_update
from oracles import gradient_by_autograd, tensors_inside, update_by_sgd

SMALL = [
    Architecture("lenet", (1, 8, 8), 10),
    Architecture("mlp", (1, 8, 8), 10),
    Architecture("resnet20", (1, 8, 8), 10),
    Architecture("convnet64", (3, 9, 9), 7),
]
LENET, MLP, RESNET = SMALL[:3]


def pictures(architecture: Architecture, n: int, seed: int = 0) -> Pictures:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(n, *architecture.input_shape, generator=generator)
    labels = torch.randint(architecture.classes, (n,), generator=generator)
    return Pictures(images, labels, tuple(map(str, range(architecture.classes))), "random", "test")


def victim(architecture: Architecture) -> nn.Module:
    """A float64 model whose BatchNorm statistics have left their initial values."""
    module = architecture.build(3).double().train()
    with torch.no_grad():
        module(pictures(architecture, 6, seed=9).images.double())
    return module


def observation_of(
    module: nn.Module,
    architecture: Architecture,
    *,
    mode: Mode = "eval",
    criterion: Loss = CROSS_ENTROPY,
    release: Release = GRADIENT,
) -> PictureObservation:
    """An observation of nothing yet: zeros under the names of the parameters."""
    model = Model.of(module, architecture, mode=mode, criterion=criterion)
    blank = {k: torch.zeros_like(p) for k, p in model.parameters.items()}
    return Observation(model=model, release=release, released=blank, batch_size=4)


def equal(a: dict[str, Tensor], b: dict[str, Tensor], *, relative: float) -> None:
    """Every tensor agrees within `relative` of the norm of its reference, or of the whole where it is zero."""
    assert set(a) == set(b)
    whole = torch.cat([t.flatten() for t in b.values()]).norm()
    for name, reference in b.items():
        assert (a[name] - reference).norm() <= relative * max(reference.norm(), 1e-3 * whole), name


# --- Gradient ---


@pytest.mark.parametrize("architecture", SMALL, ids=lambda a: a.name)
@pytest.mark.parametrize(("mode", "reduction"), [("eval", "sum"), ("train", "mean")])
def test_simulate_is_what_autograd_gives(architecture: Architecture, mode: Mode, reduction: Reduction) -> None:
    module, data = victim(architecture), pictures(architecture, 4)
    images, criterion = data.images.double(), CrossEntropy(reduction=reduction)
    simulated = observation_of(module, architecture, mode=mode, criterion=criterion).simulate(images, data.labels)
    expected = gradient_by_autograd(module, images, data.labels, mode=mode, reduction=reduction)
    equal(simulated, expected, relative=1e-9)  # float64 has 16 digits; BatchNorm's divisions cost some of them


def test_the_two_modes_differ_where_there_is_batch_norm() -> None:
    module, data = victim(RESNET), pictures(RESNET, 4)
    modes: tuple[Mode, ...] = ("eval", "train")
    by_mode = [observation_of(module, RESNET, mode=m).simulate(data.images.double(), data.labels) for m in modes]
    name = "1.weight"
    assert (by_mode[0][name] - by_mode[1][name]).norm() > 0.1 * by_mode[0][name].norm()


def test_probabilities_serve_as_labels() -> None:
    module, data = victim(MLP), pictures(MLP, 3)
    observation, images = observation_of(module, MLP), data.images.double()
    one_hot = nn.functional.one_hot(data.labels, 10).double()
    equal(observation.simulate(images, one_hot), observation.simulate(images, data.labels), relative=1e-12)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_simulate_leaves_no_trace(mode: Mode) -> None:
    module, data = victim(RESNET), pictures(RESNET, 4)
    observation = observation_of(module, RESNET, mode=mode)
    model = observation.model

    def states() -> list[str]:
        structure = dict(model.module.named_buffers())
        inside = [module.state_dict(), structure, model.parameters, model.buffers or {}]
        return [fingerprint(tensors) for tensors in (*inside, observation.released)]

    before = states()
    observation.simulate(data.images.double(), data.labels)
    assert states() == before
    assert module.training  # as it was given
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_the_snapshot_does_not_follow_the_module() -> None:
    module = MLP.build(0)
    model = Model.of(module, MLP)
    before = model.state_hash()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    assert model.state_hash() == before
    assert model.parameters["2.weight"].data_ptr() != dict(module.named_parameters())["2.weight"].data_ptr()


def test_the_numbers_are_there_once() -> None:
    """A model is its parameters: what it is called with is a structure, and a module to train is a copy."""
    module, data = victim(RESNET), pictures(RESNET, 2)
    model = Model.of(module, RESNET)
    assert all(p.is_meta for p in model.module.parameters())
    solid = model.solid().eval()
    assert fingerprint(solid.state_dict()) == fingerprint(module.state_dict())
    with torch.no_grad():
        expected = module.eval()(data.images.double())
        torch.testing.assert_close(model.logits({}, data.images.double()), expected, rtol=1e-12, atol=1e-12)
        for p in solid.parameters():
            p.zero_()
        torch.testing.assert_close(model.logits({}, data.images.double()), expected, rtol=1e-12, atol=1e-12)


def test_frozen_parameters_have_no_gradient() -> None:
    module, data = victim(MLP), pictures(MLP, 2)
    module.get_parameter("2.weight").requires_grad_(False)
    captured, _ = capture_gradient(Model.of(module.float(), MLP), data)
    assert captured.model.frozen == ("2.weight",)
    assert "2.weight" not in captured.released
    expected = gradient_by_autograd(module, data.images, data.labels)
    equal(captured.released, expected, relative=1e-5)
    with pytest.raises(BadInput, match=r"2\.weight 256x64 is not a trained parameter"):
        replace(captured, released={**captured.released, "2.weight": torch.ones(256, 64)})


def test_dropout_is_left_out() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10)).double()
    data = pictures(MLP, 3)
    simulated = observation_of(module, MLP, mode="train").simulate(data.images.double(), data.labels)
    expected = gradient_by_autograd(module, data.images.double(), data.labels, mode="eval")
    equal(simulated, expected, relative=1e-12)


# --- Update ---


def update_of(
    module: nn.Module, architecture: Architecture, *, steps: int, batch: int, mode: Mode = "eval"
) -> PictureObservation:
    recipe = Recipe(learning_rate=0.07, steps=steps, batch_size=batch)
    return observation_of(module, architecture, mode=mode, release=Update(recipe=recipe))


@pytest.mark.parametrize("architecture", [LENET, RESNET], ids=lambda a: a.name)
def test_one_local_step_is_minus_the_learning_rate_times_the_gradient(architecture: Architecture) -> None:
    module, data = victim(architecture), pictures(architecture, 4)
    images = data.images.double()
    update = update_of(module, architecture, steps=1, batch=4)
    simulated = update.simulate(images, data.labels)
    gradient = gradient_by_autograd(module, images, data.labels)
    equal(simulated, {name: -0.07 * g for name, g in gradient.items()}, relative=1e-6)
    equal(replace(update, released=simulated).as_gradient(), gradient, relative=1e-6)


def test_an_update_of_several_steps_holds_the_mean_of_their_gradients() -> None:
    """Of plain SGD exactly so: theta_k - theta_0 = -rate * the sum of the gradients along the way."""
    module, data = victim(MLP), pictures(MLP, 4)
    images = data.images.double()
    update = update_of(module, MLP, steps=3, batch=2)
    update = replace(update, released=update.simulate(images, data.labels))
    walked, sums = copy.deepcopy(module), dict[str, Tensor]()
    for rows in (slice(0, 2), slice(2, 4), slice(0, 2)):
        g = gradient_by_autograd(walked, images[rows], data.labels[rows])
        sums = {name: sums.get(name, 0) + tensor for name, tensor in g.items()}
        with torch.no_grad():
            for name, p in walked.named_parameters():
                p.sub_(0.07 * g[name])
    mean = {name: tensor / 3 for name, tensor in sums.items()}
    equal(update.as_gradient(), mean, relative=1e-9)
    sketches = update.sketches()
    assert [s.module for s in sketches] == ["2", "4", "6"]
    equal(
        {f"{s.module}.weight": s.measured for s in sketches},
        {k: v for k, v in mean.items() if v.ndim == 2},
        relative=1e-9,
    )
    assert update.release.inexact() == "3 steps were taken, and their mean stands in"


def test_an_update_says_how_far_the_parameters_were_rounded() -> None:
    """float32 parameters near 1 lie 2^-23 apart; k steps round k times; the gradient is rate * k times smaller."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.constant_(module.get_parameter("1.weight"), 1.5)
    for steps in (1, 4):
        update = update_of(module, Architecture("own", (1, 8, 8), 10), steps=steps, batch=4)
        [sketch] = update.sketches()
        expected = 2.0**-23 / 12**0.5 * steps**0.5 / (0.07 * steps)
        assert sketch.noise is not None
        torch.testing.assert_close(sketch.noise, torch.full((10,), expected).to(sketch.noise), rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    ("n", "steps", "batch"),
    [(4, 2, 2), (5, 3, 2), (5, 7, 2), (4, 3, 9)],
    ids=["one pass", "short last chunk", "two passes, chunks that do not divide", "a chunk larger than the data"],
)
def test_local_steps_are_those_of_torch_sgd(n: int, steps: int, batch: int, mode: Mode) -> None:
    architecture = LENET if mode == "eval" else RESNET
    module, data = victim(architecture), pictures(architecture, n)
    images = data.images.double()
    simulated = update_of(module, architecture, steps=steps, batch=batch, mode=mode).simulate(images, data.labels)
    expected = update_by_sgd(
        module, images, data.labels, learning_rate=0.07, local_steps=steps, local_batch_size=batch, mode=mode
    )
    equal(simulated, expected, relative=1e-8)  # float64, several steps in a row


def test_an_update_can_be_differentiated_with_respect_to_the_images() -> None:
    module, data = victim(LENET), pictures(LENET, 2)
    update = update_of(module, LENET, steps=2, batch=1)
    direction = torch.randn(data.images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    images, small = data.images.double(), 1e-6

    def length(x: Tensor) -> Tensor:
        return torch.cat([t.flatten() for t in update.simulate(x, data.labels).values()]).square().sum()

    slope = (torch.func.grad(length)(images) * direction).sum()
    with torch.no_grad():
        difference = (length(images + small * direction) - length(images - small * direction)) / (2 * small)
    torch.testing.assert_close(slope, difference, rtol=1e-5, atol=0)  # central differences: error of order small^2


def test_a_shared_update_withholds_what_the_gradient_withheld() -> None:
    module, data = victim(RESNET).float(), pictures(RESNET, 4)
    own = Model.of(module, RESNET)
    gradient, secret = capture_gradient(own, data, reveal_buffers=False, reveal_batch_size=False)
    update = share_update(gradient, secret, Recipe(learning_rate=0.05, steps=3, batch_size=2), model=own)
    assert update.model.buffers is None
    assert update.batch_size is None
    assert update.labels is None
    expected = update_by_sgd(module, data.images, data.labels, learning_rate=0.05, local_steps=3, local_batch_size=2)
    # The client knew the true statistics. The difference of two float32 states keeps about 1e-7 |theta| / |update|.
    equal(update.released, expected, relative=1e-3)


@pytest.mark.parametrize("wrong", [{"learning_rate": 0.0}, {"steps": 0}, {"batch_size": -1}])
def test_a_recipe_of_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="above zero"):
        replace(Recipe(learning_rate=0.07, steps=1, batch_size=1), **wrong)


def test_diverging_local_training_is_refused() -> None:
    module, data = MLP.build(0), pictures(MLP, 4)
    gradient, secret = capture_gradient(Model.of(module, MLP), data)
    with pytest.raises(BadInput, match="diverged at learning rate 1e\\+30"):
        share_update(gradient, secret, Recipe(learning_rate=1e30, steps=4, batch_size=4))


# --- What was revealed ---


def revealed(observation: PictureObservation) -> dict[str, bool]:
    return {str(row["item"]): bool(row["revealed"]) for row in observation.threat_model()}


def test_the_threat_model_follows_the_fields() -> None:
    module, data = victim(RESNET).float(), pictures(RESNET, 4)
    everything, _ = capture_gradient(Model.of(module, RESNET), data, reveal_labels=True)
    nothing, _ = capture_gradient(Model.of(module, RESNET), data, reveal_buffers=False, reveal_batch_size=False)
    rows = revealed(everything)
    assert {item for item, seen in rows.items() if not seen} == {"images"}
    hidden = {item for item, seen in revealed(nothing).items() if not seen}
    assert hidden == {"images", "labels", "buffers", "batch size"}
    assert list(rows) == list(revealed(nothing))  # a row never vanishes


def test_the_threat_model_says_how() -> None:
    module, data = victim(RESNET).float(), pictures(RESNET, 4)
    observation, _ = capture_gradient(Model.of(module, RESNET, mode="train"), data, precision=torch.float16)
    rows = {row["item"]: str(row["detail"]) for row in observation.threat_model()}
    assert "float16" in rows["released"]
    assert f"{len(list(module.parameters()))} tensors" in rows["released"]
    assert rows["architecture"] == "resnet20, 1x8x8"
    assert f"{sum(p.numel() for p in module.parameters()):,}" in rows["parameters"]
    assert rows["mode"].startswith("train")
    assert "mean" in rows["loss"]
    assert rows["batch size"] == "4"
    update = update_of(victim(MLP), MLP, steps=3, batch=2)
    training = {row["item"]: str(row["detail"]) for row in update.threat_model()}["local training"]
    assert all(part in training for part in ("3 sgd steps", "0.07", "2 samples"))
    assert [row["item"] for row in update.threat_model()][-1] == "images"


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_withheld_buffers_are_nowhere_in_the_observation(mode: Mode) -> None:
    module, data = victim(RESNET).float(), pictures(RESNET, 4)
    truth = {k: v.clone() for k, v in module.state_dict().items() if k.rpartition(".")[2].startswith("running")}
    assert len(truth) > 30
    model = Model.of(module, RESNET, mode=mode)
    open_, _ = capture_gradient(model, data)
    closed, _ = capture_gradient(model, data, reveal_buffers=False)

    def leaks(observation: PictureObservation) -> set[str]:
        inside = tensors_inside(observation)
        return {
            name for name, true in truth.items() if any(t.shape == true.shape and torch.equal(t, true) for t in inside)
        }

    assert leaks(open_) == set(truth)  # the search finds them where they are
    assert leaks(closed) == set()
    assert leaks(closed.to(torch.float64)) == set()
    assert leaks(replace(closed, model=closed.model.assume(mode="eval"))) == set()


def test_withheld_buffers_are_replaced_by_the_initial_ones() -> None:
    module, data = victim(RESNET).float(), pictures(RESNET, 4)
    closed, _ = capture_gradient(Model.of(module, RESNET), data, reveal_buffers=False)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
    expected = gradient_by_autograd(module, data.images, data.labels)
    equal(closed.simulate(data.images, data.labels), expected, relative=1e-4)  # float32, 20 layers


def test_the_state_hash_sees_a_single_bit() -> None:
    model = Model.of(victim(RESNET).float(), RESNET)
    assert model.buffers is not None

    def flipped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = next(iter(tensors))
        changed = tensors[name].clone()
        changed.view(torch.int32).flatten()[0] ^= 1
        return {**tensors, name: changed}

    assert replace(model, parameters=flipped(model.parameters)).state_hash() != model.state_hash()
    assert replace(model, buffers=flipped(model.buffers)).state_hash() != model.state_hash()
    assert model.to(torch.float64).state_hash() != model.state_hash()  # the type belongs to it


# --- Refusals ---


def test_a_release_may_lack_parameters() -> None:
    """What is there is the gradient of those: nothing else is simulated, or asked for."""
    module, data = victim(MLP), pictures(MLP, 2)
    whole = observation_of(module, MLP)
    for release in (GRADIENT, Update(recipe=Recipe(learning_rate=0.1, steps=1))):
        part = {name: tensor for name, tensor in whole.released.items() if name in ("4.weight", "6.bias")}
        observation = replace(whole, release=release, released=part)
        expected = gradient_by_autograd(module, data.images.double(), data.labels)
        simulated = replace(observation, released=observation.simulate(data.images.double(), data.labels))
        equal(simulated.as_gradient(), {name: expected[name] for name in part}, relative=1e-9)
    with pytest.raises(BadInput, match="Nothing was released"):
        replace(whole, released={})


def test_the_first_tensor_that_differs_is_named() -> None:
    observation = observation_of(MLP.build(0), MLP)
    released = observation.released
    with pytest.raises(BadInput, match=r"2\.weight is 256x63 in the release and 256x64 in the model"):
        replace(observation, released={**released, "2.weight": torch.zeros(256, 63), "4.bias": torch.zeros(1)})
    with pytest.raises(BadInput, match=r"Released tensor extra 2x3 is not a trained parameter"):
        replace(observation, released={**released, "extra": torch.zeros(2, 3)})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    observation = observation_of(MLP.build(0), MLP)
    broken = observation.released["4.bias"].clone()
    broken[7] = value
    with pytest.raises(BadInput, match=r"4\.bias has entries that are NaN or infinite"):
        replace(observation, released={**observation.released, "4.bias": broken})


def test_pictures_that_the_model_cannot_take_are_refused() -> None:
    data = pictures(MLP, 2)
    with pytest.raises(BadInput, match="1x8x8, the model takes 3x8x8"):
        capture_gradient(Model.of(MLP.build(0), Architecture("mlp", (3, 8, 8), 10)), data)
    with pytest.raises(BadInput, match="beyond the model's 10 classes"):
        capture_gradient(Model.of(MLP.build(0), MLP), replace(data, labels=torch.tensor([1, 10])))
