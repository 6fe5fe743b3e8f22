"""A U-Net as decoder (Ronneberger et al. 2015), shared by all layers: the gradient matrix is treated as a picture.

As in compressed imaging, a learned linear map for each layer first lifts the sketch to the size of the gradient (it starts
as the pseudo-inverse); the U-Net adds what that lacks. A learned embedding of each row and column tells it where in which
layer it is. The architecture is ours: the literature names it and gives no sizes.
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

EMBEDDED = 2  # numbers for each row, and for each column


@dataclass(frozen=True)
class UNet:
    """A fitted decoder: identity of base model and adapter start, the kernels, and {sketch/lift, /rows, /columns}."""

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
        steps: int = 100,
        width: int = 8,
        batch: int = 2,
        learning_rate: float = 3e-3,
    ) -> Self:
        """Train on public pictures (n, channel, height, width) in [0, 1] with labels (n,); `width` channels at full size.

        Raises BadInput for pictures that do not fit the model and for layers that cannot be decoded.
        """
        kernels = {
            "in": (width, 1 + 2 * EMBEDDED, 3, 3),
            "down": (2 * width, width, 3, 3),
            "low": (2 * width, 2 * width, 3, 3),
            "up": (width, 3 * width, 3, 3),
        }
        start = {name: training.normal(generator, *shape) for name, shape in kernels.items()}
        start["out"] = torch.zeros(1, width, 1, 1)  # starts as the lift alone
        for sketch in adapter.sketches():
            start[f"{key(sketch)}/rows"] = torch.randn(EMBEDDED, sketch.measured.shape[0], generator=generator)
            start[f"{key(sketch)}/lift"] = torch.zeros(sketch.through.T.shape)
            start[f"{key(sketch)}/columns"] = torch.randn(EMBEDDED, sketch.through.shape[1], generator=generator)
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
        storage.write(path, "unet", self.fitted, self.weights)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a decoder back; BadInput if the file is something else."""
        return cls(*storage.read(path, "unet"))


def _network(weights: Tensors, sketch: Sketch, S: Tensor, inverse: Tensor) -> Tensor:
    n, rows, columns = inverse.shape
    lifted = inverse + S @ weights[f"{key(sketch)}/lift"].T
    where_row = weights[f"{key(sketch)}/rows"][None, :, :, None].expand(n, -1, -1, columns)
    where_column = weights[f"{key(sketch)}/columns"][None, :, None, :].expand(n, -1, rows, -1)
    picture = torch.cat([lifted[:, None], where_row, where_column], 1)  # (n, 1 + 2 EMBEDDED, rows, columns)
    full = F.gelu(F.conv2d(picture, weights["in"], padding=1))
    half = F.gelu(F.conv2d(full, weights["down"], stride=2, padding=1))
    half = F.gelu(F.conv2d(half, weights["low"], padding=1))
    wide = F.interpolate(half, (rows, columns), mode="nearest")
    joined = F.gelu(F.conv2d(torch.cat([full, wide], 1), weights["up"], padding=1))
    return lifted + F.conv2d(joined, weights["out"])[:, 0]
