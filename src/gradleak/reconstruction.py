"""What an attack returns."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Reconstruction:
    """What an attack believes the private data to be, with the evidence for it.

    images      (batch, channel, height, width) in [0, 1], in an order of the attack's own
    labels      (batch,) int64: given, or recovered by the attack
    residual    ||simulate(images, labels) - released|| / ||released||, Euclidean over all released tensors: 0 explains
                everything that was seen, 1 nothing. Needs no secret.
    status      one sentence: what happened and, if it went wrong, what would help
    iterations  evaluations of the objective per restart; 0 for closed forms
    trace       (iteration, objective) pairs, thinned
    """

    images: Tensor
    labels: Tensor
    residual: float
    status: str
    iterations: int = 0
    trace: list[tuple[int, float]] = field(default_factory=list)
