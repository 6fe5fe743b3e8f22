"""Bounds of differential privacy: against closed forms, quadrature, simulation, and the accountants of others."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid

from gradleak.audit.bound import van_trees
from gradleak.audit.gaussian_privacy import delta_of, epsilon_of, success_at_most
from gradleak.audit.line_up import signals, success, success_over_steps
from gradleak.audit.privacy import mechanism_of, of_result
from gradleak.audit.privacy_loss import composed, epsilon, most, most_of_epsilon
from gradleak.errors import BadInput
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.observations.defenses import GaussianNoise
from gradleak.observations.mechanism import Mechanism
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.observations.private_step import PrivateStep
from gradleak.observations.releases import Gradient
from gradleak.observations.tensors import flatten
from gradleak.priors.gaussian import GaussianPrior
from gradleak.report.record import Result, new_result

# dp-accounting 0.6.0, connect_dots: (noise multiplier, sample rate, steps, certain) -> (epsilon at 1e-5, min over eps of e^eps / 100 + delta).
# Its default grid is 1e-4 wide, and the minimum was taken over multiples of .02.
REFERENCE = {
    (0.5, 0.064, 160, 0): (27.305157, 0.695309),
    (0.8, 0.064, 160, 0): (8.859199, 0.193176),
    (1.0, 0.064, 160, 0): (5.553342, 0.103069),
    (2.0, 0.064, 160, 0): (1.823828, 0.029905),
    (4.0, 0.064, 160, 0): (0.774107, 0.017130),
    (1.0, 0.3, 1, 0): (2.921511, 0.034709),
    (0.7, 0.01, 10_000, 1): (16.683307, 0.681854),
}


@pytest.mark.parametrize("setting", list(REFERENCE))
def test_bounds_are_those_of_another_accountant(setting: tuple[float, float, int, int]) -> None:
    """Both connect dots on grids of other widths: a ten-thousandth lies between them."""
    noise, rate, steps, certain = setting
    training = Mechanism(noise_multiplier=noise, sample_rate=rate, steps=steps, certain=certain)
    assert (epsilon(training), most(training, 0.01)) == pytest.approx(REFERENCE[setting], rel=1e-4)


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (0.5, 1), (4.0, 30), (20.0, 1000)])
def test_without_sampling_the_grid_is_the_gaussian(noise: float, steps: int) -> None:
    """A rate just below 1 goes by the grid; mu = sqrt(steps) / noise in closed form. Above it by what connecting dots of this width adds,
    never below it but for the rate and for the Fourier transform's rounding."""
    mu = math.sqrt(steps) / noise
    found = Mechanism(noise_multiplier=noise, sample_rate=1 - 1e-12, steps=steps)
    assert epsilon(found) == pytest.approx(epsilon_of(mu, 1e-5), rel=1e-4)
    for blind in (0.001, 0.01, 0.5):
        assert most(found, blind) == pytest.approx(success_at_most(mu, blind), rel=1e-4)
    assert epsilon(Mechanism(noise_multiplier=noise, sample_rate=1.0, steps=steps)) == epsilon_of(mu, 1e-5)


@pytest.mark.parametrize("adding", [True, False])
def test_one_drawn_step_is_its_integral(adding: bool) -> None:
    """delta(eps) = integral of (p - e^eps q)_+ over the line, by the trapezoid rule on 2 10^6 points; both ways round."""
    q, s = 0.3, 1.0
    x = np.linspace(-12, 13, 2_000_001)
    without = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    with_sample = (1 - q) * without + q * np.exp(-((x - 1) ** 2) / 2) / math.sqrt(2 * math.pi)
    p, other = (with_sample, without) if adding else (without, with_sample)
    losses = composed(Mechanism(noise_multiplier=s, sample_rate=q, steps=1), adding)
    for target in (0.0, 0.2, 1.0):
        at = int(np.argmin(np.abs(losses.values - target)))
        exact = float(trapezoid(np.clip(p - math.exp(losses.values[at]) * other, 0, None), x))
        assert losses.deltas()[at] == pytest.approx(exact, abs=1e-7)  # squares of both grids' widths


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (4.0, 30)])
def test_a_sample_in_the_place_of_another_moves_a_gaussian_twice_as_far(noise: float, steps: int) -> None:
    """mu doubles, in closed form as on the grid; a thousandth for connecting dots twice and for the grid on which epsilon is split."""
    mu, drawn = 2 * math.sqrt(steps) / noise, Mechanism(noise_multiplier=noise, sample_rate=1 - 1e-12, steps=steps)
    assert epsilon(drawn, replacing=True) == pytest.approx(epsilon_of(mu, 1e-5), rel=1e-3)
    assert most(drawn, 0.01, replacing=True) == pytest.approx(success_at_most(mu, 0.01), rel=1e-3)
    sure = Mechanism(noise_multiplier=noise, sample_rate=1.0, steps=steps)
    assert epsilon(sure, replacing=True) == epsilon_of(mu, 1e-5)
    assert most(sure, 0.01, replacing=True) == success_at_most(mu, 0.01)


def test_replacing_in_a_drawn_step_is_no_worse_than_said() -> None:
    """One step at rate .3, a sample at +1 against one at -1: delta at the epsilon that is told, by the trapezoid rule, is at most the delta
    asked for; and the epsilon is above that of adding and removing."""
    q, s = 0.3, 1.0
    x = np.linspace(-12, 12, 200_001)
    p, other = (
        ((1 - q) * np.exp(-x * x / 2) + q * np.exp(-((x - at) ** 2) / 2)) / math.sqrt(2 * math.pi) for at in (1, -1)
    )
    step = Mechanism(noise_multiplier=s, sample_rate=q, steps=1)
    for delta in (1e-5, 1e-2):
        told = epsilon(step, delta, replacing=True)
        assert told > epsilon(step, delta)
        assert float(trapezoid(np.clip(p - math.exp(told) * other, 0, None), x)) <= delta * (1 + 1e-4)


def test_steps_with_the_sample_count_in_full() -> None:
    """A step that the sample was in for sure is no easier than one that it was drawn for; alone it is the Gaussian mechanism."""
    drawn = Mechanism(noise_multiplier=1.0, sample_rate=0.05, steps=20)
    sure = Mechanism(noise_multiplier=1.0, sample_rate=0.05, steps=20, certain=1)
    alone = Mechanism(noise_multiplier=1.0, sample_rate=0.05, steps=1, certain=1)
    assert most(drawn, 0.01) < most(alone, 0.01) < most(sure, 0.01)
    assert most(alone, 0.01) == success_at_most(1.0, 0.01)


def test_the_bound_holds_for_the_likelihood_itself() -> None:
    """The most powerful test at level 1 % of 8 drawn steps, simulated (Neyman-Pearson): its power is 1 - f(.01), and the bound stands above
    it by no more than 4 deviations of 200,000 runs allow."""
    q, s, steps, runs = 0.2, 1.0, 8, 200_000
    generator = np.random.default_rng(0)
    without = s * generator.standard_normal((runs, steps))
    with_sample = s * generator.standard_normal((runs, steps)) + (generator.random((runs, steps)) < q)

    def ratio(x: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.log(1 - q + q * np.exp((2 * x - 1) / (2 * s * s))).sum(1)
        return found

    level = np.quantile(ratio(without), 0.99)
    power = float((ratio(with_sample) > level).mean())
    bound = most(Mechanism(noise_multiplier=s, sample_rate=q, steps=steps), 0.01)
    noise = 4 * math.sqrt(bound * (1 - bound) / runs) + 4 * 5 * math.sqrt(
        0.01 * 0.99 / runs
    )  # slope of 1 - f there: below 5
    assert abs(bound - power) < noise


def test_epsilon_alone_bounds_too() -> None:
    """No tighter than the whole trade-off at the delta that belongs to it, and 1 at most."""
    for e in (0.5, 2.0, 6.0):
        assert most_of_epsilon(e, delta_of(1.0, e), 0.01) >= success_at_most(1.0, 0.01)
    assert most_of_epsilon(1000.0, 1e-5, 0.5) == 1.0
    assert most_of_epsilon(0.0, 0.0, 0.3) == pytest.approx(0.3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.nan},
        {"sample_rate": 0.0},
        {"sample_rate": 1.1},
        {"steps": 0},
        {"certain": 4},
        {"delta": 0.0},
    ],
)
def test_impossible_trainings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(BadInput):
        Mechanism(**{"noise_multiplier": 1.0, "sample_rate": 0.1, "steps": 3, **wrong})  # type: ignore[arg-type]


def test_the_likeliest_of_two_is_the_likelihood_ratio_test() -> None:
    """Two candidates at distance d in units of the noise: right with Phi(d/2). Four deviations of 20,000 draws."""
    g = torch.tensor([[3.0, 0.0, 0.0], [0.0, 2.0, 1.0]])
    d = float((g[0] - g[1]).norm()) / 2.0
    exact = NormalDist().cdf(d / 2)
    allowed = 4 * math.sqrt(exact * (1 - exact) / 20_000)
    assert success(g @ g.T, 2.0, 0) == pytest.approx(exact, abs=allowed)
    # at rate 1, over four steps of a quarter of the information each, the same
    again = success_over_steps((g @ g.T / 4).expand(4, 2, 2), 2.0, 1.0, 0, draws=20_000)
    assert again == pytest.approx(exact, abs=allowed)


def test_the_likeliest_of_many_stays_below_the_bound() -> None:
    """50 candidates whose signals have norm 1 at most: whatever they look like, Phi(Phi^-1(1/50) + 1/s) on average over which is true."""
    generator = torch.Generator().manual_seed(0)
    for s in (0.3, 1.0):
        g = torch.nn.functional.normalize(torch.randn(50, 30, generator=generator), dim=1)
        found = sum(success(g @ g.T, s, i, draws=2_000, seed=i) for i in range(50)) / 50
        bound = success_at_most(1 / s, 1 / 50)
        assert 1 / 50 < found < bound + 4 * math.sqrt(bound / 100_000)


def private(architecture: Architecture, noise: float) -> PictureObservation:
    step = PrivateStep(clip=1.0, noise_multiplier=noise, divisor=1.0)
    model, data = Model.of(architecture.build(0), architecture), load("digits", indices=[0])
    release = Gradient(private=step)
    released = release.simulate(model, model.parameters, data.images, data.labels)
    return PictureObservation(model=model, release=release, released=released, batch_size=1, defenses=step.defenses)


def result(ranks: list[float]) -> Result:
    row = new_result("dlg", {}, {})
    return {**row, "scores": {"identification_rank": ranks}, "decoys": 99}


def test_an_attack_stands_beside_the_bound_and_above_it_is_a_warning() -> None:
    """Noise 4, one step with the sample: Phi(Phi^-1(.01) + 1/4) = 1.90 %. One right answer of ten has probability 17 % then, three have .07 %."""
    training = Mechanism(noise_multiplier=4.0, sample_rate=0.1, steps=1, certain=1)
    (fine,), (wrong,) = (of_result(result([1.0] * right + [7.0] * (10 - right)), training) for right in (1, 3))
    assert (fine["name"], fine["level"]) == ("below_bound", "info")
    assert (
        "names 1 of 10 true samples among 100 candidates; no attack names more than 1.9% on average" in fine["sentence"]
    )
    assert (wrong["name"], wrong["level"]) == ("above_bound", "warning")
    assert "less private than it says" in wrong["sentence"]
    assert (
        of_result(result([1.0]), None)
        == of_result(result([1.0]), "no epsilon")
        == of_result(result([]), training)
        == []
    )


def test_noise_that_was_never_added_cannot_be_told() -> None:
    told = Mechanism(noise_multiplier=1.0, sample_rate=0.1, steps=3)
    silent, noisy = (private(Architecture("lenet", (1, 8, 8), 10), noise) for noise in (0.0, 1.0))
    with pytest.raises(BadInput, match="no noise was added"):
        mechanism_of(silent, told)
    assert mechanism_of(noisy, told) == Mechanism(noise_multiplier=1.0, sample_rate=0.1, steps=3, certain=1)
    alone = PictureObservation(model=silent.model, released=silent.released, defenses=(GaussianNoise(0.1),))
    assert "what was not cut to a norm" in str(mechanism_of(alone, None))
    assert mechanism_of(PictureObservation(model=silent.model, released=silent.released), None) is None


def test_signals_are_what_each_sample_adds() -> None:
    seen, data = private(Architecture("lenet", (1, 8, 8), 10), 1.0), load("digits", indices=range(3))
    rows = signals(seen, data.images, data.labels)
    whole = flatten(seen.simulate(data.images, data.labels))
    assert torch.allclose(rows.sum(0), whole, atol=1e-5)  # float32 sums of three
    assert float(rows.norm(dim=1).max()) <= 1 + 1e-5  # cut to norm 1


def test_van_trees_is_the_posterior_at_pictures_of_the_prior() -> None:
    """At one picture: (C^-1 + J^T J / s^2)^-1 by numpy, J by central differences in float64; float32 gradients leave 1e-3 of what remains. More noise leaves more,
    up to all that the prior leaves."""
    seen = private(Architecture("mlp", (1, 8, 8), 10), 1.0)
    prior, labels = GaussianPrior.fit(load("digits", "train").images), load("digits", indices=[0]).labels
    found = [van_trees(seen, labels, prior, noise, looks=1) for noise in (0.01, 0.1, 1e4)]
    drawn = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    picture = (prior.mean + (prior.factor() @ drawn).view(1, 8, 8))[None]
    wide = seen.to(torch.float64)
    steps = 1e-5 * torch.eye(64, dtype=torch.float64).view(64, 1, 1, 8, 8)
    ends = [[flatten(wide.simulate(picture + sign * step, labels)) for step in steps] for sign in (1, -1)]
    J = np.stack([((up - down) / 2e-5).numpy() for up, down in zip(*ends, strict=True)], axis=1)
    for least, noise in zip(found, (0.01, 0.1), strict=False):
        left = np.linalg.inv(np.linalg.inv(prior.covariance().numpy()) + J.T @ J / noise**2)
        assert least.mse == pytest.approx(float(np.diag(left).mean()), rel=1e-3)
    assert found[0].mse < found[1].mse < found[2].mse
    assert found[2].mse == pytest.approx(found[2].blind_mse, rel=1e-3)
    assert "van Trees" in found[0].sentence()
