"""How likely a release is: the noise that an observation tells, that a search finds, and what MAP inversion makes of either."""

from dataclasses import replace

import pytest
import torch

from gradleak.attacks.map_inversion import MapInversion
from gradleak.attacks.search.likelihood import estimated_variance, relative_variance, sizes
from gradleak.audit.metrics import psnr_db
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load, public_pool
from gradleak.observations.defenses import Defense, GaussianNoise, Quantised, RelativeNoise, StochasticallyQuantised
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.priors.gaussian import GaussianPrior
from gradleak.victims.gradient import capture_gradient

ARCHITECTURE = Architecture("mlp", (1, 8, 8), 10)


def gradient(*defenses: Defense, told: bool = True, row: int = 0) -> PictureObservation:
    model, picture = Model.of(ARCHITECTURE.build(0), ARCHITECTURE), load("digits", indices=[row])
    observation, _ = capture_gradient(model, picture, defenses=defenses, told=told)
    return replace(observation, labels=picture.labels)


def left(observation: PictureObservation) -> dict[str, float]:
    """The root mean square of what `simulate` of the secret leaves of each tensor."""
    picture = load("digits", indices=[0])
    there = observation.simulate(picture.images, picture.labels)
    return {n: float((there[n] - t.to(there[n])).square().mean().sqrt()) for n, t in observation.released.items()}


@pytest.mark.parametrize(
    "defenses",
    [(GaussianNoise(0.01),), (RelativeNoise(0.5),), (GaussianNoise(0.01), RelativeNoise(0.5))],
    ids=["white", "relative", "both"],
)
def test_the_noise_is_what_the_secret_leaves(defenses: tuple[Defense, ...]) -> None:
    observation = gradient(*defenses)
    noise, found = observation.noise(), left(observation)
    largest = max(observation.released, key=lambda name: observation.released[name].numel())
    # The root mean square of n > 1,000 normal numbers is within 5 / sqrt(2 n) = 0.11 of the deviation; the relative noise is told
    # by a norm that holds it, up to what random signs leave: 1 / sqrt n.
    assert found[largest] == pytest.approx(float(noise[largest]), rel=0.15)


def test_what_seen_takes_away_is_no_noise() -> None:
    """Rounding to bits is known exactly: the secret leaves nothing but float32's rounding."""
    rounded, random = gradient(Quantised(8)), gradient(StochasticallyQuantised(8))
    assert all(float(rounded.noise()[name]) < 1e-6 * float(t.abs().max()) for name, t in rounded.released.items())
    assert all(float(random.noise()[name]) > 1e-4 * float(t.abs().max()) for name, t in random.released.items())


def test_a_short_number_format_is_noise() -> None:
    """bfloat16 keeps 8 bits: numbers are off by up to 2^-8 of the power of two below them, evenly, hence by 2^-8 / sqrt 3 of that."""
    whole = gradient()
    short = replace(whole, released={n: t.bfloat16().float() for n, t in whole.released.items()}, precision="bfloat16")
    for name, deviation in short.noise().items():
        size = float(short.released[name].square().mean().sqrt())
        assert size * 2**-8 / 3**0.5 / 2 <= float(deviation) <= size * 2**-8 / 3**0.5
    assert all(float(d) < 1e-7 * float(whole.released[n].abs().max()) for n, d in whole.noise().items())


def test_white_noise_is_told_by_what_is_left() -> None:
    """Linear, y = A z + tau n with z ~ N(0, I): at the most likely z the evidence's fixed point is tau (MacKay 1992)."""
    draw = torch.Generator().manual_seed(0)
    A, tau = torch.randn(2_000, 50, generator=draw, dtype=torch.float64) / 50**0.5, 3.0
    z = torch.randn(50, generator=draw, dtype=torch.float64)
    released = {"a": A @ z + tau * torch.randn(2_000, generator=draw, dtype=torch.float64)}
    variance = torch.ones((), dtype=torch.float64)
    for _ in range(20):
        most_likely = torch.linalg.solve(A.T @ A / variance + torch.eye(50), A.T @ released["a"] / variance)
        taken_up = most_likely.square().sum()
        found = estimated_variance(lambda x, y: {"a": A @ x}, most_likely, torch.zeros(1), released, taken_up)
        variance = (found * sizes(released))[0]
    # 1,950 numbers tell a deviation to 1 / sqrt(2 x 1,950) = 1.6 %; five times that.
    assert float(variance.sqrt()) == pytest.approx(tau, rel=0.08)


def test_noise_that_is_told_or_found_does_not_drown_the_picture() -> None:
    """A gradient with noise as large as itself: the weights follow from the noise, told or found."""
    prior = GaussianPrior.fit(public_pool("digits", "train", shape=(1, 8, 8), limit=500).images)
    search = MapInversion(prior=prior, pairs=0, evaluations=10)
    psnr: dict[str, float] = {}
    for name, told in (("told", True), ("found", False)):
        seen = gradient(RelativeNoise(1.0), told=told)
        psnr[name] = float(psnr_db(search(seen, generator=torch.Generator()).value, load("digits", indices=[0]).images))
    deaf = replace(gradient(RelativeNoise(1.0)), defenses=())  # nobody tells that there is noise
    psnr["deaf"] = float(psnr_db(search(deaf, generator=torch.Generator()).value, load("digits", indices=[0]).images))
    # That the right weights win is the theorem; 3 dB, half the error, is what makes it matter.
    assert psnr["told"] > psnr["deaf"] + 3
    assert psnr["found"] > psnr["told"] - 1


def test_relative_variances_by_hand() -> None:
    seen = gradient(GaussianNoise(0.5))
    by_hand = torch.stack([0.25 / t.square().sum() for t in seen.released.values()])
    assert torch.allclose(relative_variance(seen), by_hand, rtol=1e-3)
