"""Learning to Invert (Wu et al., UAI 2023, arXiv:2210.10880): a plain network from the flat gradient to the pictures.

Sees      Gradient (or Update) of a batch of the size that the generator was trained for; no labels, no weights
Recovers  images (batch, channel, height, width) in [0, 1], in one forward pass
Solves    min over f of E ||x - f(g(x))||^2, f a perceptron with two hidden layers of 3,000 (section 4); in a batch the
          best assignment of the pictures counts
Differs   The gradient is standardised entry by entry; the learning rate goes through one cycle, so that fewer epochs do.
          Its length is a constant (LENGTH). Gradients of more than HASHED numbers are hashed, as the paper does.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from gradleak.attacks.attack import check_sees
from gradleak.attacks.learned import generator as learned
from gradleak.attacks.learned.generator import Shards
from gradleak.attacks.reconstruction import Reconstruction
from gradleak.attacks.search.descend import OnStep
from gradleak.modalities.networks import Architecture
from gradleak.observations.model import PictureModel
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Release
from gradleak.observations.releases import Gradient, Update
from gradleak.observations.tensors import Tensors, flatten

HASHED = 2**16
LENGTH = 8  # of the input: Adam's steps grow with it


class Perceptron(nn.Module):
    """{parameter: (n, ...)} -> (n, batch, channel, height, width), through hidden layers of these widths."""

    mean: Tensor
    std: Tensor
    bucket: Tensor
    sign: Tensor

    def __init__(self, model: PictureModel, *, batch: int = 1, widths: tuple[int, ...] = (3_000, 3_000)) -> None:
        super().__init__()
        trained = {name: p for name, p in model.parameters.items() if name not in model.frozen}
        self.shape, self.total = (batch, *model.architecture.input_shape), len(flatten(trained))
        read = min(self.total, HASHED)
        if self.total > HASHED:
            draw = torch.Generator().manual_seed(0)
            self.register_buffer("bucket", torch.randint(HASHED, (self.total,), generator=draw), persistent=False)
            self.register_buffer("sign", 2.0 * torch.randint(2, (self.total,), generator=draw) - 1, persistent=False)
        self.register_buffer("mean", torch.zeros(read))
        self.register_buffer("std", torch.ones(read))
        layers: list[nn.Module] = []
        for before, after in pairwise((read, *widths)):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], math.prod(self.shape)), nn.Sigmoid())

    def raw(self, gradients: Tensors) -> Tensor:
        """(n, entries), hashed if they are many."""
        flat = torch.cat([gradients[name].flatten(1) for name in sorted(gradients)], dim=1)
        if self.total > HASHED:
            flat = flat.new_zeros(len(flat), HASHED).index_add_(1, self.bucket, flat * self.sign)
        return flat

    def forward(self, gradients: Tensors) -> Tensor:
        standard = ((self.raw(gradients) - self.mean) / self.std).clamp(-10, 10)
        found: Tensor = self.net(standard * (LENGTH / len(self.mean) ** 0.5))
        return found.view(-1, *self.shape)

    def prepare(self, shards: Shards) -> None:
        """Standardise by the first shard."""
        raw = self.raw(next(iter(shards())).gradients)
        self.mean.copy_(raw.mean(0))
        self.std.copy_(raw.std(0) + 1e-3 * raw.std() + 1e-12)

    def hold_out(self, shard: int | None) -> None:
        """Nothing is solved in closed form."""


@dataclass(frozen=True, kw_only=True)
class LTI:
    """generator: a file of `gradleak train lti`."""

    sees: ClassVar[tuple[type[Release], ...]] = (Gradient, Update)
    modality: ClassVar[str] = Architecture.modality

    generator: Path | None = None

    def trained_on(self, images: Tensor) -> int:
        """How many of these pictures the generator was trained on."""
        return learned.trained_on(self.generator, images)

    def __call__(
        self, observation: PictureObservation, *, generator: torch.Generator, on_step: OnStep | None = None
    ) -> Reconstruction:
        """Raises NotObserved without a generator, and for adapters; BadInput if it was trained for another model or batch."""
        check_sees(self, observation)
        return learned.reconstruct(self.generator, "lti", Perceptron, observation)
