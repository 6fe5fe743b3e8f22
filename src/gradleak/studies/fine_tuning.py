"""What a fine-tuning of a fully connected network releases: the change of all weights, or one of low rank."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# TODO Loss
from gradleak.modalities.pictures import Pictures
from gradleak.observations.model import PictureModel
from gradleak.observations.releases import Adapter, Release, Update
from gradleak.observations.tensors import Tensors
from gradleak.observations.training import Recipe, train


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


Release = All | Truncated | LowRank
ALL = All()


def fine_tuned(
    model: PictureModel, batch: Pictures, release: Release, rate: float, steps: int, seed: int
) -> tuple[Update, Tensor]:
    """The change of weights in so many full-batch steps of gradient descent, labels known; and lambda (n, classes).

    lambda_ic is the learning rate over n times the softmax's probability of class c for picture i, summed along the path.
    """
    if isinstance(release, LowRank):
        adapter = blank(model, release.rank, seed)
        after, share = path(
            adapter.loss,
            adapter.start,
            lambda own: {**model.parameters, **adapter.merged(own)},
            model,
            batch,
            rate,
            steps,
        )
        before = {name: model.parameters[name] for name in adapter.merged(after)}
        after = adapter.merged(after)
    else:
        before = model.parameters
        after, share = path(model.loss, before, lambda own: own, model, batch, rate, steps)
    change = {name: (tensor - before[name]).detach() for name, tensor in after.items()}
    if isinstance(release, Truncated):
        change = {name: truncated(tensor, release.rank) for name, tensor in change.items()}
    update = Update(
        model=replace(model, frozen=tuple(name for name in model.parameters if name not in change)),
        released=change,
        batch_size=len(batch.labels),
        labels=batch.labels,
        learning_rate=rate,
        local_steps=steps,
        local_batch_size=len(batch.labels),
    )
    return update, share


def path(
    loss: Loss,
    own: Tensors,
    weights: Callable[[Tensors], Tensors],
    model: PictureModel,
    batch: Pictures,
    rate: float,
    steps: int,
) -> tuple[Tensors, Tensor]:
    """Where gradient descent on `own` ends, and lambda; `weights` makes the model's parameters of them."""
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


def blank(model: PictureModel, rank: int, seed: int) -> Adapter:
    """An adapter before its training: on every linear layer, scaling 1."""
    generator = torch.Generator().manual_seed(seed)
    modules = [name.removesuffix(".weight") for name, tensor in model.parameters.items() if tensor.dim() == 2]
    start = dict[str, Tensor]()
    for module in modules:
        out, into = model.parameters[f"{module}.weight"].shape
        start[f"{module}.lora_A"] = (2 * torch.rand(rank, into, generator=generator) - 1) / into**0.5
        start[f"{module}.lora_B"] = torch.zeros(out, rank)
    released = {name: tensor for name, tensor in start.items() if name.endswith("lora_B")}
    return Adapter(model=model, released=released, start=start, scaling=dict.fromkeys(modules, 1.0))
