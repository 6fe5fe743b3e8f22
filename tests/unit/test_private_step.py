"""Steps of DP-SGD: what is simulated is algorithm 1 of Abadi et al. 2016, noise apart, and what is told is what it is."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import norm

from gradleak.attacks.factor import with_factor_found
from gradleak.attacks.recursion.recursive import Recursive
from gradleak.audit.checks import check_observation, replay
from gradleak.audit.metrics import psnr_db
from gradleak.audit.privacy import spent
from gradleak.errors import BadInput
from gradleak.formats.observation_file import load_observation, save_observation
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, load
from gradleak.observations.defenses import GaussianNoise
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.observations.private_step import PrivateStep
from gradleak.observations.releases import Gradient
from gradleak.observations.tensors import Tensors, flatten

ARCHITECTURE = Architecture("lenet", (1, 8, 8), 10)


def pictures(count: int) -> Pictures:
    return load("digits", indices=range(count))


def by_hand(data: Pictures, clip: float, divisor: float) -> Tensors:
    """Algorithm 1, line by line, with autograd."""
    module = ARCHITECTURE.build(0)
    names, parameters = zip(*module.named_parameters(), strict=True)
    total = [torch.zeros_like(p) for p in parameters]
    for x, y in zip(data.images, data.labels, strict=True):
        loss = torch.nn.functional.cross_entropy(module(x[None]), y[None])
        gradient = torch.autograd.grad(loss, parameters)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradient))
        total = [t + g / max(1.0, norm / clip) for t, g in zip(total, gradient, strict=True)]
    return {name: t.detach() / divisor for name, t in zip(names, total, strict=True)}


def observed(count: int, private: PrivateStep) -> PictureObservation:
    data = pictures(count)
    released = by_hand(data, private.clip, private.divisor)
    model = Model.of(ARCHITECTURE.build(0), ARCHITECTURE)
    release = Gradient(private=private)
    return PictureObservation(model=model, release=release, released=released, batch_size=count)


@pytest.mark.parametrize("clip", [0.1, 2.0, 1e6])  # all samples are cut, some, none
def test_each_sample_is_cut_by_itself(clip: float) -> None:
    seen = observed(4, PrivateStep(clip=clip, noise_multiplier=0.0, divisor=5.0))
    data = pictures(4)
    assert seen.residual(data.images, data.labels) < 1e-5  # float32, and the 1e-6 that torch adds to a norm


def test_the_mean_cut_afterwards_is_something_else() -> None:
    """Why this is no defense that a mean could be given to."""
    data, norms = pictures(4), []
    for i in range(4):
        norms.append(float(flatten(by_hand(load("digits", indices=[i]), 1e9, 1.0)).norm()))
    clip = sorted(norms)[1] * 1.001  # two are cut, two are not
    mean = by_hand(data, 1e9, 4.0)
    cut_mean = {name: g * min(1.0, clip / float(flatten(mean).norm())) for name, g in mean.items()}
    seen = observed(4, PrivateStep(clip=clip, noise_multiplier=0.0, divisor=4.0))
    assert float((flatten(cut_mean) - flatten(seen.released)).norm() / flatten(seen.released).norm()) > 0.01


def test_one_cut_sample_comes_back_and_is_called_a_solution() -> None:
    """A cut gradient is a multiple of the true one, which the recursion does not mind (R-GAP, section 3), and the replay knows."""
    seen, data = observed(1, PrivateStep(clip=0.1, noise_multiplier=0.0, divisor=1.0)), pictures(1)
    found = Recursive()(with_factor_found(seen), generator=torch.Generator().manual_seed(0))
    assert psnr_db(found.value, data.images) > 40  # a hundredth of the pixels' range
    assert found.residual < 1e-2
    assert seen.residual(data.images, data.labels) < 1e-5


def test_noise_is_a_defense_on_the_scale_of_what_is_released() -> None:
    private = PrivateStep(clip=2.0, noise_multiplier=0.5, divisor=4.0)
    assert private.defenses == (GaussianNoise(0.25),)
    seen, data = replace(observed(2, private), defenses=private.defenses), pictures(2)
    other = seen.of_others(data.images, data.labels)
    noise = flatten(other.released) - flatten(seen.simulate(data.images, data.labels))
    # The deviation of n numbers is known to 1 / sqrt(2 n): five times that.
    assert float(noise.std()) == pytest.approx(0.25, rel=5 / math.sqrt(2 * len(noise)))
    assert [flag["level"] for flag in replay(other, data.images, data.labels)] == ["warning"]
    assert "defense" in {flag["name"] for flag in check_observation(other)}


def test_the_threat_model_says_what_was_spent() -> None:
    private = PrivateStep(clip=1.0, noise_multiplier=1.1, divisor=8.0, epsilon=3.21, delta=1e-5)
    rows = {row["item"]: row for row in observed(2, private).threat_model()}
    assert rows["privacy spent"]["detail"] == "epsilon 3.21 at delta 1e-05, so far"
    assert rows["private step"]["detail"] == "each sample cut to norm 1, noise multiplier 1.1, sum divided by 8"
    none = {row["item"]: row for row in observed(2, replace(private, noise_multiplier=0.0)).threat_model()}
    assert "without noise" in str(none["privacy spent"]["detail"])


def test_epsilon_is_that_of_one_gaussian_mechanism_unless_an_accountant_says_more() -> None:
    """One release of mu = 1 / noise: delta(epsilon) = Phi(mu/2 - epsilon/mu) - e^epsilon Phi(-mu/2 - epsilon/mu) (Balle and Wang 2018)."""
    found = spent(observed(2, PrivateStep(clip=1.0, noise_multiplier=0.5, divisor=2.0)))["epsilon"]
    delta = float(norm.cdf(1 - found / 2) - math.exp(found) * norm.cdf(-1 - found / 2))
    assert delta == pytest.approx(1e-5, rel=1e-6)
    counted = PrivateStep(clip=1.0, noise_multiplier=0.5, divisor=2.0, sample_rate=1.0, steps=4)
    assert spent(observed(2, counted))["epsilon"] > found
    assert spent(observed(2, PrivateStep(clip=1.0, noise_multiplier=0.0, divisor=2.0))) == {}  # cut alone
    assert spent(replace(observed(1, counted), release=Gradient())) == {}


def test_it_is_written_and_read_back(tmp_path: Path) -> None:
    private = PrivateStep(clip=1.0, noise_multiplier=0.5, divisor=8.0, epsilon=3.0, delta=1e-5)
    seen = replace(observed(2, private), defenses=private.defenses)
    save_observation(seen, tmp_path / "observation.safetensors")
    again = load_observation(tmp_path / "observation.safetensors")
    assert (again.release, again.defenses) == (seen.release, seen.defenses)


@pytest.mark.parametrize("wrong", [{"clip": 0.0}, {"noise_multiplier": -1.0}, {"divisor": 0.0}, {"clip": math.nan}])
def test_impossible_steps_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="private step"):
        PrivateStep(**{"clip": 1.0, "noise_multiplier": 1.0, "divisor": 1.0, **wrong})
