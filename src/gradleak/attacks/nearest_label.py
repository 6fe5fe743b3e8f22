"""The label of a text that nobody knows: the one under which the text explains most of what was released."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gradleak.observations.observation import TextObservation


def nearest_label(observation: TextObservation, text: Iterable[int] | Tensor) -> tuple[float, Tensor | None]:
    """The residual of the text with the label that explains most, and that label; of a language model without one."""
    tokens: Any = [tuple(map(int, text))]
    if observation.model.architecture.task != "classification":
        return observation.residual(tokens, None), None
    classes = observation.model.architecture.config.num_labels
    tried = [torch.tensor([label]) for label in range(classes)] if observation.labels is None else [observation.labels]
    return min(((observation.residual(tokens, label), label) for label in tried), key=lambda pair: pair[0])
