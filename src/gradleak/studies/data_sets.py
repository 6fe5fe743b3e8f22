"""Which pictures a study takes: at which size, those that no default was tuned on, and data sets beside the one given."""

from dataclasses import replace
from pathlib import Path

from gradleak.modalities.pictures import Pictures, load
from gradleak.studies.study import Size

IN_WHEELS = {"embedded": 100, "digits": 500}  # data sets that need no folder, and their test pictures
SMOKE_SIDE = 16  # pixels
Shape = tuple[int, int, int]  # channel, height, width


def blueprint(data: str, size: Size) -> tuple[Shape, int]:
    """The shape of the data's pictures, at smoke size no higher and wider than 16 pixels, and how many classes they have."""
    first = load(data, "test", indices=[0])
    channel, height, width = shape_of(first)
    if size == "smoke":
        height, width = min(height, SMOKE_SIDE), min(width, SMOKE_SIDE)
    return (channel, height, width), max(len(first.classes), 2)


def shrunk(shape: Shape, size: Size) -> str:
    """A note that pictures were made small, or nothing."""
    return f"pictures of {shape[1]}x{shape[2]}" if size == "smoke" and SMOKE_SIDE in shape[1:] else ""


def unseen(data: str, first: int, count: int, shape: Shape) -> Pictures:
    """So many test rows from `first` on; of the data in wheels fewer, and from row 0 on where they end before that."""
    end = IN_WHEELS.get(data, first + count)
    first = first if first < end else 0
    return load(data, "test", indices=range(first, min(first + count, end)), resize=shape[1:])


def beside(data: str, name: str) -> Path | None:
    """The data set of that name in the folder that holds `data`, if there is one."""
    folder = Path(data).parent / name
    return folder if data not in IN_WHEELS and folder.is_dir() else None


def shape_of(pictures: Pictures) -> Shape:
    """(channel, height, width)."""
    channel, height, width = pictures.images.shape[1:]
    return channel, height, width


def rows_of(pictures: Pictures, first: int, count: int) -> Pictures:
    """So many of the pictures, from `first` on."""
    rows = slice(first, first + count)
    return replace(pictures, images=pictures.images[rows], labels=pictures.labels[rows])
