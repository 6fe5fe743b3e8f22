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
    """A Gaussian of whole pictures, seen piece by piece.

    precision  (pieces, pieces, pixels, pixels)
    mean       (pieces, pixels)
    """

    precision: Tensor
    mean: Tensor

    @classmethod
    def of(cls, prior: GaussianPrior, cut: Callable[[Tensor], Tensor]) -> Self:
        """cut: (1, channel, height, width) -> (pieces, pixels), a permutation of the pixels."""
        covariance = prior.covariance()
        precision = torch.linalg.inv(covariance + REMAINDER**2 * torch.eye(len(covariance), dtype=covariance.dtype))
        pixels = cut(torch.arange(prior.mean.numel(), dtype=torch.float64).view(1, *prior.mean.shape)).long()
        rows = precision[pixels.flatten()][:, pixels.flatten()].view(*pixels.shape, *pixels.shape)
        return cls(rows.permute(0, 2, 1, 3).contiguous(), cut(prior.mean[None]))

    def gains(self, pieces: Tensor) -> Tensor:
        """How much less likely, in nats, the picture is after the pieces of two places have changed them: (pieces, pieces)."""
        slope = torch.einsum("abij,bj->ai", self.precision, pieces - self.mean)
        apart = pieces[None] - pieces[:, None]  # [a, b]: what place a sees when it gets the piece of b
        linear = torch.einsum("ai,abi->ab", slope, apart)
        own = torch.einsum("abi,aij,abj->ab", apart, self.precision.diagonal(dim1=0, dim2=1).permute(2, 0, 1), apart)
        both = torch.einsum("abi,abij,abj->ab", apart, self.precision, apart)
        change: Tensor = linear + linear.T + (own + own.T) / 2 - both
        return change


def arrange(pieces: Tensor, evidence: Tensor, puzzle: Puzzle, *, swaps: int, generator: torch.Generator) -> Tensor:
    """The pieces (pieces, pixels) in likely places, by simulated annealing over swaps; float64.

    evidence (pieces, places): the log-likelihood, in nats, that a piece comes from a place. It alone decides where the
    annealing begins: the best assignment.
    """
    from scipy.optimize import linear_sum_assignment

    piece, place = linear_sum_assignment(-evidence.numpy())
    order = torch.empty(len(pieces), dtype=torch.int64)
    order[torch.from_numpy(place)] = torch.from_numpy(piece)  # [place] -> piece
    upper = torch.ones(len(pieces), len(pieces), dtype=torch.bool).triu(1)
    for step in range(swaps):
        said = evidence[order]  # [a, b]: of the piece in a, that it belongs to b
        stays = said.diagonal()
        change = puzzle.gains(pieces[order]) - (said + said.T - stays[:, None] - stays)
        change = change.where(upper, torch.inf)
        temperature = HOTTEST * (COLDEST / HOTTEST) ** (step / swaps)
        cold = step >= COLD * swaps
        # Gumbel's trick: a swap drawn with probabilities exp(-change / temperature).
        noise = -(-torch.rand(change.shape, generator=generator, dtype=change.dtype).clamp_min(1e-12).log()).log()
        chosen = int((change if cold else change / temperature - noise).argmin())
        a, b = divmod(chosen, len(pieces))
        worse = float(change[a, b])
        if cold and worse >= 0:
            break
        if worse < 0 or float(torch.rand((), generator=generator)) < math.exp(-worse / temperature):
            order[[a, b]] = order[[b, a]]
    return pieces[order]
