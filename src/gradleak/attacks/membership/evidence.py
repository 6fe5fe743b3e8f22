"""What scores of membership are made of: each candidate's loss before and after training, and its gradient between."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

from gradleak.attacks.membership.one_by_one import MOST_AT_ONCE, Function, one_by_one
from gradleak.attacks.search.descend import OnStep
from gradleak.errors import NotObserved
from gradleak.modalities.language_models import NO_TARGET
from gradleak.observations.model import Model
from gradleak.observations.observation import Observation
from gradleak.observations.tensors import Tensors

MOST_NUMBERS = 2**27  # of all gradients together: 512 MB
MOST_AT_A_TIME = 2**29  # of gradients of one weight: 2 GB
MOST_OF_EACH = 2**17  # of one gradient: drawn at random they are more than enough to tell thousands of samples apart


@dataclass(frozen=True)
class Evidence:
    """Candidates, and what was observed of a training that some of them took part in.

    inputs      n candidates, as the model takes them
    labels      (n,) or None
    reference   (k,) rows of candidates that took no part, and that nobody is scored by: scores are calibrated on them
    """

    observation: Observation[Any]
    inputs: Any
    labels: Tensor | None
    reference: Tensor
    on_step: OnStep | None = None

    @cached_property
    def model(self) -> Model[Any]:
        """The model as it is used: batches of one have no statistics."""
        model = self.observation.model
        return model if model.mode == "eval" else model.assume(mode="eval")

    def losses(self, tensors: Tensors) -> Tensor:
        """(n,) loss of each candidate with these tensors in place of what was trained."""
        model, merged = self.model, self.observation.release.merged(self.observation.model, tensors)
        with torch.no_grad():
            return self.of_each(lambda x, y: model.loss(merged, x, y)).double()

    def of_each(self, function: Function) -> Tensor:
        """What it says of each candidate, of so many at once as memory allows: each has a gradient of every weight."""
        largest = max(tensor.numel() for tensor in self.model.parameters.values())
        most = max(1, min(MOST_AT_ONCE, MOST_AT_A_TIME // largest))
        return one_by_one(function, self.inputs, self.labels, self.on_step, most)

    @cached_property
    def before(self) -> Tensor:
        """(n,) loss before training; NotObserved where nobody knows where it started."""
        if (start := self.observation.ends()[0]) is None:
            raise NotObserved("The model before training is not known, and this compares with it.")
        return self.losses(start)

    @cached_property
    def after(self) -> Tensor:
        """(n,) loss after training; NotObserved where nobody trained to an end."""
        if (end := self.observation.ends()[1]) is None:
            raise NotObserved("A gradient was released, and this needs the model that training left.")
        return self.losses(end)

    @cached_property
    def targets(self) -> Tensor:
        """(n,) of how many targets each candidate's loss is the mean: tokens, or one class; 1 where it is their sum."""
        model = self.model
        if model.criterion.reduction == "sum":
            return torch.ones(len(self.inputs), dtype=torch.int64)

        def count(x: Any, y: Tensor | None) -> Tensor:
            wanted = model.architecture.compared(model.logits({}, x), x, y)[1]
            return (wanted != NO_TARGET).sum() if wanted.ndim == 1 else torch.tensor(len(wanted))

        with torch.no_grad():
            return self.of_each(count)

    @cached_property
    def drawn(self) -> dict[str, Tensor]:
        """{name: which numbers of the tensor are looked at}: of large models some at random, the same of every candidate."""
        descended = self.observation.descended()
        total = sum(tensor.numel() for tensor in descended.values())
        share = min(1.0, MOST_OF_EACH / total, MOST_NUMBERS / total / len(self.inputs))
        generator = torch.Generator().manual_seed(0)
        return {
            name: torch.randperm(tensor.numel(), generator=generator)[: max(1, int(share * tensor.numel()))]
            for name, tensor in descended.items()
        }

    @cached_property
    def descent(self) -> Tensor:
        """(d,) theta_0 - theta_T, the numbers that were drawn."""
        return self.of_drawn(self.observation.descended())

    @cached_property
    def gradients(self) -> Tensor:
        """(n, d) gradients of each candidate's loss, the same numbers: half way between theta_0 and theta_T, which is where a training
        was on average; at theta_0 where the end is not known."""
        start, end = self.observation.ends()
        if start is None:
            raise NotObserved("The model before training is not known, and this compares with it.")
        model, release = self.model, self.observation.release
        half = start if end is None else {name: (tensor + end[name]) / 2 for name, tensor in start.items()}
        moved = {name: half[name] for name in self.drawn}
        rest = {name: tensor for name, tensor in half.items() if name not in moved}

        def own(x: Any, y: Tensor | None) -> Tensor:
            return self.of_drawn(grad(lambda moved: release.loss(model, {**rest, **moved}, x, y))(moved))

        return self.of_each(own)

    @property
    def layers(self) -> list[int]:
        """How many numbers were drawn of each tensor: of rows of `gradients`, in order."""
        return [len(rows) for rows in self.drawn.values()]

    def of_drawn(self, tensors: Tensors) -> Tensor:
        """(d,) the numbers that were drawn, tensor after tensor."""
        return torch.cat([tensors[name].flatten()[rows] for name, rows in self.drawn.items()])
