"""What a prior was trained on, and whether private pictures are among it: near-duplicates too, as a prior that has seen the secret
proves nothing about a leak.

A fingerprint is the middle of a grey picture, 16x16 cells, as cosine waves each weighted by its frequency (natural pictures have
power 1/f^2: so all weigh alike) without the constant one, at unit length: brightness and contrast do not change it. A picture is
compared mirrored or not, moved by up to 3 of 32 pixels, and larger or smaller by an eighth: its coarse waves with all that is known,
then all waves with the most alike, moved and zoomed more finely.
"""

import hashlib
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import msgspec
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from gradleak.errors import BadInput, checked, read_json
from gradleak.priors.files import read_tensors
from gradleak.priors.gaussian import cosines

TOLD, PRINTS = "provenance.json", "provenance.safetensors"
SIDE, MIDDLE = 32, 24  # pixels that a picture is brought to, and of them those that are looked at
CELLS = 16  # of these, each way
FINE, COARSE = 13, 7  # waves of at most so many half-cycles, down and across together
CLOSEST = 8  # pictures that are compared finely
SAME = 0.95  # scalar product of fingerprints from which on two pictures are near-duplicates
SHIFTS, ZOOMS = (-3.0, -1.5, 0.0, 1.5, 3.0), (0.875, 1.0, 1.125)


class Told(msgspec.Struct, forbid_unknown_fields=True):
    """provenance.json."""

    source: str
    split: str
    pictures: int
    sha256: str  # of all their bytes, in order
    minutes: float = 0.0  # of CPU that it was trained for
    steps: int = 0


@dataclass(frozen=True, eq=False)
class Provenance:
    """What a prior was trained on."""

    told: Told
    prints: Tensor = field(repr=False)  # (pictures, k) unit length, as int8 of 127

    def __str__(self) -> str:
        return f"{self.told.pictures:,} pictures of {self.told.source}, {self.told.split}"

    def save(self, folder: Path) -> None:
        """Write provenance.json and provenance.safetensors."""
        (folder / TOLD).write_bytes(msgspec.json.format(msgspec.json.encode(self.told)))
        save_file({"prints": self.prints}, folder / PRINTS)

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """None where there is none. Raises BadInput for one that does not fit."""
        if not (folder / TOLD).is_file():
            return None
        told = checked(read_json(folder / TOLD), Told, f"{folder / TOLD} is not the provenance of a prior")
        prints = read_tensors(folder / PRINTS).get("prints")
        if prints is None or prints.dtype != torch.int8 or prints.shape != (told.pictures, len(waves())):
            raise BadInput(f"{folder / PRINTS} does not hold a fingerprint of each of {told.pictures:,} pictures.")
        return cls(told, prints)


def overlap(pictures: Tensor, provenance: Provenance) -> list[int | None]:
    """For each picture (n, channel, height, width) in [0, 1] the row of the training data that it is a near-duplicate of, or None."""
    known = provenance.prints.float() / 127
    coarse = F.normalize(known[:, few()], dim=1)
    return [row if alike > SAME else None for row, alike in (closest(one, known, coarse) for one in pictures)]


def closest(picture: Tensor, known: Tensor, coarse: Tensor) -> tuple[int, float]:
    """The row of fingerprints (n, k) that is most like a picture (channel, height, width), and how much, from -1 to 1."""
    flips, ways = (False, True), torch.tensor(list(itertools.product(ZOOMS, SHIFTS, SHIFTS)))
    seen = F.normalize(torch.cat([fingerprints(mirrored(picture, flip), ways) for flip in flips])[:, few()], dim=1)
    alike, way = (coarse @ seen.T).max(1)  # (n,)
    best = 0, -1.0
    for row in alike.topk(min(CLOSEST, len(alike))).indices.tolist():
        flip, at = divmod(int(way[row]), len(ways))
        near = ways[at] + torch.tensor(
            list(itertools.product((-0.06, 0.0, 0.06), (-0.75, 0.0, 0.75), (-0.75, 0.0, 0.75)))
        )
        near = torch.cat([near, ways[at] + (near - ways[at]) / 2])
        fine = float((fingerprints(mirrored(picture, bool(flip)), near) @ known[row]).max())
        best = max(best, (row, fine), key=lambda pair: pair[1])
    return best


def mirrored(picture: Tensor, flip: bool) -> Tensor:
    """(1, channel, height, width)."""
    return (picture.flip(-1) if flip else picture)[None]


def fingerprints(images: Tensor, ways: Tensor | None = None) -> Tensor:
    """(n, channel, height, width) in [0, 1] -> (n, k). ways (n, 3), or for one picture more: zoom of the middle that is looked at, and
    pixels of 32 that it is moved down and across."""
    grey = images.float().mean(1, keepdim=True)
    if grey.shape[2:] != (SIDE, SIDE):
        grey = F.interpolate(grey, (SIDE, SIDE), mode="bicubic", antialias=True)
    zoom, down, across = (torch.tensor([[1.0, 0.0, 0.0]]) if ways is None else ways)[..., None].unbind(
        1
    )  # (n or 1, 1) each
    at = (
        (torch.arange(2 * CELLS) - CELLS + 0.5) * (MIDDLE / 2 / CELLS) * zoom
    )  # two points in each cell; pixels from the centre
    y, x = ((at + moved) / (SIDE / 2) for moved in (down, across))
    n, points = max(len(grey), len(at)), 2 * CELLS
    grid = torch.stack([x[:, None, :].expand(n, points, -1), y[:, :, None].expand(n, -1, points)], -1)
    window = F.grid_sample(grey.expand(n, -1, -1, -1), grid, padding_mode="border", align_corners=False)
    cells, C = F.avg_pool2d(window, 2)[:, 0], cosines(CELLS).float()
    i, j = waves().T
    return F.normalize((C @ cells @ C.T)[:, i, j] * (i**2 + j**2).sqrt(), dim=1)


def waves() -> Tensor:
    """Half-cycles (down, across) of each wave of a fingerprint: (k, 2)."""
    return torch.tensor([(i, j) for i in range(CELLS) for j in range(CELLS) if 0 < i + j <= FINE])


def few() -> Tensor:
    """Which of them are coarse: (k,) of bool."""
    return waves().sum(1) <= COARSE


def fingerprinted(images: Tensor) -> tuple[str, Tensor]:
    """Pictures (n, channel, height, width) of bytes -> their sha256, and a fingerprint of each as `Provenance` keeps it."""
    prints = torch.cat([fingerprints(some.float() / 255) for some in torch.split(images, 1000)])
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest(), (127 * prints).round().to(torch.int8)
