"""What an attack returns."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor

SOLVED, CLOSE = 1e-3, 0.1  # relative residuals: three digits of the release explained; nine tenths of it


class Outcome(Enum):
    """What became of an attack, as a sentence."""

    SOLVED = "It explains the observation."
    CLOSE = "It explains most of the observation."
    GUESSED = "It is a guess: nothing proves it."
    STUCK = "It does not explain the observation."
    NOTHING = "Nothing came out."
    DIVERGED = "The search diverged: its numbers are not finite."


@dataclass(frozen=True)
class Reconstruction:
    """What an attack believes the private data to be, with the evidence for it.

    value       pictures (batch, channel, height, width) in [0, 1], sentences of token ids, special tokens included, or a
                number of samples; in an order of the attack's own
    labels      (batch,) int64: given, or recovered by the attack; None where there are none
    residual    ||simulate(value, labels) - released|| / ||released||, Euclidean over all released tensors: 0 explains
                everything that was seen, 1 nothing. Needs no secret. Where an attack checks layers instead: the largest relative
                distance of what it returned to what was seen, 1 when it returned nothing
    status      one sentence: what happened and, if it went wrong, what would help
    outcome     the same as one of a few values
    proven      for each entry of value whether it passed every check there is, and nothing else could
    bag         token ids that were seen, whether or not they found a sentence
    spread      deviation of each pixel among samples that explain the release alike, shaped as value: what was not told, and a prior
                has invented; None where there is one answer
    iterations  evaluations of the objective per restart; 0 for closed forms
    trace       (iteration, objective) pairs, thinned
    """

    value: Any
    labels: Tensor | None
    residual: float
    status: str
    outcome: Outcome
    proven: tuple[bool, ...] = ()
    bag: tuple[int, ...] = ()
    iterations: int = 0
    trace: list[tuple[int, float]] = field(default_factory=list)
    spread: Tensor | None = None


def outcome_of(residual: float) -> Outcome:
    """By the relative residual alone."""
    if not math.isfinite(residual):
        return Outcome.DIVERGED
    return Outcome.SOLVED if residual <= SOLVED else Outcome.CLOSE if residual <= CLOSE else Outcome.STUCK
