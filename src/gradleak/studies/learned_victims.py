"""What the recipes about learned inversion share: the victim, its pairs, training with CPU seconds, one row of scores."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gradleak.attacks.learned import generator as learned
from gradleak.attacks.learned.generator import Generator
from gradleak.attacks.learned.git import Transcript
from gradleak.attacks.learned.lti import Perceptron
from gradleak.attacks.learned.pairs import Pairs, stream
from gradleak.attacks.search.descend import OnStep
from gradleak.audit import metrics
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import Pictures, public_pool
from gradleak.observations.defenses import Defense
from gradleak.observations.model import Model, PictureModel
from gradleak.observations.tensors import Tensors
from gradleak.studies.data_sets import blueprint, shrunk
from gradleak.studies.findings import Row, Size, shortage

GIT: dict[Size, dict[str, Any]] = {
    "smoke": {"hidden": 8},
    "small": {"hidden": 64},
    "paper": {"hidden": 64},
}  # its options
BUILD: dict[str, Callable[..., nn.Module]] = {"git": Transcript, "lti": Perceptron}


@dataclass(frozen=True)
class Field:
    """An untrained victim, public pictures for pairs, and unseen private ones."""

    model: PictureModel
    public: Pictures
    private: Pictures

    def notes(self, size: Size, pairs: int, private: int) -> tuple[str, ...]:
        """On small pictures, and on what there is less of than asked for: a picture then serves in several pairs."""
        return (
            shrunk(self.model.architecture.input_shape, size),
            shortage("public pictures", pairs, len(self.public.images)),
            shortage("unseen pictures", private, len(self.private.images)),
        )


def prepare(name: str, data: str, size: Size, seed: int, pairs: int, private: int) -> Field:
    """The model initialised from `seed`; the pool has up to `pairs` pictures, the private ones are a random sample of test rows."""
    shape, classes = blueprint(data, size)
    architecture = Architecture(name, shape, classes)
    public = public_pool(data, "train", shape=shape, limit=pairs)
    held = public_pool(data, "test", shape=shape, limit=private, seed=1)
    model = Model.of(architecture.build(seed).eval(), architecture)
    return Field(model, public, held)


def fit(
    field: Field,
    kind: str,
    options: dict[str, Any],
    *,
    pairs: int,
    epochs: int,
    seed: int,
    on_step: OnStep | None = None,
    defense: Defense | None = None,
    learning_rate: float = 2e-3,
) -> tuple[Generator, float]:
    """A generator trained on pairs of the public pictures, and its CPU seconds, pairs included."""

    def shards() -> Iterator[Pairs]:
        shard = min(1_000, -(-pairs // 5))
        return stream(field.model, field.public, count=pairs, shard=shard, defense=defense, seed=seed)

    began = time.process_time()
    generator = torch.Generator().manual_seed(seed)
    made = learned.train(
        kind,
        BUILD[kind],
        options,
        field.model,
        shards,
        epochs=epochs,
        learning_rate=learning_rate,
        generator=generator,
        on_step=on_step,
    )
    return made, time.process_time() - began


def equal_size(field: Field, transcript: nn.Module) -> tuple[int]:
    """The width of a perceptron with one hidden layer and as many numbers as a fitted Transcript uses."""
    slopes = transcript.get_buffer("slopes")
    used = sum(p.numel() for p in transcript.parameters()) + slopes[0].numel()
    released = sum(p.numel() for p in field.model.parameters.values())
    return (max(round(used / (released + field.private.images[0].numel())), 1),)


def found_for(
    generator: Callable[[Tensors], Tensor], field: Field, pictures: Pictures, defense: Defense | None = None
) -> Tensor:
    """What the generator makes of the gradients of these pictures, one at a time: (n, channel, height, width)."""
    shards = stream(
        field.model,
        replace(pictures, labels=pictures.labels % field.model.architecture.classes),
        count=len(pictures.images),
        shard=200,
        defense=defense,
        seed=7,
    )
    parts = [(generator(pairs.gradients)[:, 0], pairs.images[:, 0]) for pairs in shards]
    order = torch.cat([true for _, true in parts]).flatten(1)
    # The stream shuffles: put what was found back in the order of the pictures.
    where = torch.cdist(pictures.images.flatten(1), order).argmin(1)
    return torch.cat([images for images, _ in parts])[where]


def scores(images: Tensor, true: Tensor) -> Row:
    """Means over the pictures; of the mean squared error also half the 95 % interval of the mean."""
    error = (images - true).square().flatten(1).mean(1)
    return {
        "images": len(true),
        "mse": round(float(error.mean()), 5),
        "mse_interval": round(1.96 * float(error.std()) / len(error) ** 0.5, 5) if len(error) > 1 else None,
        "psnr_db": round(float(metrics.psnr_db(images, true).mean()), 2),
        "ssim": round(float(metrics.ssim(images, true).mean()), 3),
    }
