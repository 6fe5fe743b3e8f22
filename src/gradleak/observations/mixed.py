"""Samples that stand together in what is shared: a mean over clients, and mix-up. Both are parts of the training, so they are simulated."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradleak.errors import BadInput
from gradleak.modalities.modality import Fact, fact
from gradleak.observations.orders import taken
from gradleak.observations.release import Release, Reservation
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import MOST, Objective


@dataclass(frozen=True, kw_only=True)
class Mixed(Release):
    """What is public of it.

    clients  what is released is the mean over so many clients, each with as many of the private inputs: the first ones those of the
             first client (secure aggregation shows no more; Bonawitz et al., CCS 2017)
    mixup    lambda of mix-up (see `mixed_loss`); 1: none
    """

    clients: int = 1
    mixup: float = 1.0

    def check_mixed(self) -> None:
        """BadInput for no client, and for what is no share of a sample."""
        if not 1 <= self.clients <= MOST:
            raise BadInput(f"What is released is the mean over 1 to {MOST:,} clients, not over {self.clients}.")
        if not 0 < self.mixup <= 1:
            raise BadInput(f"Mix-up keeps a share in (0, 1] of each sample, not {self.mixup:g}.")

    def objective(self, loss: Objective) -> Objective:
        """The loss of a batch, after mix-up."""
        return lambda parameters, x, y: mixed_loss(self.mixup, partial(loss, parameters), x, y)

    def over_clients(self, one: Callable[[Any, Tensor | None], Tensors], inputs: Any, labels: Tensor | None) -> Tensors:
        """The mean over the clients of what `one` of them shares of its samples; BadInput where these are not as many each."""
        if self.clients == 1:
            return one(inputs, labels)
        each = [
            one(taken(inputs, rows), None if labels is None else taken(labels, rows))
            for rows in parts(len(inputs), self.clients)
        ]
        return {name: torch.stack([shared[name] for shared in each]).mean(0) for name in each[0]}

    def alike(self, steps: int, linear: bool) -> list[Reservation]:
        """That clients of a mean are taken to be alike. linear: whether the mean of their steps is a step on all samples."""
        if self.clients == 1:
            return []
        meant = (
            "so it is the gradient of all their samples together"
            if steps == 1 and linear
            else "each of which trained on its own part of the samples"
        )
        sentence = f"This is the mean over {self.clients} clients, {meant}; as many samples of each are assumed."
        return [("clients", "warning", sentence)]

    def mixed_facts(self) -> list[Fact]:
        """Rows of the threat model."""
        clients = [fact("clients", True, f"the mean of {self.clients}")] if self.clients > 1 else []
        kept = f"{self.mixup:g} of each sample, and {1 - self.mixup:g} of the one before it in its batch"
        return [*clients, *([fact("mix-up", True, kept)] if self.mixup < 1 else [])]


def parts(count: int, clients: int) -> list[range]:
    """The rows of each client; BadInput where they are not as many each."""
    each, left = divmod(count, clients)
    if left or not each:
        raise BadInput(f"{count} samples are not as many for each of {clients} clients.")
    return [range(first, first + each) for first in range(0, count, each)]


def mixed_loss(
    share: float, loss: Callable[[Any, Tensor | None], Tensor], inputs: Any, labels: Tensor | None
) -> Tensor:
    """Mix-up (Zhang et al., ICLR 2018, arXiv:1710.09412): x' = lambda x_i + (1 - lambda) x_(i - 1), and the loss at x' is that of both labels
    in these shares. The first sample is mixed with the last: a batch of one is not mixed. BadInput for texts.

    The paper draws the order of each batch, which for an attacker is a numbering of its samples, and lambda.
    """
    if share == 1:
        return loss(inputs, labels)
    if not isinstance(inputs, Tensor) or labels is None:
        raise BadInput("Mix-up is for pictures with labels: texts have no means.")
    x = share * inputs + (1 - share) * inputs.roll(1, 0)
    return share * loss(x, labels) + (1 - share) * loss(x, labels.roll(1, 0))
