"""Which reconstruction belongs to which true picture, and would anybody recognise it among others?

An attack on a batch returns its pictures in no particular order, so scores are taken after `match`.
Pictures are (n, channel, height, width) in [0, 1]; any shape (n, ...) works.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradleak.errors import BadInput


def pairwise_mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of every picture of a against every one of b. (n, ...), (m, ...) -> (n, m) float64."""
    if a.shape[1:] != b.shape[1:]:
        raise BadInput(f"Pictures of shape {tuple(a.shape[1:])} and {tuple(b.shape[1:])} cannot be compared.")
    if len(a) == 0:
        return a.new_zeros((0, len(b)), dtype=torch.float64)
    b = b.double().flatten(1)
    return torch.stack([(b - row).square().mean(1) for row in a.double().flatten(1)])


def match(reconstruction: Tensor, truth: Tensor) -> Tensor:
    """The assignment of reconstructions to truths with the smallest total MSE (Hungarian method; Kuhn 1955).

    (m, ...), (n, ...) with m >= n -> (n,) int64: reconstruction[match(reconstruction, truth)] lines up with truth, and
    no reconstruction serves twice. Raises `BadInput` when there are too few reconstructions or some are not finite.
    """
    from scipy.optimize import linear_sum_assignment

    if len(reconstruction) < len(truth):
        raise BadInput(f"{len(reconstruction)} reconstructions cannot be matched with {len(truth)} true pictures.")
    cost = pairwise_mse(truth, reconstruction)
    if not bool(cost.isfinite().all()):
        raise BadInput("The reconstruction holds NaN or infinite pixels, so nothing can be matched with it.")
    _, assignment = linear_sum_assignment(cost.detach().cpu().numpy())  # rows come back sorted
    return torch.as_tensor(assignment, dtype=torch.int64, device=truth.device)


def identification(reconstruction: Tensor, truth: Tensor, decoys: Tensor) -> Tensor:
    """Rank of the truth in a line-up of m + 1 pictures: itself and m decoys, ordered by MSE to the reconstruction.

    (n, ...), (n, ...), (m, ...) -> (n,) int64 from 1 (identified: the top-1 hit of m + 1) to m + 1. A guess without
    information is right in 1 of m + 1 line-ups. A decoy exactly as close as the truth counts as closer, so that a
    reconstruction that says nothing is no hit; one that holds NaN gets rank m + 1.
    """
    if reconstruction.shape != truth.shape:
        raise BadInput(
            f"{tuple(reconstruction.shape)} reconstructions do not line up with {tuple(truth.shape)} truths."
        )
    unchanged = (reconstruction.double() - truth.double()).square().flatten(1).mean(1)
    others = pairwise_mse(reconstruction, decoys)
    return 1 + (~(others > unchanged[:, None])).sum(1)  # "not farther" instead of "closer": counts ties and NaN
