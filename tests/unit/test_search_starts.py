"""Starts of a search for one picture: which there are, and which one it goes on from."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gradleak.attacks.search.descend import stack
from gradleak.attacks.search.starts import candidates, race
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load, public_pool
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.priors.gaussian import GaussianPrior
from gradleak.victims.gradient import capture_gradient


@pytest.fixture(scope="module")
def prior() -> GaussianPrior:
    return GaussianPrior.fit(public_pool("digits", "train", shape=(1, 8, 8), limit=60).images)


def gradient(images: Tensor, labels: list[int]) -> PictureObservation:
    model = Model.of(Architecture("mlp", (1, 8, 8), 10).build(0), Architecture("mlp", (1, 8, 8), 10))
    private = load("digits", indices=range(len(labels)))
    return capture_gradient(model, replace(private, images=images, labels=torch.tensor(labels)))[0]


def starts(seen: PictureObservation, prior: GaussianPrior, y: Tensor, count: int, pairs: int) -> Tensor:
    given = stack([seen], len(y))
    return candidates(seen, prior, y, given, count, pairs=pairs, generator=torch.Generator().manual_seed(0))


def test_the_regression_the_mean_and_the_nearest_public_pictures(prior: GaussianPrior) -> None:
    """A secret that is public is the nearest: its own release is the only one at no distance."""
    assert prior.pictures is not None
    secret = prior.pictures[7:8]
    found = starts(gradient(secret, [3]), prior, torch.tensor([[3]]), 5, 60)
    assert found.shape == (1, 5, 1, 1, 8, 8)
    torch.testing.assert_close(found[0, 1, 0], prior.mean.float())
    assert torch.equal(found[0, 2], secret)
    public = {tuple(picture.flatten().tolist()) for picture in prior.pictures}
    assert all(tuple(picture.flatten().tolist()) in public for picture in found[0, 2:])
    alone = starts(gradient(secret, [3]), prior, torch.tensor([[3]]), 1, 60)
    torch.testing.assert_close(alone, found[:, :1])


def test_every_label_has_starts_of_its_own(prior: GaussianPrior) -> None:
    assert prior.pictures is not None
    found = starts(gradient(prior.pictures[7:8], [3]), prior, torch.tensor([[2], [3]]), 3, 60)
    assert not torch.equal(found[0, 0], found[1, 0])


def test_without_public_pictures_it_begins_at_the_mean_and_a_batch_around_it(prior: GaussianPrior) -> None:
    assert prior.pictures is not None
    smooth = GaussianPrior.smooth((1, 8, 8))
    seen, both = gradient(prior.pictures[7:8], [3]), gradient(prior.pictures[7:9], [3, 5])
    for known, pairs in ((smooth, 60), (prior, 0)):
        found = starts(seen, known, torch.tensor([[3]]), 5, pairs)
        torch.testing.assert_close(found, known.mean.float().expand(1, 1, 1, 1, 8, 8))
    found = starts(both, prior, torch.tensor([[3, 5]]), 4, 60)
    assert found.shape == (1, 4, 2, 1, 8, 8)
    assert len({tuple(one.flatten().tolist()) for one in found.flatten(0, 2)}) == 8


def test_a_race_moves_in_leading_components_first_and_tells_which_start_is_ahead() -> None:
    """A double well along the first of two orthonormal directions, of which the right one is deeper: by hand, x^4 - 2 x^2 - x / 4 has its
    minima at 1.030 and -0.967. A parabola along the other."""
    V = torch.eye(3, dtype=torch.float64)[:2]

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x[:, 0], x[:, 1]
        value = a**4 - 2 * a**2 - a / 4 + (b - 2) ** 2
        return torch.stack([4 * a**3 - 4 * a - 0.25, 2 * (b - 2), torch.zeros_like(a)], 1), value

    begun = torch.tensor([[-0.5, 0.0, 5.0], [0.5, 0.0, 7.0]], dtype=torch.float64)
    x, value = race(evaluate, begun, V, (1,), 30)
    # L-BFGS in one dimension has converged after 30 evaluations: the gradient's rounding is all that is left.
    assert x[:, 0].tolist() == pytest.approx([-0.967, 1.030], abs=1e-3)
    assert torch.equal(x[:, 1:], begun[:, 1:])
    x, value = race(evaluate, begun, V, (1, 2), 30)
    assert x[:, 1].tolist() == pytest.approx([2, 2], abs=1e-6)
    assert int(value.argmin()) == 1
