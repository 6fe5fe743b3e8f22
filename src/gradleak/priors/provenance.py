"""What a prior was trained on, and whether private pictures are among it: near-duplicates too, as a prior that has seen the secret
proves nothing about a leak.

A fingerprint is the middle of a grey picture, 8x8 cells, as cosine waves each weighted by its frequency (natural pictures have
power 1/f^2: so all weigh alike) without the constant one, at unit length: brightness and contrast do not change it. A picture is
compared mirrored or not, moved by up to 3 of 32 pixels, and larger or smaller by an eighth.
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
from gradleak.priors.denoisers.files import read_tensors
from gradleak.priors.gaussian import cosines

TOLD, PRINTS = "provenance.json", "provenance.safetensors"
SIDE, MIDDLE, CELLS = 32, 24, 8  # pixels that a picture is brought to, of them those that are looked at, and cells of these
HIGHEST = 7  # waves of at most so many half-cycles, down and across together
SAME = 0.8  # scalar product of fingerprints from which on two pictures are near-duplicates
SHIFTS, ZOOMS = (-3.0, -1.5, 0.0, 1.5, 3.0), (0.875, 1.0, 1.125)


class Told(msgspec.Struct, forbid_unknown_fields=True):
    """provenance.json."""

    source: str
    split: str
    pictures: int
    sha256: str  # of all their bytes, in order
    command: str
    minutes: float  # of CPU
    steps: int


@dataclass(frozen=True, eq=False)
class Provenance:
    """What a prior was trained on."""

    told: Told
    prints: Tensor = field(repr=False)  # (pictures, k) unit length, as int8 of 127

    def save(self, folder: Path) -> None:
        (folder / TOLD).write_bytes(msgspec.json.format(msgspec.json.encode(self.told)))
        save_file({"prints": self.prints}, folder / PRINTS)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises BadInput where there is none, or none that fits."""
        told = checked(read_json(folder / TOLD), Told, f"{folder / TOLD} is not the provenance of a prior")
        prints = read_tensors(folder / PRINTS).get("prints")
        if prints is None or prints.dtype != torch.int8 or prints.shape != (told.pictures, len(waves())):
            raise BadInput(f"{folder / PRINTS} does not hold a fingerprint of each of {told.pictures:,} pictures.")
        return cls(told, prints)


def overlap(pictures: Tensor, provenance: Provenance) -> list[int | None]:
    """For each picture (n, channel, height, width) in [0, 1] the row of the training data that it is a near-duplicate of, or None."""
    known = provenance.prints.float() / 127
    found: list[int | None] = []
    for picture in pictures:
        alike = torch.stack([(known @ seen.T).amax(1) for seen in variants(picture).split(32)]).amax(0)
        found.append(int(alike.argmax()) if float(alike.max()) > SAME else None)
    return found


def fingerprints(images: Tensor, zoom: float = 1.0, down: float = 0.0, across: float = 0.0) -> Tensor:
    """(n, channel, height, width) in [0, 1] -> (n, k). Of the middle, moved by so many pixels of 32, at this zoom."""
    grey = images.float().mean(1, keepdim=True)
    if grey.shape[2:] != (SIDE, SIDE):
        grey = F.interpolate(grey, (SIDE, SIDE), mode="bicubic", antialias=True)
    at = (torch.arange(MIDDLE) - (MIDDLE - 1) / 2) * zoom  # pixels from the centre
    y, x = ((at + moved) / (SIDE / 2) for moved in (down, across))
    grid = torch.stack([x.expand(MIDDLE, -1), y[:, None].expand(-1, MIDDLE)], -1)
    window = F.grid_sample(grey, grid.expand(len(grey), -1, -1, -1), padding_mode="border", align_corners=False)
    cells, C = F.avg_pool2d(window, MIDDLE // CELLS)[:, 0], cosines(CELLS).float()
    i, j = waves().T
    return F.normalize((C @ cells @ C.T)[:, i, j] * (i**2 + j**2).sqrt(), dim=1)


def variants(picture: Tensor) -> Tensor:
    """The fingerprints of a picture, mirrored or not, moved and zoomed: (variants, k)."""
    both = torch.stack([picture, picture.flip(-1)])
    return torch.cat([fingerprints(both, *how) for how in itertools.product(ZOOMS, SHIFTS, SHIFTS)])


def waves() -> Tensor:
    """Half-cycles (down, across) of each wave of a fingerprint: (k, 2)."""
    return torch.tensor([(i, j) for i in range(CELLS) for j in range(CELLS) if 0 < i + j <= HIGHEST])


def of(images: Tensor) -> tuple[str, Tensor]:
    """Pictures (n, channel, height, width) of bytes -> their sha256, and a fingerprint of each as `Provenance` keeps it."""
    prints = torch.cat([fingerprints(some.float() / 255) for some in images.split(1000)])
    return hashlib.sha256(images.contiguous().numpy().tobytes()).hexdigest(), (127 * prints).round().to(torch.int8)
