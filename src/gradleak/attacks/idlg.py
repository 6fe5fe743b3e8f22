"""Improved Deep Leakage from Gradients (Zhao et al. 2020, arXiv:2001.02610).

Sees      Gradient or Update of one image, of a classifier that ends in a linear layer with bias
Recovers  the image (1, channel, height, width) in [0, 1], and its label
Solves    c with dL/db_c < 0 (only the true class has p_c - 1 there), then min over x of ||g(x, c) - g*||^2 / ||g*||^2
Differs   the sign is read off the gradient of the last bias, not of the last weights (equations 4 and 5), so that
          activations need not be positive; the search is that of dlg.py, with its differences
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch

from gradleak.attacks.dlg import DLG
from gradleak.attacks.labels import recover_labels
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.attacks.search.start import Start
from gradleak.errors import NotObserved
from gradleak.observations.observation import Gradient


@dataclass(frozen=True, kw_only=True)
class IDLG:
    """The search, as in DLG."""

    evaluations: int = DLG.evaluations
    rounds: int = DLG.rounds
    round_evaluations: int = DLG.round_evaluations
    history: int = DLG.history
    goal: float = DLG.goal
    box: float = DLG.box
    restarts: int = DLG.restarts
    start: Start | None = field(default=None, repr=False)

    def __call__(
        self, observation: Gradient, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved for more than one image without labels, and when the last layer has no bias."""
        return self.many([observation], generator=generator, on_step=on_step)[0]

    def many(
        self, observations: Sequence[Gradient], *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> list[Reconstruction]:
        """The same for several observations of one model state; their plain phases run side by side."""
        same = {part.name: getattr(self, part.name) for part in fields(self)}
        return DLG(**same).many([labelled(o) for o in observations], generator=generator, on_step=on_step)


def labelled(observation: Gradient) -> Gradient:
    """The observation with the label that the sign rule gives, if it came without labels."""
    if observation.labels is not None:
        return observation
    if observation.batch_size != 1:
        size = observation.batch_size or "an unknown number of"
        raise NotObserved(
            f"The batch has {size} images: iDLG reads the label off the sign of the last layer's gradient, which tells "
            "the true class for one image only. Use dlg or inverting-gradients."
        )
    return replace(observation, labels=recover_labels(observation))
