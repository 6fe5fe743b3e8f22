"""A multi-layer perceptron as decoder: the trained alternative that ridge regression is compared with.

One network for each layer maps a row of its sketch S, together with the Gram matrix S^T S of all its rows (which tells
pictures apart), to what the pseudo-inverse lacks of the same row of the gradient. R2F (arXiv:2512.07374) trains such a
decoder on LoRA gradients and does not state its architecture: this one is ours.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from gradleak.attacks.decoders import storage, training
from gradleak.attacks.decoders.pairs import as_observation, check_identity, identity, key
from gradleak.attacks.search.descend import OnStep
from gradleak.observations.observation import PictureObservation
from gradleak.observations.release import Sketch
from gradleak.observations.tensors import Tensors


@dataclass(frozen=True)
class MLP:
    """A fitted decoder: identity of base model and adapter start, and {sketch/layer: weights}."""

    fitted: str
    weights: Tensors = field(repr=False)

    @classmethod
    def fit(
        cls,
        adapter: PictureObservation,
        images: Tensor,
        labels: Tensor,
        *,
        generator: torch.Generator,
        on_step: OnStep | None = None,
        steps: int = 300,
        width: int = 128,
        batch: int = 16,
        learning_rate: float = 2e-3,
    ) -> Self:
        """Train on public pictures (n, channel, height, width) in [0, 1] with labels (n,): two hidden layers of `width`.

        Raises BadInput for pictures that do not fit the model and for layers that cannot be decoded.
        """
        start: Tensors = {}
        for sketch in adapter.sketches():
            rank, columns = sketch.through.shape
            start[f"{key(sketch)}/1"] = training.normal(generator, width, rank + rank**2)
            start[f"{key(sketch)}/2"] = training.normal(generator, width, width)
            start[f"{key(sketch)}/3"] = torch.zeros(columns, width)  # starts as the pseudo-inverse
            start[f"{key(sketch)}/linear"] = torch.zeros(columns, rank)
        weights = training.fit(
            _network,
            {name: w.to(images) for name, w in start.items()},
            adapter,
            images,
            labels,
            steps=steps,
            batch=batch,
            learning_rate=learning_rate,
            generator=generator,
            on_step=on_step,
        )
        return cls(identity(adapter), weights)

    def __call__(self, adapter: PictureObservation) -> PictureObservation:
        """The adapter's gradient, over the adapted weights; BadInput if the decoder was fitted to another adapter."""
        check_identity(self.fitted, adapter)
        return as_observation(adapter, training.decode(_network, self.weights, adapter))

    def save(self, path: Path) -> None:
        """Write the decoder as safetensors."""
        storage.write(path, "mlp", self.fitted, self.weights)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a decoder back; BadInput if the file is something else."""
        return cls(*storage.read(path, "mlp"))


def _network(weights: Tensors, sketch: Sketch, S: Tensor, inverse: Tensor) -> Tensor:
    w = storage.group(weights, key(sketch))
    gram = (
        (S.mT @ S / S.shape[1]).flatten(1)[:, None].expand(-1, S.shape[1], -1)
    )  # (n, rows, rank^2), the same in a picture
    size = S.square().mean(2, keepdim=True).sqrt().clamp_min(1e-6)  # of each row: rows are scaled, as the whole is
    hidden = F.gelu(torch.cat([S / size, gram], 2) @ w["1"].T)
    hidden = F.gelu(hidden @ w["2"].T)
    return inverse + S @ w["linear"].T + size * (hidden @ w["3"].T)
