"""L-BFGS against known minima, and the whitening against its closed form."""

import numpy as np
import torch
from scipy.optimize import minimize, rosen, rosen_der
from torch import Tensor
from torch.func import grad_and_value, vmap

from gradleak.attacks.search.lbfgs import Evaluate, gauss_newton_factor, lbfgs, unwhiten, whitened


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def evaluate_rosenbrock(x: Tensor) -> tuple[Tensor, Tensor]:
    gradient, value = vmap(grad_and_value(rosenbrock))(x)
    return gradient, value


def quadratics(H: Tensor, b: Tensor) -> Evaluate:
    """Row k: x H_k x / 2 - b_k x, with H (K, n, n) and b (K, n); the minimum is at H_k^-1 b_k."""

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        Hx = (H * x[:, None]).sum(2)
        return Hx - b, (x * (Hx / 2 - b)).sum(1)

    return evaluate


def test_quadratics_reach_the_closed_form_minimum() -> None:
    A, b = random(3, 8, 8), random(3, 8, seed=1)
    H = A @ A.transpose(1, 2) + torch.eye(8)
    found = lbfgs(quadratics(H, b), random(3, 8, seed=2), evaluations=120)
    exact = np.linalg.solve(H.numpy(), b.numpy()[..., None])[..., 0]
    # Near the minimum the value is flat to machine precision, 1e-16, within a distance of its root, 1e-8.
    assert np.abs(found.x.numpy() - exact).max() < 1e-7


def test_rosenbrock_in_no_more_than_twice_the_evaluations_of_scipy() -> None:
    starts = torch.stack([torch.full((10,), -1.0), torch.zeros(10), torch.linspace(-2, 2, 10)]).double()
    found = lbfgs(evaluate_rosenbrock, starts, evaluations=400, goal=1e-14)
    assert (found.value <= 1e-14).all()
    assert (found.x - 1).abs().max() < 1e-5  # smallest curvature there about 0.1: distance < sqrt(2e-14 / 0.1)
    needed = [
        minimize(rosen, s, jac=rosen_der, method="L-BFGS-B", options={"maxcor": 20, "ftol": 0, "gtol": 1e-7}).nfev
        for s in starts.numpy()
    ]
    assert found.iterations <= 2 * max(needed)


def test_rows_do_not_influence_each_other() -> None:
    starts = random(4, 6)
    together = lbfgs(evaluate_rosenbrock, starts, evaluations=40)
    for k in range(4):
        alone = lbfgs(evaluate_rosenbrock, starts[k : k + 1], evaluations=40)
        # The same numbers, but for the order in which the machine adds them up.
        torch.testing.assert_close(together.x[k], alone.x[0], rtol=1e-6, atol=1e-6)


def test_a_row_that_is_nan_stays_where_it_is_and_disturbs_nobody() -> None:
    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        return evaluate_rosenbrock(x)

    starts = random(3, 6)
    healthy = lbfgs(evaluate, starts, evaluations=60)
    starts[1] = torch.nan
    found = lbfgs(evaluate, starts, evaluations=60)
    assert found.value[1] == torch.inf
    assert found.x[1].isnan().all()
    assert torch.equal(found.x[[0, 2]], healthy.x[[0, 2]])


def test_trials_that_are_not_finite_count_as_too_long() -> None:
    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:  # x - log x: NaN below 0, minimum 1 at 1
        return 1 - 1 / x, (x - x.log()).sum(1)

    found = lbfgs(evaluate, torch.tensor([[0.01], [0.5], [30.0]], dtype=torch.float64), evaluations=60)
    torch.testing.assert_close(found.x, torch.ones(3, 1, dtype=torch.float64), rtol=0, atol=1e-7)


def test_evaluations_are_counted_values_only_fall_and_the_goal_ends_it() -> None:
    calls, reports = [], []

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(x))
        return evaluate_rosenbrock(x)

    found = lbfgs(evaluate, random(2, 5), evaluations=30, on_step=lambda *report: reports.append(report))
    assert found.iterations == len(calls) == 30
    values = torch.tensor([values for _, values in found.trace])
    assert (values[1:] <= values[:-1]).all()
    assert reports[-1] == (30, 30, float(found.value.min()))
    early = lbfgs(evaluate_rosenbrock, random(2, 3), evaluations=10_000, goal=1e-3)  # one minimum up to 3 unknowns
    assert early.iterations < 1_000
    assert (early.value <= 1e-3).all()
    torch.testing.assert_close(early.value, vmap(rosenbrock)(early.x))


def test_a_start_at_the_minimum_takes_one_evaluation() -> None:
    found = lbfgs(evaluate_rosenbrock, torch.ones(1, 4, dtype=torch.float64), evaluations=50)
    assert found.iterations == 1
    assert found.value == 0


def test_whitening_is_the_inverse_of_the_damped_gauss_newton_matrix() -> None:
    A, damping = random(12, 7), 1e-2
    factor = gauss_newton_factor(lambda x: A @ x, random(7, seed=1), damping=damping, chunk=3)
    assert factor is not None
    H = A.numpy().T @ A.numpy()
    H += damping * np.diag(H).mean() * np.eye(7)
    W = unwhiten(torch.eye(7, dtype=torch.float64), factor).numpy()
    np.testing.assert_allclose(W.T @ W, np.linalg.inv(H), rtol=1e-9, atol=1e-12)  # condition of H below 1e3


def test_whitening_takes_the_conditioning_out_of_a_quadratic() -> None:
    scales = torch.logspace(0, -4, 30, dtype=torch.float64)  # curvatures from 1 to 1e-8
    A = torch.linalg.qr(random(40, 30)).Q * scales
    b = A @ random(30, seed=1)  # so that the least value is 0

    def evaluate(x: Tensor) -> tuple[Tensor, Tensor]:
        r = x @ A.T - b
        return r @ A, r.square().sum(1) / 2

    factor = gauss_newton_factor(lambda x: A @ x - b, torch.zeros(30, dtype=torch.float64), damping=1e-12)
    assert factor is not None
    start = torch.zeros(1, 30, dtype=torch.float64)
    inside = lbfgs(whitened(evaluate, start[0], factor), start, evaluations=10, goal=1e-18)
    # An identity Hessian takes one step down the gradient, once the line search has found its length.
    assert inside.value <= 1e-18
    torch.testing.assert_close(evaluate(unwhiten(inside.x, factor))[1], inside.value, rtol=1e-3, atol=1e-20)
    assert lbfgs(evaluate, start, evaluations=10).value > 1e-9  # without it the flat directions are still to come


def test_no_factor_where_there_is_none() -> None:
    x = torch.ones(3, dtype=torch.float64)
    assert gauss_newton_factor(lambda x: x[:2], x, damping=0) is None  # singular
    assert gauss_newton_factor(lambda x: x * torch.nan, x) is None
    assert gauss_newton_factor(lambda x: torch.cdist(x[:, None], x[:, None]), x) is None  # no forward derivative
