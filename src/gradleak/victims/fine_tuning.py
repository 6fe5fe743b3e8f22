"""What a fine-tuning of a fully connected network releases: the change of all weights, or one of low rank."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradleak.modalities.pictures import Pictures
from gradleak.observations.adapter import Adapter
from gradleak.observations.model import PictureModel
from gradleak.observations.observation import Observation, PictureObservation
from gradleak.observations.releases import Update
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import Objective, Recipe, train
from gradleak.victims.adapter import check_converged, lora_start


@dataclass(frozen=True)
class All:
    """Everything."""

    def __str__(self) -> str:
        return "all weights"


@dataclass(frozen=True)
class Truncated:
    """Every layer's change cut off after its largest singular values: the adapter that is extracted from a full fine-tuning."""

    rank: int

    def __str__(self) -> str:
        return f"all weights, cut to rank {self.rank}"


@dataclass(frozen=True)
class LowRank:
    """The change B A that LoRA makes, both factors trained from PEFT's start (B = 0, A uniform); biases rest."""

    rank: int

    def __str__(self) -> str:
        return f"LoRA of rank {self.rank}"


Released = All | Truncated | LowRank
ALL = All()


def fine_tuned(
    model: PictureModel, batch: Pictures, released: Released, rate: float, steps: int, seed: int
) -> tuple[PictureObservation, Tensor]:
    """The change of weights in so many full-batch steps of gradient descent, labels known; and lambda (n, classes).

    lambda_ic is the learning rate over n times the softmax's probability of class c for picture i, summed along the path.
    Raises BadInput when the training diverges.
    """
    before, recipe = model.parameters, Recipe(learning_rate=rate, steps=steps, batch_size=len(batch.labels))
    if isinstance(released, LowRank):
        modules = [name.removesuffix(".weight") for name, tensor in model.parameters.items() if tensor.dim() == 2]
        start = lora_start(model, modules, released.rank, torch.Generator().manual_seed(seed))
        adapter = Adapter(start=start, scaling=dict.fromkeys(modules, 1.0))

        def loss(factors: Tensors, images: Tensor, labels: Tensor) -> Tensor:
            return adapter.loss(model, factors, images, labels)

        factors, share = path(loss, start, lambda own: adapter.merged(model, own), model, batch, rate, steps)
        after = adapter.merged(model, factors)
    else:
        after, share = path(model.loss, before, lambda own: own, model, batch, rate, steps)
    change = {name: (tensor - before[name]).detach() for name, tensor in after.items()}
    check_converged(change.values(), recipe)
    if isinstance(released, Truncated):
        change = {name: truncated(tensor, released.rank) for name, tensor in change.items()}
    update = Observation(
        model=replace(model, frozen=tuple(name for name in model.parameters if name not in change)),
        release=Update(recipe=recipe),
        released=change,
        batch_size=len(batch.labels),
        labels=batch.labels,
    )
    return update, share


def path(
    loss: Objective,
    own: Tensors,
    weights: Callable[[Tensors], Tensors],
    model: PictureModel,
    batch: Pictures,
    rate: float,
    steps: int,
) -> tuple[Tensors, Tensor]:
    """Where gradient descent on `own` ends, and lambda; `weights` makes parameters of the model of them."""
    share, one = torch.zeros(len(batch.labels), model.architecture.classes), Recipe(learning_rate=rate, steps=1)
    for _ in range(steps):
        share += rate / len(batch.labels) * model.logits(weights(own), batch.images).softmax(1).detach()
        own = train(loss, own, batch.images, batch.labels, one)
    return own, share


def truncated(weight: Tensor, rank: int) -> Tensor:
    """The nearest matrix of that rank; biases (out,) stay."""
    if weight.dim() < 2:
        return weight
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    kept: Tensor = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return kept
