"""Candidates out of weights, cleaned: the noise that pictures show, and the span that cleaning keeps to."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gradleak.attacks.weights.row_space import Span
from gradleak.modalities.networks import Architecture
from gradleak.observations.fully_connected import FullyConnected
from gradleak.studies.prior_candidates import cleaned_in_span, noise_in


@dataclass(frozen=True)
class Darker:
    """A "denoiser" that takes a tenth of the level of noise off every pixel."""

    shape: tuple[int, int, int] = (1, 8, 8)

    def denoise(self, images: Tensor, sigma: Tensor) -> Tensor:
        return images - 0.1 * sigma.view(-1, 1, 1, 1)


def test_the_noise_that_pictures_show() -> None:
    """A median of n sizes |N(0, sigma^2)| / 0.6745 has the standard error 1.17 sigma / sqrt(n); n = 3 x 16 x 16, four of them: 17 %."""
    noise = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([0.05, 0.2])
    assert noise_in(0.5 + levels[:, None, None, None] * noise).tolist() == pytest.approx(levels.tolist(), rel=0.17)
    assert noise_in(torch.full((1, 1, 5, 5), 0.3)).tolist() == [0]


def test_what_is_cleaned_stays_in_the_span_of_the_training_pictures() -> None:
    generator = torch.Generator().manual_seed(0)
    module = Architecture("homogeneous1000", (1, 8, 8), 2).build(0).double()
    network = FullyConnected.of(module, dict(module.named_parameters()), (1, 8, 8))
    basis = torch.linalg.qr(torch.randn(64, 3, generator=generator, dtype=torch.float64))[0].T
    span = Span(network.inputs(torch.full((1, 1, 8, 8), 0.5)).detach()[0], basis)
    images = 0.5 + 0.01 * torch.randn(2, 1, 8, 8, generator=generator, dtype=torch.float64)
    found = network.inputs(cleaned_in_span(images, Darker(), network, span)).detach()
    torch.testing.assert_close(span.project(found), found)
    assert not torch.allclose(found, span.project(network.inputs(images).detach()))  # and was cleaned there
    everywhere = cleaned_in_span(images, Darker(), network, None)
    assert (
        float((images - everywhere).min()) > 0.03
    )  # sigma from 0.3 down to 0.02, twelve levels: 0.3 / 10 is the first alone
