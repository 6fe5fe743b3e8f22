"""A folder of canaries: what to train with, all candidates, and the coins.

train_with/   the canaries that the coins include: train.jsonl of texts; of pictures a parquet file, or PNGs in a folder per class
candidates/   all of them: train.jsonl, or a parquet file
coins.safetensors   which of them are included; for its owner's eyes alone
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from gradleak.errors import BadInput, checked, parsed
from gradleak.modalities.pictures import Pictures, load, resized, with_channels
from gradleak.modalities.texts import Texts
from gradleak.observations import tensor_file

SCHEMA = "gradleak/canaries/1"
LINES = "train.jsonl"
PARQUET = "train-00000-of-00001.parquet"
LARGEST = 2**30  # bytes of a file of lines


class Line(msgspec.Struct, frozen=True):
    """One text."""

    text: Annotated[str, Meta(min_length=1)]


class About(msgspec.Struct, frozen=True):
    """The header of the coins: how the canaries were made; words that a template was filled with."""

    kind: str
    template: str | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Coins:
    """Which canaries are included, (m,) bool, and how all of them were made."""

    included: Tensor
    about: About


def write_canaries(data: Texts | Pictures, coins: Coins, folder: Path, *, png: bool = False) -> list[Path]:
    """Write the folder; returns what to train with, the candidates, and the coins."""
    rows = coins.included.nonzero().flatten().tolist()
    if not rows:
        raise BadInput("No coin includes a canary: make more of them.")
    train, every = folder / "train_with", folder / "candidates"
    for place in (train, every):
        place.mkdir(parents=True)
    if isinstance(data, Texts):
        _write_lines([data.texts[i] for i in rows], train / LINES)
        _write_lines(data.texts, every / LINES)
    else:
        included = Pictures(data.images[rows], data.labels[rows], data.classes, data.source, data.split)
        (_write_png if png else _write_parquet)(included, train)
        _write_parquet(data, every)
    path = folder / "coins.safetensors"
    tensor_file.write({"included": coins.included}, SCHEMA, msgspec.to_builtins(coins.about), path, private=True)
    return [train, every, path]


def read_coins(folder: Path) -> Coins:
    """The coins of a folder; BadInput where there are none, or they are damaged."""
    path = folder / "coins.safetensors"
    tensors, about = tensor_file.read(path, SCHEMA, "included")
    included = tensors["included"]
    if included.dtype != torch.bool or included.ndim != 1 or not len(included):
        raise BadInput(f"{path} is damaged: its coins are no row of yes and no.")
    return Coins(included, checked(about, About, f"{path} is damaged"))


def read_canaries(folder: Path, architecture: Any, count: int) -> Texts | Pictures:
    """All candidates of a folder, as a model of this blueprint takes them; BadInput where they are not so many."""
    lines = folder / "candidates" / LINES
    data: Texts | Pictures
    if architecture.modality == "texts":
        if not lines.is_file():
            raise BadInput(f"The canaries in {folder} are no texts, and the model takes texts.")
        texts = read_lines(lines)
        data = Texts(texts, torch.zeros(len(texts), dtype=torch.int64), 1, str(folder), "train")
    else:
        if lines.is_file():
            raise BadInput(f"The canaries in {folder} are texts, and the model takes pictures.")
        channel, *size = architecture.input_shape
        stored = load(folder / "candidates", "train")
        images = torch.stack([with_channels(resized(image, (size[0], size[1])), channel) for image in stored.images])
        data = Pictures(images, stored.labels, stored.classes, str(folder), "train")
    if len(data.labels) != count:
        raise BadInput(f"{folder} holds {len(data.labels)} candidates and {count} coins: it is damaged.")
    return data


def read_lines(path: Path) -> tuple[str, ...]:
    """Texts of a file: of .jsonl the field "text" of each line, of anything else each line that is not empty.

    Raises BadInput where there is no such file, no text in it, or a line that is no such object.
    """
    if not path.is_file():
        raise BadInput(f"There is no file {path}.")
    if path.stat().st_size > LARGEST:
        raise BadInput(f"{path} is too large to be read as lines of text.")
    try:
        lines = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is no text in UTF-8.") from error
    if path.suffix == ".jsonl":
        told = f'{path} has a line that is no object with a field "text"'
        lines = [checked(parsed(line, told), Line, told).text for line in lines]
    texts = tuple(line.strip("\r") for line in lines)
    if not texts:
        raise BadInput(f"{path} holds no text.")
    return texts


def _write_lines(texts: Any, path: Path) -> None:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")


def _pictures(data: Pictures) -> list[Any]:
    from PIL import Image

    pixels = (data.images.clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).squeeze(-1).numpy()) for image in pixels]


def _write_parquet(data: Pictures, folder: Path) -> None:
    """As data sets of pictures are: columns image and label."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(data.classes))})
    columns = {"image": _pictures(data), "label": data.labels.tolist()}
    table = datasets.Dataset.from_dict(columns, features=features)
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        table.to_parquet(folder / PARQUET)
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _write_png(data: Pictures, folder: Path) -> None:
    """CLASS/NUMBER.png."""
    if odd := next((name for name in data.classes if Path(name).name != name), None):
        raise BadInput(f"The class {odd!r} cannot be the name of a folder: leave out --png.")
    for number, (picture, label) in enumerate(zip(_pictures(data), data.labels.tolist(), strict=True)):
        place = folder / data.classes[label]
        place.mkdir(exist_ok=True)
        picture.save(place / f"{number:06}.png")
