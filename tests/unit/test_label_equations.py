"""The last layer's equations: solved at the right labels, found for trained networks, and when they are asked."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from gradleak.attacks.label_equations.corners import Samples, corners, exact_samples, mixtures, sets
from gradleak.attacks.label_equations.equations import Equations
from gradleak.attacks.label_equations.label_equations import SOLVED, counts_by_equations
from gradleak.attacks.labels import label_fit

CLASSES, FEATURES = 10, 48
EYE = torch.eye(CLASSES, dtype=torch.float64)


def trained_head(seed: int, batch: int, smoothing: float = 0.0, noise: float = 0.4) -> tuple[Tensor, ...]:
    """(dW, db, W, b, H, labels, targets) as a ReLU network after training has them: features about the means of their classes, and a
    head that is mostly right. Gradients as float32 rounds them."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.rand(CLASSES, FEATURES, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    deviation = torch.randn(batch, FEATURES, generator=generator, dtype=torch.float64)
    H = (means[labels] + noise * deviation).clamp_min(0)
    W = 1.5 * (means - means.mean(0))
    b = -0.75 * (means - means.mean(0)).mul(means + means.mean(0)).sum(1)
    targets = (1 - smoothing) * EYE + smoothing / CLASSES
    D = (H @ W.T + b).softmax(1) - targets[labels]
    dW, db = (t.float().double() for t in (D.T @ H / batch, D.mean(0)))
    return dW, db, W, b, H, labels, targets


def equations_of(seed: int, batch: int) -> tuple[Equations, Tensor]:
    dW, db, W, b, _, _, targets = trained_head(seed, batch)
    return Equations.of(dW, db, W, b, batch, nonnegative=True), targets


@pytest.mark.parametrize("batch", [2, 5, 8])
def test_the_right_labels_solve_the_equations(batch: int) -> None:
    """At the true features the error is what float32 rounds, 6e-8 of each number, in units of singular values a thousandth as large."""
    dW, db, W, b, H, labels, targets = trained_head(1, batch)
    equations = Equations.of(dW, db, W, b, batch, nonnegative=True)
    K = torch.cat([H, torch.ones(batch, 1)], 1).double() @ equations.Vt.T
    error, again = equations.solve(targets[labels][None], K[None], steps=4)
    assert float(error) < SOLVED
    torch.testing.assert_close((again[0] @ equations.Vt)[:, :-1], H, rtol=0, atol=1e-2)
    assert bool((equations.labels(K[None])[0] == labels).all())


def test_samples_with_zeros_are_corners() -> None:
    """Six dimensions: who has eight zeros lies on more facets than a corner needs, so that Qhull lists it, and both conditions hold at it.
    Features as far as float32 tells, 6e-8 of each number, where singular values are a thousandth of the largest."""
    dW, db, W, b, H, labels, targets = trained_head(5, 7, noise=0.7)
    equations = Equations.of(dW, db, W, b, 7, nonnegative=True)
    assert int(((H == 0).sum(1) >= 8).sum()) >= 5
    known, _ = exact_samples(equations, targets)
    distance, nearest = torch.cdist((known.K @ equations.Vt)[:, :-1], H).min(1)
    assert len(set(nearest.tolist())) == len(known.K) >= 5
    assert float(distance.max()) < 1e-2
    assert bool((known.labels == labels[nearest]).all())


def test_corners_lie_on_as_many_facets_as_there_are_dimensions() -> None:
    """No feature is negative, five or more are 0 (six samples: five dimensions) but at the bound on the sum; rounding as above."""
    equations, targets = equations_of(4, 6)
    found = corners(equations, Samples.of(equations, targets, torch.zeros(0, 6, dtype=torch.float64)))
    assert found is not None
    samples = found @ equations.Vt
    features, ones = samples[:, :-1], samples[:, -1]
    inner = features.sum(1) < 0.99 * features.sum(1).max()
    assert float(features.min()) > -1e-6
    assert int((features[inner] < 1e-6).sum(1).min()) >= 5
    torch.testing.assert_close(ones, torch.ones_like(ones))


def test_true_samples_meet_the_conditions_and_what_goes_together_is_drawn() -> None:
    """Alone and in pairs, to the rounding. Gibbs sampling ends at a temperature of .4^4 = .03 a sample, where samples that do not belong
    together are off by one or so."""
    dW, db, W, b, H, labels, targets = trained_head(4, 6)
    equations = Equations.of(dW, db, W, b, 6, nonnegative=True)
    true = Samples.of(equations, targets, torch.cat([H, torch.ones(6, 1)], 1).double() @ equations.Vt.T)
    assert bool((true.labels == labels).all())
    assert float(true.misfit.max()) < 1e-3
    clash = true.clash(true)
    assert float((clash - clash.diag().diag()).max()) < 1e-6
    generator, nobody = torch.Generator().manual_seed(0), true[torch.tensor([], dtype=torch.int64)]
    listed = corners(equations, nobody)
    assert listed is not None
    pool = mixtures(equations, targets, listed, generator)
    pairs = pool.clash(pool)

    def off(rows: Tensor) -> float:
        """On average: each alone, with one that is known, and with the other two."""
        alone = pool.misfit.square() + true[:1].clash(pool)[0]
        return float(
            (alone[rows].sum(1) + sum(pairs[rows[:, i], rows[:, j]] for i, j in ((0, 1), (0, 2), (1, 2)))).mean()
        )

    drawn = sets(pool, pairs, true[:1], 3, 64, generator)
    assert off(drawn) < 0.1 * off(torch.randint(len(pool.K), (64, 3), generator=generator))


def test_a_step_is_that_of_least_squares() -> None:
    """The first damped step of Gauss and Newton, by a Jacobian of torch.func: J^T J + damping diag(J^T J), J^T times the residuals."""
    dW, db, W, b, _, labels, targets = trained_head(2, 3)
    equations = Equations.of(dW, db, W, b, 3, nonnegative=False)
    target = targets[labels]
    K = equations.begin(labels[None], torch.Generator().manual_seed(0))[0]
    _, moved = equations.solve(target[None], K[None], steps=1)

    def residuals(K: Tensor) -> Tensor:
        D = (K @ equations.head).softmax(1) - target
        scale = (equations.S.square() + (2e-7 * equations.S[0]) ** 2).sqrt()
        return torch.cat([((D.T @ K - equations.U * equations.S) / scale).flatten(), K @ equations.Vt[:, -1] - 1])

    J = torch.func.jacrev(residuals)(K).reshape(-1, 9)
    normal = J.T @ J
    step = torch.linalg.solve(normal + 1e-2 * torch.diag(normal.diag()), J.T @ residuals(K)).reshape(3, 3)
    expected = K - step if residuals(K - step).square().sum() < residuals(K).square().sum() else K
    torch.testing.assert_close(moved[0], expected, rtol=1e-6, atol=1e-8)  # float64, systems of condition 1e6 or so


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_of_trained_networks(smoothing: float) -> None:
    """The target is 98 %: of 28, one may be missed. Counts of samples that are alike within classes, which it begins with, miss more."""
    right = before = 0
    for seed in range(4):
        dW, db, W, b, _, labels, targets = trained_head(seed, 7, smoothing)
        start, _ = label_fit(dW, db, W, b, 7, smoothing=smoothing)
        equations = Equations.of(dW, db, W, b, 7, nonnegative=True)
        counts, _ = counts_by_equations(equations, targets, start)
        truth = one_hot(labels, CLASSES).sum(0)
        right += int(torch.minimum(counts, truth).sum())
        before += int(torch.minimum(start, truth).sum())
    assert right >= 27
    assert before < 27
