"""Training whose every gradient goes through defenses: what they cost."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.func import functional_call

from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures
from gradleak.observations.defenses import Defense, defended
from gradleak.observations.model import Model
from gradleak.observations.releases import Gradient
from gradleak.victims.gradient import trained_with

BATCH, RATE = 50, 3e-3  # of Adam, which does not mind the scale of what a defense leaves


def train_behind(
    model: Model[Architecture], pictures: Pictures, defenses: Sequence[Defense], *, epochs: int, seed: int
) -> Model[Architecture]:
    """The model after so many epochs of Adam over disjoint batches, the same in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.parameters.items()}
    optimiser = torch.optim.Adam(list(leaves.values()), lr=RATE)
    for _ in range(epochs):
        for first in range(0, len(pictures.labels), BATCH):
            x, y = pictures.images[first : first + BATCH], pictures.labels[first : first + BATCH]
            now = replace(model, parameters={name: p.detach() for name, p in leaves.items()})
            release, left = trained_with(Gradient(), defenses, len(x))
            gradient = release.simulate(now, now.parameters, x, y)
            for name, g in defended(gradient, [defense.bound(now, x) for defense in left], generator).items():
                leaves[name].grad = g.detach()
            optimiser.step()
    return replace(model, parameters={name: p.detach() for name, p in leaves.items()})


def accuracy(model: Model[Architecture], pictures: Pictures) -> float:
    """The share of pictures whose label the model tells."""
    outputs = functional_call(model.module, model.parameters | (model.buffers or {}), (pictures.images,))
    return float((outputs.argmax(1) == pictures.labels).float().mean())
