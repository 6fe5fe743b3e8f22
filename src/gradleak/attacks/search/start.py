"""Any reconstruction can be the start of any optimisation attack: those have a field `start`, which is another attack.

InvertingGradients(start=Given(reconstruction))     InvertingGradients(start=Git(generator=path))
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gradleak.attacks.reconstruction import Reconstruction
from gradleak.errors import BadInput
from gradleak.observations.observation import PictureObservation


class Start(Protocol):
    """What every attack is, as far as another one needs it."""

    def __call__(self, observation: PictureObservation, *, generator: torch.Generator) -> Reconstruction: ...


@dataclass(frozen=True)
class Given:
    """A reconstruction that is there already, whatever is observed."""

    reconstruction: Reconstruction

    def __call__(self, observation: PictureObservation, *, generator: torch.Generator) -> Reconstruction:
        """The reconstruction."""
        return self.reconstruction


def begin(
    start: Start,
    observations: Sequence[PictureObservation],
    labels: Sequence[Tensor] | None,
    generator: torch.Generator,
) -> Tensor:
    """What `start` finds for each observation: (observations, batch, channel, height, width) in [0, 1].

    labels: (batch,) each, the order in which the search has them; images are put in it when theirs are the same ones.
    Raises BadInput when the images found do not fit the model, or are of another number than the labels.
    """
    rows = []
    for i, observation in enumerate(observations):
        guess, shape = start(observation, generator=generator), observation.model.architecture.input_shape
        batch = observation.batch_size if labels is None else len(labels[i])
        if (
            guess.labels is None
            or tuple(guess.value.shape[1:]) != tuple(shape)
            or batch not in (None, len(guess.value))
        ):
            raise BadInput(
                f"The search is for {batch} pictures of {tuple(shape)} and cannot start from {len(guess.value)} of "
                f"{tuple(guess.value.shape[1:])}: start from a reconstruction of this observation."
            )
        images = guess.value
        if labels is not None and torch.equal(guess.labels.cpu().sort().values, labels[i].cpu().sort().values):
            theirs, ours = guess.labels.cpu().argsort(stable=True), labels[i].cpu().argsort(stable=True)
            images = images[theirs[ours.argsort()]]
        rows.append(images)
    return torch.stack(rows)
