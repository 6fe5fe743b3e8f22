"""One suite for every attack of ATTACKS: what a user may rely on, whichever attack is chosen.

Each attack gets a victim that it can handle and a budget that ends in about a second. An attack that is added to
ATTACKS must be given a case here.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradleak.attacks import ATTACKS
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.audit.loop import Attack
from gradleak.errors import NotObserved
from gradleak.formats.observation_file import load_reconstruction, save_reconstruction
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load
from gradleak.observations.distances import relative_residual
from gradleak.observations.observation import Adapter, Gradient
from gradleak.observations.tensors import fingerprint
from gradleak.observations.training import Recipe
from gradleak.victims.gradient import capture_gradient
from oracles import psnr_db_by_hand

LENET = Architecture("lenet", (1, 8, 8), 10)
MLP = Architecture("mlp", (1, 8, 8), 10)
VIT = Architecture("vit", (1, 8, 8), 10)
SEARCH = {"evaluations": 60, "rounds": 1, "round_evaluations": 40, "restarts": 1}
SHORT = {"evaluations": 1, "rounds": 0, "restarts": 1}


@dataclass(frozen=True)
class Case:
    """A victim and a budget. `short`: the smallest budget the attack takes, None for a closed form."""

    architecture: Architecture
    budget: dict[str, Any]
    short: dict[str, Any] | None
    rank: int | None = None  # of the LoRA adapter that is observed in place of a gradient


CASES = {
    "analytic": Case(MLP, {}, None),
    "dlg": Case(LENET, SEARCH, SHORT),
    "idlg": Case(LENET, SEARCH, SHORT),
    "recursive": Case(LENET, {}, None),
    "token-span": Case(VIT, {}, None),
    "activation-patterns": Case(MLP, {"sweeps": 10}, {"sweeps": 1, "rounds": 0}, rank=8),
    "map-inversion": Case(LENET, {"evaluations": 15}, {"evaluations": 1}),
    "ntk": Case(MLP, {"steps": 100}, None),
    "inverting-gradients": Case(LENET, {"steps": 80}, {"steps": 1}),
}
PUBLIC = load("digits", "train")

# Need a generator that was trained for the victim: unit/test_learned.py has what they must do.
LEARNED = ("git", "exact-git", "lti")

every_attack = pytest.mark.parametrize("name", [name for name in ATTACKS if name not in LEARNED])
every_attack_and_learned = pytest.mark.parametrize("name", ATTACKS)


def attack(name: str) -> Attack:
    made: Attack = ATTACKS[name](**CASES[name].budget)
    return made


def private(row: int = 0) -> Pictures:
    return load("digits", indices=[row])


@cache
def observed(name: str, row: int = 0, reveal_labels: bool = False) -> Gradient:
    architecture = CASES[name].architecture
    module = architecture.build(row)
    gradient = capture_gradient(module, architecture, private(row), reveal_labels=reveal_labels)[0]
    rank = CASES[name].rank
    return gradient if rank is None else adapted(gradient, private(row), rank)


def adapted(gradient: Gradient, pictures: Pictures, rank: int) -> Adapter:
    """One SGD step of LoRA from its usual start, on every linear layer."""
    weights = {k: p for k, p in gradient.model.parameters.items() if k.endswith("weight")}
    start = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        start[f"{module}.lora_A"] = torch.randn(rank, weight.shape[1], generator=seed()) / weight.shape[1] ** 0.5
        start[f"{module}.lora_B"] = torch.zeros(len(weight), rank)
    blank = Adapter(
        model=gradient.model,
        released={name: tensor for name, tensor in start.items() if name.endswith("lora_B")},
        start=start,
        scaling={name.removesuffix(".weight"): 1.0 for name in weights},
        recipe=Recipe(learning_rate=0.01, steps=1),
        batch_size=1,
        labels=gradient.labels,
    )
    return replace(blank, released=blank.simulate(pictures.images, pictures.labels))


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@cache
def reconstruction(name: str, row: int = 0) -> Reconstruction:
    """The attack on one image, once for all the tests that only look at the result."""
    return attack(name)(observed(name, row), generator=seed(row))


def everything(observation: Gradient) -> dict[str, str | None]:
    model = observation.model
    return {
        "released": fingerprint(observation.released),
        "labels": None if observation.labels is None else fingerprint({"labels": observation.labels}),
        "state": model.state_hash(),
        "module": fingerprint(model.module.state_dict()),
        "mode": str([layer.training for layer in model.module.modules()]),
        "hooks": str([len(layer._forward_hooks) for layer in model.module.modules()]),
        "requires_grad": str([p.requires_grad for p in model.module.parameters()]),
    }


def noisy(observation: Gradient, relative: float, number: int) -> Gradient:
    """White Gaussian noise with `relative` times the norm of the release."""
    released, generator = observation.released, seed(number)
    total = sum(t.numel() for t in released.values())
    size = relative * torch.cat([t.flatten() for t in released.values()]).norm() / total**0.5
    noise = {name: size * torch.randn(t.shape, generator=generator) for name, t in released.items()}
    return replace(observation, released={name: t + noise[name] for name, t in released.items()})


def test_every_attack_has_a_case() -> None:
    assert {*CASES, *LEARNED} == set(ATTACKS)


# --- The shape of an attack ---


@every_attack_and_learned
def test_an_attack_is_a_frozen_dataclass_of_plain_values(name: str) -> None:
    kind: Any = ATTACKS[name]
    assert kind.__bases__ == (object,)
    default = kind()  # every field has a default
    with pytest.raises(FrozenInstanceError):
        default.something = 1
    with pytest.raises(TypeError):
        kind(1)  # keywords only
    assert hash(default) == hash(kind())


@every_attack_and_learned
def test_an_attack_round_trips_through_json(name: str) -> None:
    kind: Any = ATTACKS[name]
    for made in (kind(), *([kind(**CASES[name].budget)] if name in CASES else [])):
        assert kind(**json.loads(json.dumps(asdict(made)))) == made


@every_attack_and_learned
def test_the_file_says_what_the_attack_sees_recovers_and_solves(name: str) -> None:
    text = sys.modules[ATTACKS[name].__module__].__doc__ or ""
    assert [word for word in ("Sees", "Recovers", "Solves", "Differs") if f"\n{word} " not in text] == []
    assert text.splitlines()[0].endswith(".")


# --- Its behaviour ---


@every_attack
@pytest.mark.parametrize("reveal_labels", [False, True], ids=["labels withheld", "labels given"])
def test_the_observation_is_left_as_it_was(name: str, reveal_labels: bool) -> None:
    observation = observed(name, reveal_labels=reveal_labels)
    before, state = everything(observation), torch.get_rng_state()
    ATTACKS[name](**(CASES[name].short or {}))(observation, generator=seed())
    assert everything(observation) == before
    assert torch.equal(torch.get_rng_state(), state)  # all randomness comes from the generator


@every_attack
def test_the_same_generator_gives_the_same_bits_watched_or_not(name: str) -> None:
    reports: list[tuple[int, int, float]] = []
    first = reconstruction(name)
    again = attack(name)(observed(name), generator=seed(), on_step=lambda *report: reports.append(report))
    assert (reports == []) == (first.iterations == 0)  # a closed form has nothing to report
    assert all(0 < step <= steps for step, steps, _ in reports)
    assert [step for step, _, _ in reports] == sorted(step for step, _, _ in reports)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    assert (first.residual, first.status, first.iterations, first.trace) == (
        again.residual,
        again.status,
        again.iterations,
        again.trace,
    )


@every_attack
def test_the_result_is_pictures_and_labels(name: str) -> None:
    found = reconstruction(name)
    assert found.images.shape == (1, *CASES[name].architecture.input_shape)
    assert found.images.dtype == torch.float32
    assert found.images.isfinite().all()
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    assert found.labels.shape == (1,)
    assert found.labels.dtype == torch.int64
    assert not found.images.requires_grad
    assert found.status.endswith(".")
    assert found.iterations >= 0
    assert all(a < b for (a, _), (b, _) in zip(found.trace, found.trace[1:], strict=False))


@every_attack
def test_the_residual_is_what_it_is_defined_as(name: str) -> None:
    found, observation = reconstruction(name), observed(name)
    simulated = observation.simulate(found.images, found.labels)
    again = float(relative_residual(simulated, observation.released))
    # DLG measures at soft labels in float64; those of a solved image are hard up to its own residual.
    assert again == pytest.approx(found.residual, rel=0.05, abs=1e-4)


@every_attack
def test_labels_withheld_are_recovered(name: str) -> None:
    for row in range(3):
        assert reconstruction(name, row).labels.tolist() == private(row).labels.tolist()


@every_attack
def test_labels_given_are_kept(name: str) -> None:
    observation = observed(name, reveal_labels=True)
    found = ATTACKS[name](**(CASES[name].short or {}))(observation, generator=seed())
    assert observation.labels is not None
    assert torch.equal(found.labels, observation.labels)


@every_attack
@pytest.mark.parametrize("labels", [False, True], ids=["labels withheld", "labels given"])
def test_without_the_batch_size_it_works_or_says_what_is_missing(name: str, labels: bool) -> None:
    observation = replace(observed(name, reveal_labels=labels), batch_size=None)
    try:
        found = ATTACKS[name](**(CASES[name].short or {}))(observation, generator=seed())
    except NotObserved as reason:
        assert "batch" in str(reason) or "number of images" in str(reason)  # noqa: PT017 (either outcome is allowed)
    else:
        assert found.images.shape == (1, *CASES[name].architecture.input_shape)


@every_attack
def test_a_batch_of_two_works_or_is_refused(name: str) -> None:
    both, architecture = load("digits", indices=[0, 1]), CASES[name].architecture
    observation, _ = capture_gradient(architecture.build(0), architecture, both)
    if (rank := CASES[name].rank) is not None:
        observation = replace(adapted(observation, both, rank), batch_size=2)
    try:
        found = ATTACKS[name](**(CASES[name].short or {}))(observation, generator=seed())
    except NotObserved as reason:
        assert "2 images" in str(reason)  # noqa: PT017
    else:
        assert found.images.shape == (2, *architecture.input_shape)
        assert sorted(found.labels.tolist())[0] in range(10)


@every_attack
def test_the_residual_falls(name: str) -> None:
    observation, short = observed(name), CASES[name].short
    grey = torch.full((1, *CASES[name].architecture.input_shape), 0.5)
    blind = float(relative_residual(observation.simulate(grey, private().labels), observation.released))
    assert reconstruction(name).residual < 0.5 * blind
    if short is not None:
        begun = ATTACKS[name](**short)(observation, generator=seed())
        assert reconstruction(name).residual < 0.5 * begun.residual


@every_attack
def test_a_reconstruction_round_trips_through_a_file(name: str, tmp_path: Path) -> None:
    found = reconstruction(name)
    save_reconstruction(found, tmp_path / "found.safetensors")
    back = load_reconstruction(tmp_path / "found.safetensors")
    assert torch.equal(back.images, found.images)
    assert torch.equal(back.labels, found.labels)
    assert replace(back, images=found.images, labels=found.labels) == found


# --- Its strength ---


@every_attack
def test_it_beats_the_mean_image(name: str) -> None:
    mean = PUBLIC.images.mean(0)
    for row in range(3):
        truth = private(row).images[0]
        blind = psnr_db_by_hand(mean, truth)
        # Half the amplitude of the best blind guess's error is the least that "recovered" can mean.
        assert psnr_db_by_hand(reconstruction(name, row).images[0], truth) >= blind + 6


@every_attack
def test_noise_on_the_gradient_makes_it_worse(name: str) -> None:
    def mean_psnr_db(victim: Callable[[int], Gradient]) -> float:
        scores = []
        for row in range(3):  # another image, model, start and noise each
            try:
                image = attack(name)(victim(row), generator=seed(row)).images[0]
            except NotObserved:  # refused, with a reason: as good as the best blind guess
                image = PUBLIC.images.mean(0)
            scores.append(psnr_db_by_hand(image, private(row).images[0]))
        return sum(scores) / len(scores)

    clean = sum(psnr_db_by_hand(reconstruction(name, r).images[0], private(r).images[0]) for r in range(3)) / 3
    levels = [mean_psnr_db(lambda row, s=s: noisy(observed(name, row), s, 50 + row)) for s in (0.1, 1.0)]  # type: ignore[misc]
    # An attack with a picture prior is hardly limited by noise of 10 %, and three seeds scatter by about a decibel.
    for weaker, stronger in zip([clean, *levels], levels, strict=False):
        assert stronger <= weaker + 1.5
    # As much noise as signal leaves next to nothing: far below what the clean gradient gave.
    assert levels[-1] <= clean - 6


def test_noise_has_the_size_it_says() -> None:
    observation = observed("analytic")
    difference: dict[str, Tensor] = noisy(observation, 0.1, 0).released
    assert float(relative_residual(difference, observation.released)) == pytest.approx(0.1, rel=0.02)
