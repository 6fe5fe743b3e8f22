"""Which piece belongs where: pieces of a picture, arranged so that the whole is likely and each is where it seems to come from."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gradleak.priors.gaussian import GaussianPrior

HOTTEST, COLDEST = 20.0, 1.0  # nats
REMAINDER = 0.05  # standard deviation of a pixel of a piece, about its error while places are free: 22 to 24 dB
COLD = 0.9  # of the swaps; after that only those that gain


@dataclass(frozen=True)
class Puzzle:
    """How unlikely, under a Gaussian of whole pictures, each order of these pieces is: a quadratic assignment problem.

    pairs   [a, i, b, j]: piece i in place a beside piece j in place b, (pieces, pieces, pieces, pieces), nats, float64
    single  [a, i]: piece i in place a, whatever the others do, (pieces, pieces)
    """

    pairs: Tensor
    single: Tensor

    @classmethod
    def of(cls, pieces: Tensor, prior: GaussianPrior, cut: Callable[[Tensor], Tensor]) -> Self:
        """pieces (pieces, pixels), float64; cut: (1, channel, height, width) -> (pieces, pixels), a permutation of the pixels."""
        covariance = prior.covariance()
        precision = torch.linalg.inv(covariance + REMAINDER**2 * torch.eye(len(covariance), dtype=covariance.dtype))
        pixels = cut(torch.arange(prior.mean.numel(), dtype=torch.float64).view(1, *prior.mean.shape)).long()
        n, size = pixels.shape
        precision = precision[pixels.flatten()][:, pixels.flatten()]
        half = (pieces @ precision.view(n, size, n * size)).view(n, n, n, size)  # [a, i, b, pixel]
        return cls(half @ pieces.T, -(half * cut(prior.mean[None])).sum((2, 3)))

    def gains(self, order: Tensor) -> Tensor:
        """How much less likely, in nats, the picture is after the pieces of two places have changed them: (places, places).

        order (places,): [place] -> piece."""
        places = torch.arange(len(order))
        a, b, i, j = places[:, None], places, order[:, None], order  # piece i in place a, j in b
        field = self.single + self.pairs[:, :, places, order].sum(2)  # [a, i]: what place a feels of all of them
        own = self.pairs[a, j, a, j] - 2 * self.pairs[a, i, a, j] + self.pairs[a, i, a, i]
        alone = field[a, j] - field[a, i] + own / 2
        both = self.pairs[a, j, b, j] - self.pairs[a, j, b, i] - self.pairs[a, i, b, j] + self.pairs[a, i, b, i]
        change: Tensor = alone + alone.T - both
        return change


def arrange(puzzle: Puzzle, evidence: Tensor, *, swaps: int, generator: torch.Generator) -> Tensor:
    """A likely order, (places,): [place] -> piece, by simulated annealing over swaps.

    evidence (pieces, places): the log-likelihood, in nats, that a piece comes from a place. It alone decides where the
    annealing begins: the best assignment.
    """
    from scipy.optimize import linear_sum_assignment

    piece, place = linear_sum_assignment(-evidence.numpy())
    order = torch.empty(len(evidence), dtype=torch.int64)
    order[torch.from_numpy(place)] = torch.from_numpy(piece)
    upper = torch.ones(len(order), len(order), dtype=torch.bool).triu(1)
    for step in range(swaps):
        said = evidence[order]  # [a, b]: of the piece in a, that it belongs to b
        stays = said.diagonal()
        change = puzzle.gains(order) - (said + said.T - stays[:, None] - stays)
        change = change.where(upper, torch.inf)
        temperature = HOTTEST * (COLDEST / HOTTEST) ** (step / swaps)
        cold = step >= COLD * swaps
        # Gumbel's trick: a swap drawn with probabilities exp(-change / temperature).
        noise = -(-torch.rand(change.shape, generator=generator, dtype=change.dtype).clamp_min(1e-12).log()).log()
        chosen = int((change if cold else change / temperature - noise).argmin())
        a, b = divmod(chosen, len(order))
        worse = float(change[a, b])
        if cold and worse >= 0:
            break
        if worse < 0 or float(torch.rand((), generator=generator)) < math.exp(-worse / temperature):
            order[[a, b]] = order[[b, a]]
    return order
