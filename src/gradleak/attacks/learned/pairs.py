"""Pairs (pictures, the gradient they would release) from public data: what learned attacks are trained on.

Made many at once (`vmap` of `grad`), in shards that depend on the seed and their number only: straight into training, so
that memory does not grow with their number, or to disk, where an interrupted run is resumed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.func import grad, vmap

from gradleak.attacks.search.descend import OnStep
from gradleak.errors import BadInput, checked, read_json
from gradleak.modalities.pictures import Pictures
from gradleak.observations import tensor_file
from gradleak.observations.defenses import Defense
from gradleak.observations.model import PictureModel
from gradleak.observations.tensors import Tensors

SCHEMA, PLAN = "gradleak/pairs/1", "pairs.json"
AT_ONCE = 2**26  # numbers in the gradients that are computed side by side
MOST_AT_ONCE = 200  # pairs; more make it no faster


class Plan(msgspec.Struct, frozen=True):
    """pairs.json: all that the pairs of a folder depend on."""

    model: str
    pictures: str
    count: Annotated[int, Meta(ge=1, le=100_000_000)]
    batch: Annotated[int, Meta(ge=1, le=1_000)]
    defense: str
    seed: int
    shard: Annotated[int, Meta(ge=1, le=1_000_000)]


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
    defenses: Sequence[Defense] = (),
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
        part_rows = rows[number * shard : (number + 1) * shard]
        parts = []
        for part in part_rows.split(size):  # type: ignore[no-untyped-call]
            found = released(trained, images[part], labels[part])
            parts.append({name: tensor.detach() for name, tensor in found.items()})
        gradients = {name: torch.cat([part[name] for part in parts]) for name in trained}
        noise = torch.Generator().manual_seed((seed << 20) + number)
        for defense in defenses:
            gradients = defense.apply(gradients, noise)
        pairs = Pairs(images[part_rows], labels[part_rows], gradients)
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
    defenses: Sequence[Defense] = (),
    seed: int = 0,
    shard: int = 1_000,
    on_step: OnStep | None = None,
) -> None:
    """Write shards to a folder: shard-00000.safetensors, ... A run that was interrupted goes on where it stopped.

    Raises BadInput if the folder holds pairs of another model, seed or number.
    """
    origin = {
        "model": model.state_hash(),
        "pictures": f"{pictures.source} {pictures.split}",
        "defense": repr(tuple(defenses)),
    }
    about = checked(
        {**origin, "count": count, "batch": batch, "seed": seed, "shard": shard}, Plan, "No such pairs are made"
    )
    plan = folder / PLAN
    if plan.exists() and read_plan(plan) != about:
        raise BadInput(f"{folder} holds pairs that were made in another way: choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    plan.write_bytes(msgspec.json.encode(about))
    number = next(i for i in range(-(-count // shard) + 1) if not path_of(folder, i).is_file())
    for pairs in stream(
        model,
        pictures,
        count=count,
        batch=batch,
        defenses=defenses,
        seed=seed,
        shard=shard,
        first=number,
        on_step=on_step,
    ):
        tensors = {"images": pairs.images, "labels": pairs.labels, **tensor_file.prefixed("gradient", pairs.gradients)}
        header = {**msgspec.to_builtins(about), "number": number}
        tensor_file.write(tensors, SCHEMA, header, path_of(folder, number))
        number += 1


def read(folder: Path, model: PictureModel) -> Iterator[Pairs]:
    """The shards of a folder; BadInput if one is missing, damaged, or was made with another model."""
    if not (folder / PLAN).is_file():
        raise BadInput(f"{folder} holds no pairs: make some with `gradleak capture pairs`.")
    plan = read_plan(folder / PLAN)
    if plan.model != model.state_hash():
        raise BadInput(f"The pairs in {folder} were made with another model, or with other weights.")
    for number in range(-(-plan.count // plan.shard)):
        if not path_of(folder, number).is_file():
            raise BadInput(
                f"{folder} lacks {path_of(folder, number).name}: run the same capture again, it goes on there."
            )
        tensors, _ = tensor_file.read(path_of(folder, number), SCHEMA, "images", "labels")
        gradients = tensor_file.floating(tensor_file.group(tensors, "gradient"), path_of(folder, number))
        pairs = Pairs(tensors["images"], tensors["labels"], gradients)
        check_fits(
            pairs, model, (min(plan.shard, plan.count - number * plan.shard), plan.batch), path_of(folder, number)
        )
        check(pairs, path_of(folder, number).name)
        yield pairs


def read_plan(path: Path) -> Plan:
    """What the pairs of a folder are; BadInput where the file is damaged."""
    return checked(read_json(path), Plan, f"{path} is damaged: make the pairs again")


def check_fits(pairs: Pairs, model: PictureModel, size: tuple[int, int], path: Path) -> None:
    """BadInput where a shard does not hold so many pairs of so many pictures, with the gradients of this model."""
    images, labels, trained = pairs.images, pairs.labels, model.trained
    if images.shape != (*size, *model.architecture.input_shape) or images.dtype != torch.float32:
        raise BadInput(f"{path} is damaged: it does not hold {size[0]:,} times {size[1]:,} pictures.")
    if labels.shape != size or labels.dtype != torch.int64:
        raise BadInput(f"{path} is damaged: its labels are no class indices.")
    if int(labels.min()) < 0 or int(labels.max()) >= model.architecture.classes:
        raise BadInput(f"{path} is damaged: a label is beyond the model's {model.architecture.classes} classes.")
    if {n: g.shape for n, g in pairs.gradients.items()} != {n: (size[0], *p.shape) for n, p in trained.items()}:
        raise BadInput(f"{path} is damaged: its gradients are not those of this model.")


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
