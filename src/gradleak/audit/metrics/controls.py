"""What somebody without the observation would come up with: the controls that every score stands next to."""

from __future__ import annotations

from torch import Tensor

from gradleak.audit.metrics.matching import pairwise_mse
from gradleak.errors import BadInput


def mean_image(public: Tensor) -> Tensor:
    """The average public picture, the best blind guess under MSE. (m, channel, height, width) -> (channel, ...)."""
    _check(public)
    return public.double().mean(0).to(public.dtype)


def nearest_public(truth: Tensor, public: Tensor) -> Tensor:
    """For every truth the public picture with the smallest MSE to it. (n, ...), (m, ...) -> (n, ...).

    An oracle control: it is chosen with the truth in hand, which no attacker has. It says how good a score looks when a
    merely similar picture is handed in, so an attack that stays below it has shown no more than "a picture of this kind".
    """
    _check(public)
    return public[pairwise_mse(truth, public).argmin(1)]


def _check(public: Tensor) -> None:
    if len(public) == 0:
        raise BadInput("There are no public pictures to compare with: take a larger public pool.")
