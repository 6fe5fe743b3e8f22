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


@dataclass(frozen=True)
class TextReconstruction:
    """What an attack believes the private texts to be, with the evidence for it.

    tokens    sentences of token ids, special tokens included, in an order of the attack's own
    proven    for each sentence whether every token, and their order, passed every check there is
    bag       token ids that were seen, whether or not they found a sentence
    residual  largest relative distance of a returned sentence to what was seen, 0 to 1; 1 when nothing was returned
    status    one sentence: what happened and, if it went wrong, what would help
    """

    tokens: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    proven: tuple[bool, ...]
    bag: tuple[int, ...]
    residual: float
    status: str
