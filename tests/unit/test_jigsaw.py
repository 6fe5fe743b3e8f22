"""Jigsaw: patches of no place, the order that makes a likely picture, and the picture behind an adapter of a small transformer."""

from dataclasses import replace

import pytest
import torch

import trained
from gradleak.attacks.jigsaw.arrangement import REMAINDER, Puzzle, arrange
from gradleak.attacks.jigsaw.jigsaw import (
    POSITIONS,
    Jigsaw,
    Patches,
    directions,
    distance,
    of_patches,
    refuse_large,
    spread_of,
)
from gradleak.attacks.map_inversion import misfit
from gradleak.audit.metrics import psnr_db
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load, public_pool
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.observations.training import Recipe
from gradleak.priors.gaussian import GaussianPrior
from gradleak.victims.adapter import share_adapter
from gradleak.victims.gradient import capture_gradient, keep_secret

SHAPE = (1, 8, 8)
CUT = Patches(2, SHAPE)


@pytest.fixture(scope="module")
def prior() -> GaussianPrior:
    return GaussianPrior.fit(public_pool("digits", "train", shape=SHAPE, limit=500).images)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_cutting_is_undone() -> None:
    image = torch.rand(1, *SHAPE)
    pieces = CUT.cut(image)
    assert pieces.shape == (16, 4)
    assert torch.equal(pieces[1], image[0, 0, :2, 2:4].flatten())
    assert torch.equal(CUT.whole(pieces), image)


def test_a_patch_of_the_prior_is_a_patch_from_anywhere(prior: GaussianPrior) -> None:
    """The law of total covariance, against the patches of the pictures themselves, which the prior was fitted to."""
    assert prior.pictures is not None
    cut = torch.stack([CUT.cut(image[None]) for image in prior.pictures.double()]).flatten(0, 1)
    mean, factor = of_patches(prior, CUT.cut)
    n = len(prior.pictures)
    expected = torch.cov(cut.T, correction=0)
    # `fit` divides by n - 1 and adds its remainder, and the factor has a floor of .01: all of that is at most 1 % + 1e-3.
    assert torch.allclose(mean, cut.mean(0), atol=1e-9)
    added = (prior.remainder**2 + 0.01**2) * torch.eye(4, dtype=torch.float64)
    assert torch.allclose(factor.T @ factor, expected + added, atol=float(expected.abs().max()) / (n - 1) + 1e-9)


def test_gains_by_swapping_and_looking(prior: GaussianPrior) -> None:
    pieces, order = torch.rand(16, 4, generator=seed(), dtype=torch.float64), torch.randperm(16, generator=seed())
    covariance = prior.covariance() + REMAINDER**2 * torch.eye(64, dtype=torch.float64)

    def unlikely(order: torch.Tensor) -> float:
        apart = (CUT.whole(pieces[order]) - prior.mean).flatten()
        return float(apart @ torch.linalg.solve(covariance, apart)) / 2

    gains = Puzzle.of(pieces, prior, CUT.cut).gains(order)
    for a, b in ((0, 1), (3, 12), (15, 7)):
        swapped = order.clone()
        swapped[[a, b]] = swapped[[b, a]]
        assert float(gains[a, b]) == pytest.approx(unlikely(swapped) - unlikely(order), rel=1e-8, abs=1e-8)


def test_evidence_decides_the_order_where_it_is_strong(prior: GaussianPrior) -> None:
    pieces = CUT.cut(load("digits", indices=[3]).images.double())
    shuffle = torch.randperm(16, generator=seed())
    evidence = 1e4 * torch.eye(16, dtype=torch.float64)[shuffle]  # the piece in slot s comes from place shuffle[s]
    order = arrange(Puzzle.of(pieces[shuffle], prior, CUT.cut), evidence, swaps=50, generator=seed())
    assert torch.equal(pieces[shuffle][order], pieces)


def test_arranging_makes_a_picture_more_likely(prior: GaussianPrior) -> None:
    """Without evidence. Annealing ends at an order that no swap improves: that is what its last swaps are for."""
    pieces = CUT.cut(load("digits", indices=[3]).images.double())[torch.randperm(16, generator=seed())]
    puzzle = Puzzle.of(pieces, prior, CUT.cut)
    order = arrange(puzzle, torch.zeros(16, 16, dtype=torch.float64), swaps=1_000, generator=seed())
    assert torch.equal(order.sort().values, torch.arange(16))
    assert float(puzzle.gains(order).min()) >= -1e-9  # rounding of float64, at energies of some hundred


def test_positions_in_their_own_coordinates() -> None:
    positions = torch.randn(16, 40, generator=seed())
    spread = spread_of(positions)
    centred = positions - positions.mean(0)
    assert torch.allclose(spread.T @ spread, centred.T @ centred / 16, atol=1e-5)  # float32
    # 16 points that sum to zero in 15 dimensions, whitened: the corners of a simplex, at cosines of -1 / 15.
    cosines = directions(positions) @ directions(positions).T
    assert torch.allclose(cosines.diagonal(), torch.ones(16, dtype=torch.float64))
    assert torch.allclose(
        cosines - torch.diag(cosines.diagonal()) + torch.eye(16) / -15,
        torch.full((16, 16), -1 / 15).double(),
        atol=1e-4,
    )


def test_the_distance_without_whitening_is_the_misfit() -> None:
    released = {"a": torch.randn(4, 3, generator=seed()), "b": torch.randn(5, generator=seed(1))}
    other = {name: tensor + 0.1 for name, tensor in released.items()}
    plain = {"a": (torch.eye(4), torch.eye(3)), "b": (torch.eye(5), torch.eye(1))}
    assert float(distance(released, released, plain)) == 0
    assert float(distance(other, released, plain)) == pytest.approx(float(misfit(other, released)), rel=1e-5)


def adapter(row: int, recipe: Recipe) -> PictureObservation:
    """LoRA of rank 8 on a small transformer at its start, whose position embeddings are as weak as they begin."""
    model = trained.transformer()
    secret = keep_secret(model, load("digits", indices=[row]))
    return share_adapter(model, secret, modules=trained.LINEAR, rank=8, recipe=recipe)


def test_a_digit_comes_back_from_the_adapter_of_a_transformer(prior: GaussianPrior) -> None:
    truth, observation = load("digits", indices=[3]), adapter(3, Recipe(learning_rate=0.1, steps=1))
    assert POSITIONS in observation.model.parameters
    found = Jigsaw(prior=prior, evaluations=8)(observation, generator=seed())
    blind = psnr_db(prior.mean[None].float(), truth.images)
    # 64 unknowns against thousands of equations: 6 dB, half the blind error's amplitude, is the least.
    assert float(psnr_db(found.value, truth.images)) > float(blind) + 6
    assert found.residual < 0.1
    assert found.labels is not None
    assert torch.equal(found.labels, truth.labels)


def test_what_it_cannot_arrange_is_refused() -> None:
    mlp = Architecture("mlp", SHAPE, 10)
    gradient, _ = capture_gradient(Model.of(mlp.build(0), mlp), load("digits", indices=[0]))
    with pytest.raises(NotObserved, match="vision transformer"):
        Jigsaw()(gradient, generator=seed())
    observation = adapter(0, Recipe(learning_rate=0.1, steps=1))
    for size in (2, None):
        with pytest.raises(NotObserved, match="one picture"):
            Jigsaw()(replace(observation, batch_size=size), generator=seed())


def test_large_models_are_refused() -> None:
    """On numbers alone. ViT-B/16: 150,528 squared float64 are 169 GiB, and 86 M parameters 300 times those of the estimate."""
    observation, large = adapter(0, Recipe(learning_rate=0.1, steps=1)), Patches(16, (3, 224, 224))
    with pytest.raises(NotObserved, match=r"196 patches.* 168.8 GiB.* says nothing about whether"):
        refuse_large(observation, large, 1)
    refuse_large(observation, CUT, 150)
    with pytest.raises(NotObserved, match="CPU-minutes"):
        refuse_large(observation, CUT, 150_000_000)
    with pytest.raises(NotObserved, match="CPU-minutes"):  # many local steps
        refuse_large(adapter(0, Recipe(learning_rate=1e-9, steps=30)), CUT, 5_000_000)
