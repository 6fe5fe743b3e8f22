"""RED-diff among latents: the same search (red_diff.py) where the denoiser is one of latents (Rombach et al. 2022, arXiv:2112.10752).

Solves    min over l of -log p(released | decode(l)) - log p(l), the gradient of -log p replaced by (l - D(l + sigma e, sigma)) times
          (1 + sigma^2) / sigma^2: latents are scaled to unit variance, and the weight is that of a Gaussian with it; Adam, rate 0.1
Differs   What no latent draws is taken from the release afterwards, by a search in pixels (`Problem.answers`)
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradleak.attacks.diffusion.problem import Problem, counted
from gradleak.attacks.search.descend import OnStep, evaluated, rowwise
from gradleak.priors.denoisers.diffusion import LatentDiffusion

RATE = 0.1  # of Adam, in standard deviations of a latent


def distilled_among_latents(
    problem: Problem,
    denoiser: LatentDiffusion,
    sigmas: Sequence[float],
    generator: torch.Generator,
    on_step: OnStep | None,
) -> Tensor:
    """Where Adam ends, decoded: (K, batch, channel, height, width). sigmas: of each step, in units of latents."""
    pictures = problem.start
    with torch.no_grad():
        latents = denoiser.encode(pictures.flatten(0, 1).float())
    latents = latents.view(*pictures.shape[:2], *latents.shape[1:])  # (K, batch, channel, height, width)

    def drawn(one: Tensor) -> Tensor:  # (batch, ...) latents -> pictures
        return denoiser.decode(one).to(pictures)

    def unlikely(one: Tensor, *given: Any) -> Tensor:
        return problem.unlikely(drawn(one), *given)

    first, second = torch.zeros_like(latents), torch.zeros_like(latents)
    evaluate = rowwise(unlikely, len(latents))
    for step, sigma in enumerate(sigmas, 1):
        noisy = latents + sigma * torch.randn(latents.shape, generator=generator).to(latents)
        gradient, value = evaluated(evaluate, latents, problem.given)
        with torch.no_grad():
            level = torch.full((latents.shape[0] * latents.shape[1],), sigma).to(latents)
            clean = denoiser.clean(denoiser.network, noisy.flatten(0, 1), level).view_as(latents)
        gradient = gradient + (1 + sigma**2) / sigma**2 * (latents - clean)
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient.square()
        rate = RATE * (1 + math.cos(math.pi * step / len(sigmas))) / 2
        latents = latents - rate * (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
        counted(on_step, step, len(sigmas), value)
    with torch.no_grad():
        return torch.stack([drawn(one) for one in latents])
