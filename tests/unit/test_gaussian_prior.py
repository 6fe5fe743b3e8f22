"""The Gaussian prior of pictures: against numpy's covariance, and the power law that it claims."""

import numpy as np
import pytest
import torch

from gradleak.errors import BadInput
from gradleak.modalities.pictures import public_pool
from gradleak.priors.gaussian import GaussianPrior

DIGITS = public_pool("digits", shape=(1, 8, 8), limit=400).images


def test_all_components_are_the_sample_covariance() -> None:
    prior = GaussianPrior.fit(DIGITS, remainder=0.02)
    expected = np.cov(DIGITS.flatten(1).double().numpy().T) + 0.02**2 * np.eye(64)
    np.testing.assert_allclose(prior.covariance().numpy(), expected, atol=1e-12)
    root = prior.factor().numpy()
    np.testing.assert_allclose(root @ root.T, expected, atol=1e-12)
    np.testing.assert_allclose(prior.mean.numpy()[0], DIGITS.double().mean(0)[0].numpy(), atol=1e-12)


def test_dropped_components_keep_the_total_variance() -> None:
    prior = GaussianPrior.fit(DIGITS, components=10, remainder=1e-6)
    total = np.cov(DIGITS.flatten(1).double().numpy().T).trace()
    assert prior.std.shape == (10,)
    assert float(prior.covariance().trace()) == pytest.approx(total, rel=1e-6)


def test_coefficients_and_pixels_are_inverse() -> None:
    prior = GaussianPrior.fit(DIGITS)
    c = torch.randn(5, len(prior.std), generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(prior.coefficients(prior.pixels(c)), c, atol=1e-9, rtol=0)
    # Of the pictures it was fitted to, coefficients have mean 0 and variance 1.
    own = prior.coefficients(DIGITS)
    torch.testing.assert_close(own.mean(0), torch.zeros(len(prior.std)).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(own.var(0), torch.ones(len(prior.std)).double(), atol=1e-6, rtol=0)


def test_near_looks_at_the_neighbours() -> None:
    prior, image = GaussianPrior.fit(DIGITS, remainder=0.03), DIGITS[7]
    near = prior.near(image, count=50, shrinkage=0.0)
    distance = ((DIGITS - image) ** 2).flatten(1).sum(1).numpy()
    rows = DIGITS.flatten(1).double().numpy()[np.argsort(distance)[:50]]
    np.testing.assert_allclose(near.mean.flatten().numpy(), rows.mean(0), atol=1e-12)
    np.testing.assert_allclose(near.covariance().numpy(), np.cov(rows.T) + 0.03**2 * np.eye(64), atol=1e-9)
    assert prior.near(image, count=len(DIGITS)) is prior
    smooth = GaussianPrior.smooth((1, 8, 8))
    assert smooth.near(image) is smooth


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10)])
def test_smooth_is_a_power_law(shape: tuple[int, int, int]) -> None:
    prior = GaussianPrior.smooth(shape, std=0.2)
    n, V = int(np.prod(shape)), prior.components.flatten(1)
    torch.testing.assert_close(V @ V.T, torch.eye(n).double(), atol=1e-10, rtol=0)
    variance = prior.covariance().diagonal()
    assert float(variance.mean()) == pytest.approx(0.2**2 + 0.01**2, rel=1e-9)
    # Waves of 2 and of 4 half-cycles along the width: twice the frequency, a quarter of the power.
    x = torch.arange(shape[2]).double() + 0.5

    def power(k: int) -> float:
        wave = torch.cos(torch.pi * k * x / shape[2]).expand(shape).flatten()
        wave = wave / wave.norm()
        return float(wave @ prior.covariance() @ wave) - 0.01**2

    assert power(2) / power(4) == pytest.approx(4, rel=1e-6)
    if shape[0] == 3:
        one, other = 0, shape[1] * shape[2]  # the same pixel in two channels
        C = prior.covariance()
        assert float(C[one, other] / (C[one, one] - 0.01**2)) == pytest.approx(0.9, rel=1e-6)


def test_shapes_are_checked() -> None:
    with pytest.raises(BadInput, match="at least two pictures"):
        GaussianPrior.fit(DIGITS[:1])
    prior = GaussianPrior.fit(DIGITS)
    with pytest.raises(BadInput, match="1x8x8"):
        GaussianPrior(prior.mean, prior.components[:, :, :4], prior.std)
    with pytest.raises(BadInput, match="remainder"):
        GaussianPrior(prior.mean, prior.components, prior.std, remainder=0.0)


def test_the_energy_is_the_mahalanobis_distance() -> None:
    """Against the covariance, inverted plainly; float64, and a condition number below 1e6."""
    generator = torch.Generator().manual_seed(0)
    prior = GaussianPrior.fit(torch.rand(30, 1, 4, 4, generator=generator), remainder=0.05)
    images = torch.rand(3, 1, 4, 4, generator=generator, dtype=torch.float64)
    apart = (images - prior.mean).flatten(1)
    plainly = sum(float(row @ torch.linalg.inv(prior.covariance()) @ row) for row in apart) / 2 / apart.numel()
    assert float(prior.energy(images)) == pytest.approx(plainly, rel=1e-9)
    assert float(prior.energy(prior.mean[None])) == pytest.approx(0, abs=1e-12)


def test_denoised_is_the_posterior_mean() -> None:
    """Against the textbook's formula with the whole covariance; noise of its own for each picture, and one for all."""
    generator = torch.Generator().manual_seed(0)
    prior = GaussianPrior.fit(torch.rand(40, 2, 4, 3, generator=generator, dtype=torch.float64), components=10)
    noisy, sigma = torch.rand(3, 2, 4, 3, generator=generator, dtype=torch.float64), torch.tensor([0.01, 0.3, 2.0])
    covariance = prior.covariance()
    for image, s, denoised in zip(noisy, sigma, prior.denoise(noisy, sigma), strict=True):
        seen = covariance + s.double() ** 2 * torch.eye(24, dtype=torch.float64)
        expected = prior.mean.flatten() + covariance @ torch.linalg.solve(seen, (image - prior.mean).flatten())
        assert torch.allclose(denoised.flatten(), expected, atol=1e-9)
        assert torch.allclose(prior.denoise(image[None], s)[0], denoised, atol=1e-12)
    assert prior.denoise(noisy.float(), sigma).dtype == torch.float32
    assert prior.shape == (2, 4, 3)
