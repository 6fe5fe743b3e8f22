"""Training whose every gradient goes through defenses: what they cost."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from gradleak.modalities.modality import Blueprint
from gradleak.modalities.texts import Texts
from gradleak.observations.defenses import Defense, defended
from gradleak.observations.model import LanguageModel, Model
from gradleak.observations.releases import Gradient
from gradleak.victims.gradient import trained_with

A = TypeVar("A", bound=Blueprint)
BATCH, RATE = 50, 3e-3  # of Adam, which does not mind the scale of what a defense leaves


def train_behind(
    model: Model[A],
    private: Any,
    defenses: Sequence[Defense],
    *,
    epochs: int,
    seed: int,
    batch: int = BATCH,
    rate: float = RATE,
) -> Model[A]:
    """The model after so many epochs of Adam on `private` (Pictures or Texts) in disjoint batches, the same in each epoch."""
    inputs, labels = model.architecture.feed(private, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.parameters.items()}
    optimiser = torch.optim.Adam(list(leaves.values()), lr=rate)
    for _ in range(epochs):
        for first in range(0, len(inputs), batch):
            x, y = inputs[first : first + batch], None if labels is None else labels[first : first + batch]
            now = replace(model, parameters={name: p.detach() for name, p in leaves.items()})
            release, left = trained_with(Gradient(), defenses, len(x))
            gradient = release.simulate(now, now.parameters, x, y)
            for name, g in defended(gradient, [defense.bound(now, x) for defense in left], generator).items():
                leaves[name].grad = g.detach()
            optimiser.step()
    return replace(model, parameters={name: p.detach() for name, p in leaves.items()})


@torch.no_grad()
def accuracy(model: Model[Any], unseen: Any) -> float:
    """The share of pictures or texts whose label the model tells."""
    inputs, labels = model.architecture.feed(unseen)
    chunks = (inputs[first : first + BATCH] for first in range(0, len(inputs), BATCH))
    told = torch.cat([model.logits({}, chunk).argmax(1) for chunk in chunks])
    return float((told == labels).float().mean())


@torch.no_grad()
def perplexity(model: LanguageModel, unseen: Texts) -> float:
    """exp of the mean loss of a next token, over all tokens of these texts: 1 for a model that knows them, as many as there are tokens for one
    that knows nothing."""
    sentences, _ = model.architecture.feed(unseen)
    losses = [float(model.loss({}, (sentence,), None)) for sentence in sentences]
    return math.exp(
        sum(loss * (len(s) - 1) for loss, s in zip(losses, sentences, strict=True)) / sum(len(s) - 1 for s in sentences)
    )
