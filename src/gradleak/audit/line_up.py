"""Which of these candidates is it? The best that anybody can do who knows the mechanism, and everything but one sample.

What a private step releases of a sample is its cut gradient g plus noise N(0, s^2 I) and whatever the others add, which this attacker
knows and subtracts. Of equally likely candidates none is named more often than the likeliest, the matched filter

    argmax_j  <g_j, y> / s^2 - ||g_j||^2 / 2 s^2

(the Neyman-Pearson lemma for several hypotheses), so that its success is how much is to be had from this release: above what reconstruction
attacks reach, below what the privacy of the mechanism allows.
"""

import math
from typing import Any

import torch
from torch import Tensor

from gradleak.observations.observation import Observation
from gradleak.observations.tensors import flatten

DRAWS = 20_000
MOST_NUMBERS = 2**28  # of all candidates' gradients together: a gigabyte


def signals(observation: Observation[Any], inputs: Any, labels: Tensor | None) -> Tensor:
    """What each sample by itself adds to the release, (n, numbers) float32."""
    with torch.no_grad():
        rows = [
            flatten(observation.simulate(inputs[i : i + 1], None if labels is None else labels[i : i + 1])).float()
            for i in range(len(inputs))
        ]
    return torch.stack(rows)


def success(gram: Tensor, deviation: float, true: int, *, draws: int = DRAWS, seed: int = 0) -> float:
    """How often the likeliest of n candidates is the true one, over the noise. gram (n, n): inner products of their signals."""
    G = gram.double() / deviation**2
    values, vectors = torch.linalg.eigh(G)
    root = vectors * values.clamp_min(0).sqrt()
    noise = torch.randn(draws, len(G), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores = G[true] - G.diagonal() / 2 + noise @ root.T
    return float((scores.argmax(1) == true).double().mean())


def success_over_steps(
    grams: Tensor, deviation: float, rate: float, true: int, *, draws: int = 200, seed: int = 0
) -> float:
    """The same after steps with gradients of their own, grams (steps, n, n), in each of which the sample was drawn at this rate: the likelihood of
    a step is a mixture of both."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(draws, grams.shape[1], dtype=torch.float64)
    for gram in grams:
        G = gram.double() / deviation**2
        values, vectors = torch.linalg.eigh(G)
        noise = (
            torch.randn(draws, len(G), generator=generator, dtype=torch.float64)
            @ (vectors * values.clamp_min(0).sqrt()).T
        )
        drawn = (torch.rand(draws, 1, generator=generator, dtype=torch.float64) < rate).double()
        ratio = drawn * G[true] - G.diagonal() / 2 + noise
        with_sample = ratio + math.log(rate)
        total += with_sample if rate == 1 else torch.logaddexp(with_sample, torch.full_like(ratio, math.log1p(-rate)))
    return float((total.argmax(1) == true).double().mean())
