"""Searches under a denoiser, where the answer is known: a release that is linear in the picture, under a Gaussian prior.

A linear classifier without weights has the same probabilities p for every picture x, so that its gradient is (p - y) x^T: with noise of
deviation tau it says x + tau / ||p - y|| x white noise, and no more.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import Run
from gradleak.attacks.diffusion import begin, problem
from gradleak.attacks.diffusion.daps import DAPS
from gradleak.attacks.diffusion.dps import DPS
from gradleak.attacks.diffusion.guide import Guide
from gradleak.attacks.diffusion.red_diff import SDS, RedDiff
from gradleak.attacks.map_inversion import MapInversion
from gradleak.attacks.reconstruction import Outcome, Reconstruction
from gradleak.attacks.search.start import Given
from gradleak.errors import BadInput, NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load, public_pool
from gradleak.observations.defenses import GaussianNoise
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.priors.denoisers import diffusion
from gradleak.priors.gaussian import GaussianPrior
from gradleak.victims.gradient import capture_gradient
from pipelines import save_latent_pipeline

SHAPE = (1, 8, 8)
TAU = 0.1


@pytest.fixture(scope="module")
def prior() -> GaussianPrior:
    return GaussianPrior.fit(public_pool("digits", "train", shape=SHAPE, limit=500).images)


def seen() -> PictureObservation:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    nn.init.zeros_(module[1].weight)  # type: ignore[arg-type]
    model, picture = Model.of(module, Architecture("mine", SHAPE, 10)), load("digits", indices=[0])
    observation, _ = capture_gradient(model, picture, defenses=(GaussianNoise(TAU),))
    return replace(observation, labels=picture.labels)


def told(observation: PictureObservation) -> tuple[Tensor, Tensor]:
    """What the release says of the picture: itself and white noise (1, 1, 8, 8), of this deviation."""
    labels = observation.labels
    assert labels is not None
    off = torch.full((10,), 0.1) - nn.functional.one_hot(labels[0], 10)  # p - y
    [gradient] = observation.released.values()
    return (off @ gradient / off.square().sum()).view(1, *SHAPE), TAU / off.norm()


@pytest.fixture(autouse=True)
def badly_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search that every solver begins with is the answer here: it is stopped at once."""
    monkeypatch.setattr(problem, "EVALUATIONS", 1)


def far(found: Tensor, answer: Tensor) -> float:
    return float((found - answer).square().mean().sqrt())


@pytest.mark.parametrize(
    ("attack", "share"),
    # The mean of pairs is exact where L-BFGS and the chain have converged. One sample of DPS lies at
    # sqrt 2 deviations of the posterior from another, at 1 from the mean; its guidance is no exact one: twice that.
    [(DAPS(samples=2, levels=8, evaluations=20), 0.1), (RedDiff(), 0.2), (DPS(), 2.0)],
    ids=["daps", "red-diff", "dps"],
)
def test_the_answer_is_the_posterior_mean(prior: GaussianPrior, attack: Any, share: float) -> None:
    """In units of what the release leaves open."""
    observation = seen()
    noisy, sigma = told(observation)
    answer = prior.denoise(noisy, sigma).clamp(0, 1)
    open_ = deviations(prior, sigma).square().mean().sqrt()
    found = replace(attack, gaussian=prior)(observation, generator=torch.Generator().manual_seed(0))
    assert far(found.value, answer) < share * float(open_)
    assert far(found.value, prior.mean[None].float()) > 3 * float(open_)  # the search has moved at all


def deviations(prior: GaussianPrior, sigma: Tensor) -> Tensor:
    """Of each pixel, given the picture with white noise: (1, 1, 8, 8)."""
    C = prior.covariance()
    left: Tensor = C - C @ torch.linalg.solve(C + sigma**2 * torch.eye(64), C)
    return left.diagonal().sqrt().view(1, *SHAPE).float()


def test_the_spread_of_samples_is_that_of_the_posterior(prior: GaussianPrior) -> None:
    observation = seen()
    sampler = DAPS(gaussian=prior, samples=64, evaluations=20, levels=6)
    found = sampler(observation, generator=torch.Generator().manual_seed(0))
    expected = deviations(prior, told(observation)[1])
    assert found.spread is not None
    # 32 pairs tell a deviation to 1 / sqrt 64 = 12 %, pixel by pixel; the mean square over 64 pixels to a few per cent.
    assert float(found.spread.square().mean().sqrt()) == pytest.approx(float(expected.square().mean().sqrt()), rel=0.1)
    assert float((found.spread / expected - 1).square().mean().sqrt()) < 0.25


def test_score_distillation_adds_to_a_search(prior: GaussianPrior) -> None:
    """More of the prior, nearer to its mean."""
    mean, away = prior.mean[None].float(), list[float]()
    for weight in (1e-4, 1.0):
        attack = SDS(gaussian=prior, weight=weight, levels=10)
        away.append(far(attack(seen(), generator=torch.Generator().manual_seed(0)).value, mean))
    assert away[1] < 0.8 * away[0]


class Grey:
    """A denoiser of other pictures, or one that always says the same."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    def denoise(self, images: Tensor, sigma: Tensor) -> Tensor:
        return 0 * images + 0.5


def test_the_denoiser_is_asked(prior: GaussianPrior) -> None:
    """One that is sure of grey, against a release that leaves room."""
    other = DAPS(gaussian=prior, prior=Grey(SHAPE), samples=2, levels=3, evaluations=30, cleanest=1e-3)
    found = other(seen(), generator=torch.Generator().manual_seed(0))
    assert far(found.value, torch.full((1, *SHAPE), 0.5)) < 0.02


def test_what_solvers_begin_with_is_searched_once(prior: GaussianPrior, monkeypatch: pytest.MonkeyPatch) -> None:
    """An audit has a row for the prior, one for the Gaussian and one for the prior alone, and runs each on another release, too."""
    searched, many = list[int](), MapInversion.many

    def counted(self: MapInversion, observations: Any, **given: Any) -> list[Reconstruction]:
        searched.append(len(observations))
        return many(self, observations, **given)

    monkeypatch.setattr(MapInversion, "many", counted)
    monkeypatch.setattr(begin, "_kept", [])
    own, other, short = (
        seen(),
        replace(seen(), released={"1.weight": torch.ones(10, 64)}),
        DAPS(levels=2, evaluations=2),
    )
    rows: list[Any] = [
        replace(short, gaussian=prior),
        replace(short, gaussian=prior, blind=True),
        RedDiff(gaussian=prior, levels=1),
    ]
    first = [row(one, generator=torch.Generator().manual_seed(0)).value for row in rows for one in (own, other)]
    assert len(searched) == 2
    rows[0](seen(), generator=torch.Generator().manual_seed(1))
    assert len(searched) == 3
    monkeypatch.setattr(begin, "_kept", [])
    monkeypatch.setattr(begin, "KEPT", 0)
    again = [row(one, generator=torch.Generator().manual_seed(0)).value for row in rows for one in (seen(), other)]
    assert len(searched) == 3 + 6
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))  # draws are the same, too


def test_red_diff_takes_no_step_that_explains_less(prior: GaussianPrior) -> None:
    """From the truth, with little noise, and a prior that is far from it: Adam's steps of a tenth of a deviation left 20 times the noise unexplained.
    A step that lowers -log p(released | x) + |u|^2 / 2, |u|^2 of the size of 64 pixels, raises that of some 25,000 numbers by a per cent."""
    architecture, truth = Architecture("mlp", SHAPE, 10), load("digits", indices=[0])
    model = Model.of(architecture.build(0), architecture)
    noisy, _ = capture_gradient(model, truth, defenses=(GaussianNoise(1e-4),))
    known = replace(noisy, labels=truth.labels)
    begun = Given(Reconstruction(truth.images, truth.labels, 0.0, "The truth.", Outcome.SOLVED))
    attack = RedDiff(gaussian=prior, start=begun, levels=3, evaluations=5)
    found = attack(known, generator=torch.Generator().manual_seed(0))
    assert found.residual < 1.01 * known.residual(truth.images, truth.labels)


def test_a_denoiser_of_other_pictures_is_refused(prior: GaussianPrior) -> None:
    with pytest.raises(BadInput, match=r"\(3, 8, 8\)"):
        DAPS(gaussian=prior, prior=Grey((3, 8, 8)))(seen(), generator=torch.Generator())


class Blurred:
    """An attack whose pictures are off in a way that can be learnt: a quarter of the contrast is left, and one pixel is burnt in."""

    def __call__(self, observation: PictureObservation, **_: Any) -> Reconstruction:
        value = (told(observation)[0] - 0.5) / 4 + 0.5
        value[0, 0, 0, 0] = 1.0
        return Reconstruction(value, observation.labels, 1.0, "Blurred.", Outcome.STUCK)


class Perfect:
    """An attack that there is nothing to add to."""

    def __call__(self, observation: PictureObservation, **_: Any) -> Reconstruction:
        return Reconstruction(told(observation)[0], observation.labels, 0.0, "Perfect.", Outcome.SOLVED)


def test_guide_undoes_what_an_attack_does_to_all_pictures() -> None:
    """Without noise: the error of Blurred is 3/4 of the contrast, and a network has only to learn that."""
    observation, public = replace(seen(), defenses=()), public_pool("digits", "train", shape=SHAPE, limit=150)
    clean = observation.of_others(load("digits", indices=[0]).images, load("digits", indices=[0]).labels)
    answer, draw = load("digits", indices=[0]).images, torch.Generator().manual_seed(0)
    found = Guide(after=Blurred(), pairs=150, steps=200, public=public)(clean, generator=draw)
    assert far(found.value, answer) < far(Blurred()(clean).value, answer) / 2
    assert "Cleaned up" in found.status
    assert found.spread is not None
    left = Guide(after=Perfect(), pairs=20, steps=1, public=public)(clean, generator=draw)
    assert torch.equal(left.value, Perfect()(clean).value)
    assert "Left as it was" in left.status


def test_guide_says_what_it_needs() -> None:
    with pytest.raises(NotObserved, match="known defenses"):
        Guide(after=Perfect())(replace(seen(), defenses=None), generator=torch.Generator())


DIGITS = ("--data", "digits")
QUICK = ("--daps.levels", 2, "--daps.evaluations", 3, "--daps.samples", 2)


def test_an_audit_under_a_prior_shows_what_it_is_compared_with(tmp_path: Path, ok: Run, refused: Run) -> None:
    ok(
        "capture",
        "gradient",
        "--model",
        "lenet",
        *DIGITS,
        "--indices",
        0,
        "--reveal-labels",
        "--out",
        tmp_path / "seen",
    )
    release = tmp_path / "seen" / "observation.safetensors"
    asked = (
        "audit",
        release,
        "--secret",
        tmp_path / "seen" / "secret.safetensors",
        *DIGITS,
        "--attacks",
        "daps",
        *QUICK,
    )
    ok(*asked, "--prior", "gaussian", "--out", tmp_path / "out")
    rows = json.loads((tmp_path / "out" / "record.json").read_text())["results"]
    assert [row["attack"] for row in rows] == ["daps", "daps-gaussian-prior", "daps-prior-alone"]
    heard, gaussian, alone = (row["scores"]["psnr_db"][0] for row in rows)
    # The prior is the Gaussian itself here: the same numbers. Without the release the mean digit is left: a LeNet's gradient gives
    # a digit away, at half the error of that at least.
    assert heard == pytest.approx(gaussian)
    assert heard > alone + 6
    assert all(row["shown"]["invented"] for row in rows)
    assert "What was invented" in (tmp_path / "out" / "report.html").read_text()
    assert "None of these attacks takes the prior" in refused(
        "audit", release, *DIGITS, "--attacks", "dlg", "--prior", "gaussian", "--out", tmp_path / "no"
    )
    assert not (tmp_path / "no").exists()


def test_a_search_among_latents_is_polished_in_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder has random weights, and draws no photograph: pixels explain more of the release, and are kept. What explains less is not."""
    latent = diffusion.load(str(save_latent_pipeline(tmp_path, 8)))
    assert isinstance(latent, diffusion.LatentDiffusion)
    architecture, picture = Architecture("mlp", (3, 8, 8), 10), load("embedded", indices=[0], resize=(8, 8))
    model = Model.of(architecture.build(0), architecture)
    seen, _ = capture_gradient(model, picture, reveal_labels=True)
    attack, draw = RedDiff(prior=latent, levels=1, evaluations=2), torch.Generator()
    polished = attack(seen, generator=draw.manual_seed(0))
    assert "Polished in pixels" in polished.status
    monkeypatch.setattr(problem.Problem, "polished", lambda self, o, found: found)
    drawn, longer = (replace(attack, levels=n)(seen, generator=draw.manual_seed(0)) for n in (1, 10))
    assert polished.residual < drawn.residual
    # What is returned is what a latent draws: the search among latents ends closer to the release than it was after one level.
    assert longer.residual < drawn.residual


def test_a_polish_that_explains_less_is_left_out(prior: GaussianPrior) -> None:
    observation, truth = seen(), load("digits", indices=[0])
    posed = problem.Problem.posed([observation], prior, None, 1, torch.Generator())
    exact = Reconstruction(truth.images, truth.labels, 0.0, "the truth", Outcome.SOLVED)
    assert posed.polished(observation, exact) is exact
