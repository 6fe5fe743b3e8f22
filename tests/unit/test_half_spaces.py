"""A Gaussian cut by half-spaces: against scipy's truncated normal, closed forms, and another solver for the box."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear
from scipy.stats import truncnorm

from gradleak.attacks.activation_patterns.half_spaces import Gaussian, Sites, cut, nearest_in_box, truncated


def some_gaussian(n: int, number: int = 0) -> Gaussian:
    generator = torch.Generator().manual_seed(number)
    return Gaussian(
        torch.randn(n, generator=generator, dtype=torch.float64),
        torch.randn(n, n, generator=generator, dtype=torch.float64),
    )


def no_sites(sides: int) -> Sites:
    return Sites(*torch.zeros(2, sides, dtype=torch.float64))


def test_conditioning_is_the_closed_form() -> None:
    state = some_gaussian(6)
    rows, values, noise = some_gaussian(6, 1).factor[:2], torch.tensor([0.3, -2.0]).double(), torch.tensor([0.1, 1e-4])
    found = state.given(rows, values, noise.double())
    # Rasmussen and Williams (2006), equation A.6, in numpy.
    C, R, m = (state.factor @ state.factor.T).numpy(), rows.numpy(), state.mean.numpy()
    gain = C @ R.T @ np.linalg.inv(R @ C @ R.T + np.diag(noise.double().numpy() ** 2))
    np.testing.assert_allclose(found.mean, m + gain @ (values.numpy() - R @ m), atol=1e-7)
    np.testing.assert_allclose(found.factor @ found.factor.T, C - gain @ R @ C, atol=1e-7)


def test_no_equations_change_nothing() -> None:
    state = some_gaussian(4)
    found = state.given(torch.zeros(0, 4).double(), torch.zeros(0).double(), torch.zeros(0).double())
    assert torch.equal(found.mean, state.mean)
    assert torch.equal(found.factor, state.factor)


@pytest.mark.parametrize("mean", [-1e3, -40.0, -29.0, -3.0, 0.0, 2.0, 9.0, 50.0])
def test_moments_of_a_truncated_normal(mean: float) -> None:
    at, zero = torch.tensor([mean]).double(), torch.zeros(1).double()
    middle, spread = truncated(at, zero + 1.0, zero)
    # scipy cancels far out: the exponential distribution of rate -mean is the limit.
    exponential = (1 / -mean, 1 / mean**2) if mean < -100 else None
    half = truncnorm(-mean, np.inf, loc=mean)
    expected = exponential or (float(half.mean()), float(half.var()))
    # scipy's own variance carries rounding of about eps * mean^2 relative; the series has an error of 1 / mean^2 of 1 / mean^2.
    assert float(middle[0]) == pytest.approx(float(expected[0]), rel=1e-5)
    assert float(spread[0]) == pytest.approx(float(expected[1]), rel=1e-4)


def test_one_half_space_is_exact() -> None:
    state = some_gaussian(5)
    row, offset = some_gaussian(5, 3).mean[None], torch.tensor([-1.5]).double()
    found, _, changes = cut(state, row, offset, no_sites(1), sweeps=60, tolerance=1e-12)
    g = (row @ state.mean + offset).item()
    C = state.factor @ state.factor.T
    v = (row @ C @ row.T).item()
    cut_normal = truncnorm(-g / math.sqrt(v), np.inf, loc=g, scale=math.sqrt(v))
    middle, spread = cut_normal.mean(), cut_normal.var()
    along = (C @ row[0]) / v
    # The blur is a thousandth of the standard deviation: it shifts moments by its square.
    torch.testing.assert_close(found.mean, state.mean + along * (float(middle) - g), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        found.factor @ found.factor.T, C + torch.outer(along, along) * (float(spread) - v), atol=1e-3, rtol=1e-4
    )
    assert changes[-1] < 1e-12


def test_many_half_spaces_against_samples() -> None:
    state, rows = some_gaussian(3, 5), some_gaussian(8, 6).factor[:, :3]
    truth = state.mean + state.factor @ torch.tensor([0.5, -0.5, 1.0]).double()
    offsets = 0.5 - rows @ truth  # so that the truth is inside
    found, _, _ = cut(state, rows, offsets, no_sites(8), sweeps=100, tolerance=1e-10)
    draws = state.mean + torch.randn(500_000, 3, generator=torch.Generator().manual_seed(0)).double() @ state.factor.T
    inside = draws[(draws @ rows.T + offsets > 0).all(1)]
    assert len(inside) > 2_500  # so that the standard error of their mean is 2 % of a standard deviation
    # Expectation propagation is an approximation, worst in few dimensions: we ask for a quarter of a standard deviation.
    assert float(((found.mean - inside.mean(0)) / inside.std(0)).abs().max()) < 0.25


def test_contradictory_half_spaces_end_the_sweeps() -> None:
    state = Gaussian(torch.zeros(1).double(), torch.ones(1, 1).double())
    rows, offsets = torch.tensor([[1.0], [-1.0]]).double(), torch.tensor([-1.0, -1.0]).double()  # x > 1 and x < -1
    found, _, changes = cut(state, rows, offsets, no_sites(2), sweeps=50, tolerance=1e-9)
    assert bool(found.mean.isfinite().all())
    assert len(changes) <= 50


def test_the_box_against_another_solver() -> None:
    state = some_gaussian(12, 2)
    root = torch.linalg.inv(state.factor)
    expected = lsq_linear(root.numpy(), (root @ state.mean).numpy(), bounds=(0, 1), tol=1e-13).x
    found = nearest_in_box(state, steps=5_000).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.min() >= 0
    assert found.max() <= 1
