"""What a prior was trained on: near-duplicates are found, other pictures are not, and a prior that saw the secret voids a verdict."""

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from gradleak.audit.checks import trained_on_secret
from gradleak.errors import BadInput
from gradleak.formats.secret_file import Secret
from gradleak.modalities.pictures import load, public_pool
from gradleak.priors.provenance import Provenance, Told, fingerprinted, fingerprints, overlap

KNOWN = public_pool("embedded", "train", shape=(3, 32, 32), limit=300).images
OTHERS = load("embedded", "test").images[:12]


def provenance(images: Tensor) -> Provenance:
    sha256, prints = fingerprinted((255 * images).round().to(torch.uint8))
    return Provenance(Told("embedded", "train", len(images), sha256), prints)


def jpeg(image: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    pixels = (255 * image.clamp(0, 1)).to(torch.uint8).permute(1, 2, 0).contiguous()
    Image.frombytes("RGB", (32, 32), bytes(pixels.flatten().tolist())).save(buffer, "JPEG", quality=quality)
    again = torch.frombuffer(bytearray(Image.open(buffer).convert("RGB").tobytes()), dtype=torch.uint8)
    return again.view(32, 32, 3).permute(2, 0, 1) / 255


def crop(image: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """So many pixels less at each side, brought back to 32x32."""
    inner = image[None, :, top : 32 - bottom, left : 32 - right]
    return F.interpolate(inner, (32, 32), mode="bicubic", antialias=True)[0].clamp(0, 1)


CHANGES: dict[str, Any] = {
    "mirrored": lambda image: image.flip(-1),
    "brighter": lambda image: (1.3 * image).clamp(0, 1),
    "JPEG": lambda image: jpeg(image, 30),
    "cropped": lambda image: crop(image, 2, 2, 2, 2),
    "cropped at a corner": lambda image: crop(image, 3, 0, 0, 3),
    "moved": lambda image: image.roll((2, -3), (1, 2)),
    "larger": lambda image: F.interpolate(image[None], (48, 48), mode="bicubic")[0],
    "all, and JPEG": lambda image: jpeg(crop((1.15 * image).clamp(0, 1), 2, 1, 1, 2).flip(-1), 50),
}


@pytest.fixture(scope="module")
def known() -> Provenance:
    return provenance(KNOWN)


@pytest.mark.parametrize("change", CHANGES)
def test_near_duplicates_are_found(change: str, known: Provenance) -> None:
    """All of them; but a JPEG of quality 30 keeps of clear skies nothing but its own blocks: half of them at least."""
    changed = [CHANGES[change](KNOWN[row]) for row in range(25, 300, 50)]
    found = [overlap(image[None], known)[0] for image in changed]
    assert len(found) - found.count(None) >= (3 if "JPEG" in change else 6)


def test_other_pictures_are_not(known: Provenance) -> None:
    """Other parts of the same photographs; digits; and pictures in which there is nothing to see."""
    for images in (OTHERS, load("digits", "test", limit=10).images, torch.full((1, 3, 32, 32), 0.5)):
        assert overlap(images, known) == [None] * len(images)


@pytest.mark.skipif("GRADLEAK_DATA" not in os.environ, reason="CIFAR-10 is not there")
def test_cifar() -> None:
    """A picture of the training data, mirrored; and test pictures 0 to 19, none of which looks like another of 2,000."""
    data = Path(os.environ["GRADLEAK_DATA"]) / "cifar10"
    known = load(data, "train", limit=2000).images
    assert overlap(known[77:78].flip(-1), provenance(known)) == [77]
    assert overlap(load(data, "test", limit=20).images, provenance(known)) == [None] * 20


def test_fingerprints_ignore_brightness_and_have_unit_length() -> None:
    prints = fingerprints(KNOWN[:5])
    torch.testing.assert_close(prints.square().sum(1), torch.ones(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(fingerprints(0.5 * KNOWN[:5] + 0.3), prints, atol=1e-4, rtol=0)


def test_kept_and_read_again(tmp_path: Path, known: Provenance) -> None:
    known.save(tmp_path)
    read = Provenance.load(tmp_path)
    assert read is not None
    assert read.told == known.told
    assert torch.equal(read.prints, known.prints)
    assert Provenance.load(tmp_path / "nowhere") is None
    text = (tmp_path / "provenance.json").read_text()
    (tmp_path / "provenance.json").write_text(text.replace("300", "301"))
    with pytest.raises(BadInput, match="does not hold a fingerprint of each of 301 pictures"):
        Provenance.load(tmp_path)
    (tmp_path / "provenance.json").write_text("{}")
    with pytest.raises(BadInput, match="is not the provenance of a prior"):
        Provenance.load(tmp_path)


@dataclass
class Prior:
    provenance: Provenance | None


@dataclass
class Attack:
    prior: Any
    start: Any = None
    after: Any = None


def test_a_prior_that_saw_the_secret_voids_the_verdict(known: Provenance) -> None:
    secret = Secret(torch.stack([KNOWN[5].flip(-1), OTHERS[0]]), torch.tensor([0, 1]))
    (found,) = trained_on_secret(Attack(Prior(known)), secret)
    assert (found["level"], found["name"]) == ("error", "secret_in_prior")
    assert found["sentence"] == (
        "A prior trained on the secret: 1 of 2 private pictures, or near-duplicates of them, are among 300 pictures of embedded, train "
        "(first at row 5). Take a prior that has not seen them, or none."
    )
    (unknown,) = trained_on_secret(Attack(Prior(None)), secret)
    assert (unknown["level"], unknown["sentence"]) == (
        "warning",
        "Nobody tells what the prior was trained on: it may have seen the secret.",
    )
    assert trained_on_secret(Attack(Prior(provenance(KNOWN[50:]))), secret) == []
    assert trained_on_secret(Attack(None), secret) == []
    tainted = Attack(Prior(known))  # what begins there, and what cleans up after it, has seen as much
    assert (
        trained_on_secret(Attack(None, start=tainted), secret)
        == trained_on_secret(Attack(None, after=tainted), secret)
        == [found]
    )
