"""Which of some candidate samples a model was trained on: one score a file, higher for those that were."""

from collections.abc import Callable

from torch import Tensor

from gradleak.attacks.membership.alignment import alignment
from gradleak.attacks.membership.attribution import attribution
from gradleak.attacks.membership.base_ratio import base_ratio
from gradleak.attacks.membership.evidence import Evidence
from gradleak.attacks.membership.low_loss import low_loss
from gradleak.attacks.membership.rmia import rmia
from gradleak.attacks.membership.span_residual import span_residual

Score = Callable[[Evidence], Tensor]  # (n,), one number per candidate; NotObserved where the release does not tell it

SCORES: dict[str, Score] = {
    "low-loss": low_loss,
    "base-ratio": base_ratio,
    "rmia": rmia,
    "alignment": alignment,
    "attribution": attribution,
    "span-residual": span_residual,
}
