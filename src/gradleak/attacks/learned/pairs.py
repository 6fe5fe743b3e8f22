"""Pairs (pictures, the gradient they would release) from public data: what learned attacks are trained on.

Made many at once (`vmap` of `grad`), in shards that depend on the seed and their number only: straight into training, so
that memory does not grow with their number, or to disk, where an interrupted run is resumed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from gradleak.attacks.search.descend import OnStep
from gradleak.errors import BadInput
from gradleak.modalities.pictures import Pictures
from gradleak.observations import tensor_file
from gradleak.observations.defenses import Defense
from gradleak.observations.model import PictureModel
from gradleak.observations.tensors import Tensors

SCHEMA = "gradleak/pairs/1"
AT_ONCE = 2**26  # numbers in the gradients that are computed side by side
MOST_AT_ONCE = 200  # pairs; more make it no faster


@dataclass(frozen=True)
class Pairs:
    """images (n, batch, channel, height, width) in [0, 1], labels (n, batch), gradients {parameter: (n, ...)}."""

    images: Tensor
    labels: Tensor
    gradients: Tensors


def stream(
    model: PictureModel,
    pictures: Pictures,
    *,
    count: int,
    batch: int = 1,
    defense: Defense | None = None,
    seed: int = 0,
    shard: int = 1_000,
    first: int = 0,
    on_step: OnStep | None = None,
) -> Iterator[Pairs]:
    """`count` pairs in shards of `shard`, beginning with shard number `first`.

    Each picture is used once before any is used again. Raises BadInput for pictures that do not fit the model, and for
    BatchNorm in train mode with a batch of one, which has no gradient worth the name.
    """
    images, labels = pictures.images, pictures.labels
    if tuple(images.shape[1:]) != tuple(model.architecture.input_shape) or len(images) < batch:
        raise BadInput(
            f"Pairs for this model need at least {batch} pictures of {tuple(model.architecture.input_shape)}, "
            f"not {len(images)} of {tuple(images.shape[1:])}."
        )
    if int(labels.max()) >= model.architecture.classes:
        raise BadInput(
            f"There are labels up to {int(labels.max())}, the model has {model.architecture.classes} classes."
        )
    if (
        batch == 1
        and model.mode == "train"
        and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.module.modules())
    ):
        raise BadInput("BatchNorm in train mode has no statistics of one picture: take eval mode, or larger batches.")
    rows = chosen(len(images), count, batch, seed)  # (count, batch)
    trained = {name: p for name, p in model.parameters.items() if name not in model.frozen}
    released = vmap(grad(model.loss), in_dims=(None, 0, 0), randomness="different")
    size = max(min(AT_ONCE // sum(p.numel() for p in trained.values()), MOST_AT_ONCE), 1)
    for number in range(first, -(-count // shard)):
        own = rows[number * shard : (number + 1) * shard]
        parts = []
        for part in own.split(size):  # type: ignore[no-untyped-call]
            found = released(trained, images[part], labels[part])
            parts.append({name: tensor.detach() for name, tensor in found.items()})
        gradients = {name: torch.cat([part[name] for part in parts]) for name in trained}
        if defense is not None:
            gradients = defense.apply(gradients, torch.Generator().manual_seed((seed << 20) + number))
        pairs = Pairs(images[own], labels[own], gradients)
        check(pairs, f"shard {number}")
        if on_step is not None:
            on_step(min((number + 1) * shard, count), count, float(number))
        yield pairs


def chosen(available: int, count: int, batch: int, seed: int) -> Tensor:
    """Rows of the pictures for each pair: (count, batch); every picture once, in random order, then all over again."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-count * batch // available)
    rows = torch.cat([torch.randperm(available, generator=generator) for _ in range(rounds)])
    return rows[: count * batch].view(count, batch)


def write(
    folder: Path,
    model: PictureModel,
    pictures: Pictures,
    *,
    count: int,
    batch: int = 1,
    defense: Defense | None = None,
    seed: int = 0,
    shard: int = 1_000,
    on_step: OnStep | None = None,
) -> None:
    """Write shards to a folder: shard-00000.safetensors, ... A run that was interrupted goes on where it stopped.

    Raises BadInput if the folder holds pairs of another model, seed or number.
    """
    about = {
        "model": model.state_hash(),
        "pictures": f"{pictures.source} {pictures.split}",
        "count": count,
        "batch": batch,
        "defense": repr(defense),
        "seed": seed,
        "shard": shard,
    }
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "pairs.json"
    if plan.is_file() and json.loads(plan.read_text()) != about:
        raise BadInput(f"{folder} holds pairs that were made in another way: choose another folder.")
    plan.write_text(json.dumps(about))
    number = next(i for i in range(-(-count // shard) + 1) if not path_of(folder, i).is_file())
    for pairs in stream(
        model,
        pictures,
        count=count,
        batch=batch,
        defense=defense,
        seed=seed,
        shard=shard,
        first=number,
        on_step=on_step,
    ):
        tensors = {"images": pairs.images, "labels": pairs.labels, **tensor_file.prefixed("gradient", pairs.gradients)}
        tensor_file.write(tensors, SCHEMA, about | {"number": number}, path_of(folder, number))
        number += 1


def read(folder: Path, model: PictureModel) -> Iterator[Pairs]:
    """The shards of a folder; BadInput if one is missing, damaged, or was made with another model."""
    plan = folder / "pairs.json"
    if not plan.is_file():
        raise BadInput(f"{folder} holds no pairs: make some with `gradleak capture pairs`.")
    try:
        about = json.loads(plan.read_text())
        count, shard, made_with = about["count"], about["shard"], about["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{plan} is damaged ({error}): make the pairs again.") from error
    if made_with != model.state_hash():
        raise BadInput(f"The pairs in {folder} were made with another model, or with other weights.")
    for number in range(-(-count // shard)):
        if not path_of(folder, number).is_file():
            raise BadInput(
                f"{folder} lacks {path_of(folder, number).name}: run the same capture again, it goes on there."
            )
        tensors, _ = tensor_file.read(path_of(folder, number), SCHEMA, "images", "labels")
        pairs = Pairs(tensors["images"], tensors["labels"], tensor_file.group(tensors, "gradient"))
        check(pairs, path_of(folder, number).name)
        yield pairs


def path_of(folder: Path, number: int) -> Path:
    """The file of a shard."""
    return folder / f"shard-{number:05}.safetensors"


def check(pairs: Pairs, where: str) -> None:
    """BadInput naming the first gradient that is not finite."""
    for name, tensor in pairs.gradients.items():
        if not bool(tensor.isfinite().all()):
            raise BadInput(
                f"In {where}, the gradient of {name} is NaN or infinite: the model's loss is not finite there."
            )
