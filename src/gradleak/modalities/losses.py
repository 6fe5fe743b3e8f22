"""What training minimises. A loss is a value that a model carries: any callable (logits, targets) -> scalar with a `reduction`.

One of your own needs these three things and nothing else; the ones below can be written to files.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.errors import BadInput

Reduction = Literal["mean", "sum"]
MOST = 1e6  # weight of a class


class Loss(Protocol):
    """(logits (n, classes), targets) -> scalar. str() of it stands in the threat model."""

    @property
    def reduction(self) -> Reduction:
        """Over what is predicted."""

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class CrossEntropy:
    """Softmax cross entropy; targets are (n,) class indices, -100 to leave one out, or (n, classes) probabilities.

    class_weights    one factor per class, or none
    label_smoothing  0 to 1
    """

    reduction: Reduction = "mean"
    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing <= 1:
            raise BadInput(f"Labels are smoothed by 0 to 1, not by {self.label_smoothing:g}.")
        if not all(0 <= weight <= MOST for weight in self.class_weights or ()):
            raise BadInput(f"A class has a weight from 0 to {MOST:g}.")

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        weights = None if self.class_weights is None else logits.new_tensor(self.class_weights)
        return F.cross_entropy(logits, targets, weights, reduction=self.reduction, label_smoothing=self.label_smoothing)

    @property
    def plain(self) -> bool:
        """Whether it is the cross entropy whose gradient the closed forms know: neither weights nor smoothing."""
        return self.class_weights is None and self.label_smoothing == 0

    def __str__(self) -> str:
        more = "" if self.class_weights is None else ", weighted classes"
        more += f", label smoothing {self.label_smoothing:g}" if self.label_smoothing else ""
        return f"cross entropy, {self.reduction} over the batch{more}"


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """One sigmoid per class; targets are (n,) class indices, or (n, classes) numbers from 0 to 1."""

    reduction: Reduction = "mean"

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        wanted = targets.to(logits) if targets.ndim > 1 else torch.eye(logits.shape[1]).to(logits)[targets]
        return F.binary_cross_entropy_with_logits(logits, wanted, reduction=self.reduction)

    def __str__(self) -> str:
        return f"binary cross entropy of each class, {self.reduction}"


@dataclass(frozen=True)
class FocalLoss:
    """(1 - p)^gamma times the cross entropy (Lin et al. 2017, arXiv:1708.02002, equation 4); targets (n,) class indices."""

    reduction: Reduction = "mean"
    gamma: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 100:
            raise BadInput(f"The gamma of the focal loss lies between 0 and 100, not at {self.gamma:g}.")

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        log_p = -F.cross_entropy(logits, targets, reduction="none")
        each = -((1 - log_p.exp()) ** self.gamma) * log_p
        return each.mean() if self.reduction == "mean" else each.sum()

    def __str__(self) -> str:
        return f"focal loss, gamma {self.gamma:g}, {self.reduction} over the batch"


@dataclass(frozen=True)
class SummedLoss:
    """Several losses of the same outputs, added up.

    terms  (weight, name in `LOSSES`) of each, which is as it is unless told otherwise; two or more, and no sum in a sum
    """

    reduction: Reduction = "mean"
    terms: tuple[tuple[float, str], ...] = ((1.0, "cross-entropy"), (1.0, "focal"))

    def __post_init__(self) -> None:
        names = [name for name in LOSSES if name != "sum"]
        if len(self.terms) < 2 or not all(name in names and 0 < abs(weight) <= MOST for weight, name in self.terms):
            raise BadInput(
                f"A sum of losses has two terms or more, each a weight up to {MOST:g} and one of {', '.join(names)}."
            )

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        each = [weight * LOSSES[name](reduction=self.reduction)(logits, targets) for weight, name in self.terms]
        return torch.stack(each).sum()

    def __str__(self) -> str:
        return " + ".join(f"{weight:g} x {name}" for weight, name in self.terms) + f", {self.reduction} over the batch"


CROSS_ENTROPY = CrossEntropy()
LOSSES: dict[str, type[CrossEntropy] | type[BinaryCrossEntropy] | type[FocalLoss] | type[SummedLoss]] = {
    "cross-entropy": CrossEntropy,
    "binary-cross-entropy": BinaryCrossEntropy,
    "focal": FocalLoss,
    "sum": SummedLoss,
}
