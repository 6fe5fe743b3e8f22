"""The last layer's equations: solved at the right labels, found for trained networks, and when they are asked."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from gradleak.attacks.label_equations import SOLVED, Equations, counts_by_equations
from gradleak.attacks.labels import label_fit

CLASSES, FEATURES = 10, 48
EYE = torch.eye(CLASSES, dtype=torch.float64)


def trained_head(seed: int, batch: int, smoothing: float = 0.0) -> tuple[Tensor, ...]:
    """(dW, db, W, b, H, labels, targets) as a ReLU network after training has them: features about the means of their classes, and a
    head that is mostly right. Gradients as float32 rounds them."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.rand(CLASSES, FEATURES, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    noise = torch.randn(batch, FEATURES, generator=generator, dtype=torch.float64)
    H = (means[labels] + 0.4 * noise).clamp_min(0)
    W = 1.5 * (means - means.mean(0))
    b = -0.75 * (means - means.mean(0)).mul(means + means.mean(0)).sum(1)
    targets = (1 - smoothing) * EYE + smoothing / CLASSES
    D = (H @ W.T + b).softmax(1) - targets[labels]
    dW, db = (t.float().double() for t in (D.T @ H / batch, D.mean(0)))
    return dW, db, W, b, H, labels, targets


@pytest.mark.parametrize("batch", [2, 5, 8])
def test_the_right_labels_solve_the_equations(batch: int) -> None:
    """At the true features the error is what float32 rounds, 6e-8 of each number, in units of singular values a thousandth as large."""
    dW, db, W, b, H, labels, targets = trained_head(1, batch)
    equations = Equations.of(dW, db, W, b, batch, nonnegative=True)
    K = torch.cat([H, torch.ones(batch, 1)], 1).double() @ equations.Vt.T
    error, again = equations.solve(targets[labels][None], K[None], steps=4)
    assert float(error) < SOLVED
    torch.testing.assert_close((again[0] @ equations.Vt)[:, :-1], H, rtol=0, atol=1e-2)


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
