"""Which pictures a recipe takes: those that no default was tuned on, and data sets that lie beside the one given."""

from dataclasses import replace
from pathlib import Path

from gradleak.modalities.pictures import Pictures, load

IN_WHEELS = {"embedded": 100, "digits": 500}  # data sets that need no folder, and their test pictures


def unseen(data: str, first: int, count: int) -> Pictures:
    """So many test rows from `first` on; of the data in wheels fewer, and from row 0 on where they end before that."""
    end = IN_WHEELS.get(data, first + count)
    first = first if first < end else 0
    return load(data, "test", indices=range(first, min(first + count, end)))


def beside(data: str, name: str) -> Path | None:
    """The data set of that name in the folder that holds `data`, if there is one."""
    folder = Path(data).parent / name
    return folder if data not in IN_WHEELS and folder.is_dir() else None


def shape_of(pictures: Pictures) -> tuple[int, int, int]:
    """(channel, height, width)."""
    channel, height, width = pictures.images.shape[1:]
    return channel, height, width


def rows_of(pictures: Pictures, first: int, count: int) -> Pictures:
    """So many of the pictures, from `first` on."""
    rows = slice(first, first + count)
    return replace(pictures, images=pictures.images[rows], labels=pictures.labels[rows])
