"""Latents in place of pixels (Rombach et al. 2022, arXiv:2112.10752): what RED-diff searches (red_diff.py) where the denoiser is one of latents.

They are scaled to unit variance, and stand for their decoded pictures. What no latent draws is taken from the release afterwards, by
a search in pixels (`Problem.answers`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gradleak.attacks.diffusion.problem import Problem, Space
from gradleak.priors.denoisers.diffusion import LatentDiffusion


def among_latents(problem: Problem, denoiser: LatentDiffusion) -> Space:
    """Of these pictures; levels of noise are in units of latents."""
    pictures = problem.start
    with torch.no_grad():
        latents = denoiser.encode(pictures.flatten(0, 1).float())
    latents = latents.view(*pictures.shape[:2], *latents.shape[1:])  # (K, batch, channel, height, width)

    def drawn(one: Tensor) -> Tensor:  # (batch, ...) latents -> pictures
        return denoiser.decode(one).to(pictures)

    def denoised(noisy: Tensor, sigma: float) -> Tensor:
        level = torch.full((noisy.shape[0] * noisy.shape[1],), sigma).to(noisy)
        return denoiser.clean(denoiser.network, noisy.flatten(0, 1), level).view_as(noisy)

    def filtered(some: Tensor, gain: Callable[[Tensor], Tensor]) -> Tensor:
        return gain(torch.ones(()).to(some)) * some

    return Space(latents, drawn, denoised, filtered)
