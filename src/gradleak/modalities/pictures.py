"""Pictures to attack and pictures that everybody may know, as tensors with pixels in [0, 1].

A *source* is one of

    "embedded"     32x32 colour crops of ten photographs that the scikit-image wheel carries; needs no download
    "digits"       scikit-learn's 8x8 grey digits: the first 1,297 rows are "train", the last 500 "test"
    a folder       with Hugging Face parquet files, or with pictures (one sub-folder per class, or flat)
    another name   of such a folder in the folder GRADLEAK_DATA, else of a data set on the Hugging Face hub, such as "cifar10"

`load` reads the private pictures of an experiment, `public_pool` what the attacker is assumed to have.
"""

from __future__ import annotations

import base64
import io
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from gradleak.errors import BadInput, shortened
from gradleak.modalities.hub import kept, without_waiting

LONGEST_SIDE = 4_096  # of a picture that a model sees
MOST_CLASSES = 1_000_000
UNLABELLED = ("unlabelled",)  # the classes of data without labels
IN_WHEELS = ("embedded", "digits")
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")  # those that run no other program

# `datasets`, `skimage` and `sklearn` are imported inside the functions that need them: together they take seconds,
# which somebody who attacks a gradient of their own would pay for nothing.


# What Pillow says to broken files.
BROKEN = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError),
    *(MemoryError, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning),
)


@dataclass(frozen=True, eq=False)
class Pictures:
    """A labelled batch of pictures and where it came from."""

    images: Tensor  # (n, channel, height, width) float32 in [0, 1]
    labels: Tensor  # (n,) int64, indices into classes
    classes: tuple[str, ...]
    source: str
    split: str
    drawn: int | None = None  # they are the first of more, in the random order of this seed

    @property
    def names(self) -> tuple[str, ...]:
        """Of the classes, where the source has them."""
        return () if self.classes == UNLABELLED else self.classes


@dataclass(frozen=True)
class _Rows:
    """A split before any picture is decoded: `decode(i)` gives row i as (channel, height, width) in [0, 1]."""

    labels: Sequence[int]
    classes: tuple[str, ...]
    decode: Callable[[int], Tensor]
    size: tuple[int, int] | None = None  # the size to deliver when the caller names none; None: as stored


def load(
    source: str | Path,
    split: str = "test",
    *,
    indices: Sequence[int] | None = None,
    limit: int | None = None,
    resize: tuple[int, int] | None = None,
) -> Pictures:
    """Rows `indices` (default: all) of one split, at most `limit` of them; only these are decoded.

    `resize` is (height, width), antialiased. Grey pictures keep one channel unless the selection also holds colour.
    A picture set without a label column gets label 0. Raises `BadInput` when the source, the split or a row does not
    exist, when it holds no pictures, or when the pictures differ in size and `resize` is not given.
    """
    rows = _rows(source, split)
    n = len(rows.labels)
    chosen = list(range(n)) if indices is None else list(indices)
    if outside := [i for i in chosen if not 0 <= i < n]:
        raise BadInput(f"Row {outside[0]} does not exist: split {split!r} of {source} has rows 0 to {n - 1}.")
    if limit is not None and limit < 1:
        raise BadInput(f"The limit on the number of pictures must be at least 1, not {limit}.")
    chosen = chosen[:limit]
    if not chosen:
        raise BadInput(f"No rows were selected from split {split!r} of {source}: give at least one index.")
    size = resize or rows.size
    images = [rows.decode(i) if size is None else resized(rows.decode(i), size) for i in chosen]
    channel = max(image.shape[0] for image in images)
    images = [with_channels(image, channel) for image in images]
    for i, image in zip(chosen, images, strict=True):
        if image.shape != images[0].shape:
            first, other = (f"{s[1]}x{s[2]}" for s in (images[0].shape, image.shape))
            raise BadInput(
                f"The pictures of {source} differ in size: row {chosen[0]} is {first} and row {i} is {other} "
                "(height x width); ask for one size with resize."
            )
    return _pictures(rows, chosen, images, source, split)


def public_pool(
    source: str | Path, split: str = "train", *, shape: tuple[int, int, int], limit: int = 1000, seed: int = 0
) -> Pictures:
    """A random sample, the same for the same seed, of at most `limit` public pictures brought to `shape`.

    `shape` is (channel, height, width) with 1 or 3 channels; grey and colour are converted into each other. This is
    where mean images, decoys and nearest public samples come from. Raises `BadInput` as `load` does.
    """
    return sampled(source, split, shape=shape, limit=limit, seed=seed)[0]


def sampled(
    source: str | Path, split: str, *, shape: tuple[int, int, int], limit: int, seed: int = 0, first: int = 0
) -> tuple[Pictures, list[int], int]:
    """`public_pool` without its `first` pictures, the row in the source of each, and how many the source has."""
    channel, height, width = shape
    if channel not in (1, 3):
        raise BadInput(f"Pictures have 1 or 3 channels, not {channel}.")
    if limit < 1:
        raise BadInput(f"The limit on the number of pictures must be at least 1, not {limit}.")
    rows = _rows(source, split)
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = torch.randperm(len(rows.labels), generator=generator)[first:limit].tolist()
    images = [with_channels(resized(rows.decode(i), (height, width)), channel) for i in chosen]
    if not chosen:
        raise BadInput(f"Split {split!r} of {source} is empty.")
    drawn = seed if first == 0 and len(chosen) < len(rows.labels) else None
    return replace(_pictures(rows, chosen, images, source, split), drawn=drawn), chosen, len(rows.labels)


def resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """(channel, h, w) -> (channel, *size) by antialiased bicubic interpolation, clamped to [0, 1]."""
    if min(size) < 1 or max(size) > LONGEST_SIDE:
        raise BadInput(f"A picture size is (height, width), both between 1 and {LONGEST_SIDE:,}, not {size}.")
    if tuple(image.shape[1:]) == tuple(size):
        return image
    # bicubic overshoots at edges, hence the clamp
    return F.interpolate(image[None], size, mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)


def with_channels(image: Tensor, channel: int) -> Tensor:
    """(1 or 3, h, w) -> (channel, h, w): grey is repeated, colour becomes luma (ITU-R BT.601)."""
    if image.shape[0] == channel:
        return image
    if channel == 1:
        return (image * image.new_tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)
    return image.expand(channel, -1, -1)


def png(image: Tensor) -> str:
    """(1 or 3, height, width) in [0, 1] -> a PNG as a data URI."""
    buffer = io.BytesIO()
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy()).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _pictures(rows: _Rows, chosen: Sequence[int], images: Sequence[Tensor], source: str | Path, split: str) -> Pictures:
    labels = torch.tensor([int(rows.labels[i]) for i in chosen])
    return Pictures(torch.stack(list(images)), labels, rows.classes, str(source), split)


def _rows(source: str | Path, split: str) -> _Rows:
    if source in IN_WHEELS:
        _check_split(split, ("train", "test"), source)
        return _embedded(split) if source == "embedded" else _digits(split)
    return _hugging_face(source, split)


def _check_split(split: str, available: Iterable[str], source: str | Path) -> None:
    if split not in (names := list(available)):
        raise BadInput(f"{source} has no split {split!r}; it has {', '.join(map(repr, names))}.")


# --- embedded -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Photograph:
    """A picture file of the scikit-image wheel and the square of it that is private."""

    name: str
    file: str
    left: int  # pixels
    top: int
    side: int  # a multiple of 4


# The private squares show what a person recognises; the public crops come from around them and share no pixel with
# them. Only one of the wheel's two motorcycle pictures is used: they are a stereo pair, each would leak the other.
PHOTOGRAPHS = (
    Photograph("astronaut", "astronaut.png", left=134, top=8, side=176),
    Photograph("cat", "chelsea.png", left=130, top=50, side=220),
    Photograph("coffee", "coffee.png", left=105, top=5, side=300),
    Photograph("rocket", "rocket.jpg", left=180, top=106, side=280),
    Photograph("motorcycle", "motorcycle_left.png", left=380, top=120, side=320),
    Photograph("retina", "retina.jpg", left=60, top=370, side=600),
    Photograph("galaxies", "hubble_deep_field.jpg", left=340, top=640, side=200),
    Photograph("tissue", "ihc.png", left=225, top=315, side=172),
    Photograph("cameraman", "camera.png", left=150, top=50, side=220),
    Photograph("coins", "coins.png", left=303, top=12, side=72),
)
_PUBLIC_CROPS = 64  # per photograph


def embedded_boxes(photo: Photograph, split: str, width: int, height: int) -> list[tuple[int, int, int, int]]:
    """The crops (left, top, right, bottom), in pixels, of a photograph of the given size.

    "test": the private square, its four corners at 3/4 of its side, four corners and centre at 1/2: ten crops, all
    inside the square. "train": 64 squares of 1, 3/4, 1/2 and 1/4 of its side (no less than 32), spread evenly over all
    places outside the square.
    """
    s, left, top = photo.side, photo.left, photo.top
    if split == "test":
        corners = ((0, 0), (1, 1), (1, 0), (0, 1))
        places = [(s, 0, 0)]
        places += [(side, x * (s - side), y * (s - side)) for side in (3 * s // 4, s // 2) for x, y in corners]
        places += [(s // 2, s // 4, s // 4)]
        return [(left + x, top + y, left + x + side, top + y + side) for side, x, y in places]
    outside = [
        (x, y, x + side, y + side)
        for side in (s, 3 * s // 4, s // 2, s // 4)
        if side >= 32
        for y in range(0, height - side + 1, side // 4)
        for x in range(0, width - side + 1, side // 4)
        if x + side <= left or x >= left + s or y + side <= top or y >= top + s
    ]
    return [outside[i * len(outside) // _PUBLIC_CROPS] for i in range(_PUBLIC_CROPS)]


def _embedded(split: str) -> _Rows:
    import skimage

    # Not skimage.data.data_dir: with pooch installed that is a download cache, not the wheel.
    folder = Path(skimage.__file__).parent / "data"
    photos: dict[int, Tensor] = {}
    boxes = []
    for photo in PHOTOGRAPHS:
        if not (folder / photo.file).is_file():
            raise BadInput(f"The installed scikit-image does not carry {photo.file}: reinstall it from its wheel.")
        with Image.open(folder / photo.file) as image:
            boxes.append(embedded_boxes(photo, split, image.width, image.height))

    def decode(i: int) -> Tensor:  # row i is crop i // 10 of photograph i % 10
        which = i % len(PHOTOGRAPHS)
        if which not in photos:
            with Image.open(folder / PHOTOGRAPHS[which].file) as image:
                photos[which] = with_channels(_tensor(image), 3)
        left, top, right, bottom = boxes[which][i // len(PHOTOGRAPHS)]
        return photos[which][:, top:bottom, left:right]  # cropped before it is resized: no pixel bleeds across

    labels = [i % len(PHOTOGRAPHS) for i in range(sum(map(len, boxes)))]
    return _Rows(labels, tuple(photo.name for photo in PHOTOGRAPHS), decode, size=(32, 32))


# --- digits ---------------------------------------------------------------------------------------------------------


def _digits(split: str) -> _Rows:
    from sklearn.datasets import load_digits

    digits = load_digits()
    part = slice(0, -500) if split == "train" else slice(-500, None)
    images = torch.as_tensor(digits.images[part] / 16, dtype=torch.float32)[:, None]  # grey levels 0..16
    return _Rows(digits.target[part], tuple("0123456789"), lambda i: images[i])


# --- Hugging Face ---------------------------------------------------------------------------------------------------


def _hugging_face(source: str | Path, split: str) -> _Rows:
    import datasets

    splits = hugging_face_splits(source)
    _check_split(split, splits, source)
    table = splits[split]
    image = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if not image:
        raise BadInput(f"{source} holds no pictures: its columns are {', '.join(table.column_names)}.")
    labels, classes = hugging_face_labels(table, source)
    raw = table.select_columns(image[:1]).cast_column(image[0], datasets.Image(decode=False))

    def decode(i: int) -> Tensor:
        stored = raw[i][image[0]]
        try:
            with warnings.catch_warnings(action="ignore"):
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                file = stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])
                if isinstance(file, str) and not Path(file).is_file():
                    raise BadInput(f"The picture in row {i} of {source} is not there.")
                with Image.open(file) as picture:
                    if picture.format not in FORMATS:
                        raise BadInput(f"The picture in row {i} of {source} is {picture.format}, which is not read.")
                    return _tensor(picture)
        except BROKEN as error:
            if isinstance(error, BadInput):
                raise
            reason = shortened(str(error))
            raise BadInput(f"The picture in row {i} of {source} cannot be read: {reason}") from error

    return _Rows(labels, classes, decode)


def hugging_face_splits(source: str | Path) -> Mapping[str, Any]:
    import datasets

    path = Path(os.path.expanduser(source))
    if not path.exists() and isinstance(source, str):
        path = kept(source) or path
    if path.is_dir():
        if path.resolve() == Path(path.resolve().anchor):
            raise BadInput(f"{source} is everything on this machine: give a folder that holds data.")
        builder = "parquet" if next(path.rglob("*.parquet"), None) else "imagefolder"
        arguments = {"path": builder, "data_dir": str(path)}
    elif isinstance(source, Path) or path.exists() or source.startswith(("/", "./", "../", "~")):
        what = "is a file" if path.exists() else "does not exist"
        raise BadInput(f"{source} {what}: give a folder that holds parquet files or pictures.")
    else:
        arguments = {"path": source}
    silent = ""
    try:
        with _quiet(), nullcontext("") if path.is_dir() else without_waiting() as silent:
            splits: Mapping[str, Any] = datasets.load_dataset(**arguments)
    except (*BROKEN, datasets.exceptions.DatasetsError) as error:
        reason = silent or shortened(str(error.__cause__ or error)).rstrip(".")
        if path.is_dir():
            raise BadInput(f"{source} cannot be read as a folder of parquet files or pictures: {reason}.") from error
        raise BadInput(
            f"{source!r} is no folder here, and it cannot be had from the Hugging Face hub: {reason}. "
            'Give a local folder (or a name of one in the folder GRADLEAK_DATA), or "embedded" or "digits", which need no network.'
        ) from error
    return splits


def hugging_face_labels(table: Any, source: str | Path) -> tuple[Sequence[int], tuple[str, ...]]:
    """Labels of all rows, and class names, from the class-label column or an integer column called label or labels."""
    import datasets

    named = [name for name, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    plain = [name for name in ("label", "labels") if "int" in str(getattr(table.features.get(name), "dtype", ""))]
    columns = [name for name in plain if name in named] or named or plain
    if not columns:
        return [0] * len(table), UNLABELLED
    labels = table.select_columns(columns[:1]).with_format("numpy")[:][columns[0]]
    what = f"The label column {shortened(columns[0])!r} of {source}"
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise BadInput(f"{what} has missing entries, or none that are whole numbers.")
    names = tuple(table.features[columns[0]].names) if named else None
    least, largest = int(labels.min(initial=0)), int(labels.max(initial=0))
    if least < 0:
        raise BadInput(f"{what} hides its labels (they are negative): take another split.")
    if largest >= (MOST_CLASSES if names is None else len(names)):
        raise BadInput(f"{what} has the label {largest:,}, which is no label.")
    return labels, tuple(map(str, range(largest + 1))) if names is None else names


@contextmanager
def _quiet() -> Iterator[None]:
    """Neither progress bars nor log messages of `datasets` inside; whatever the caller had chosen outside."""
    import datasets

    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    if bars:
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _tensor(image: Image.Image) -> Tensor:
    """Pillow picture -> (1 or 3, height, width) float32 in [0, 1], upright, without transparency."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits per grey pixel
        return torch.from_numpy(np.asarray(image).astype(np.float32) / 65535).clamp(0, 1)[None]
    if image.mode == "P":  # Pillow warns about palettes with transparency unless they pass through RGBA
        image = image.convert("RGBA")
    image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()
