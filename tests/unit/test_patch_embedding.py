"""Patch embedding: exact where the position embeddings tell what comes back to every patch, refused otherwise."""

from dataclasses import replace

import pytest
import torch

from gradleak.attacks.patch_embedding import POSITIONS, PatchEmbedding
from gradleak.audit.metrics import psnr_db
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.victims.gradient import capture_gradient

VIT = Architecture("vit", (3, 32, 32), 10)


def gradient(*, double: bool = False, precision: torch.dtype = torch.float32) -> PictureObservation:
    private, model = load("embedded", indices=[0]), Model.of(VIT.build(0), VIT)
    if double:
        private, model = replace(private, images=private.images.double()), model.to(torch.float64)
    return capture_gradient(model, private, precision=precision)[0]


def attacked(observation: PictureObservation) -> float:
    """PSNR in dB of the only picture."""
    found = PatchEmbedding()(observation, generator=torch.Generator())
    return float(psnr_db(found.value, load("embedded", indices=[0]).images))


def test_the_picture_comes_back_to_rounding() -> None:
    # Pixels are returned in float32: half of 2^-24 is 150 dB. Of float32's 7 digits (140 dB) the spread of D's singular values takes
    # some; 40 dB is an error of 1 % of the range.
    assert attacked(gradient(double=True, precision=torch.float64)) > 120
    assert attacked(gradient()) > 40


def test_what_rounding_hides_stays_grey_and_is_told() -> None:
    found = PatchEmbedding()(gradient(precision=torch.float16), generator=torch.Generator())
    told = int(found.status.split()[0])
    assert 0 < told < 64  # of 64 patches
    blind = psnr_db(torch.full((1, 3, 32, 32), 0.5), load("embedded", indices=[0]).images)
    assert attacked(gradient(precision=torch.float16)) > float(blind)  # what was told is better than grey


def test_what_cannot_be_solved_is_refused() -> None:
    seen = gradient()
    with pytest.raises(NotObserved, match="2 images"):
        attacked(replace(seen, batch_size=2))
    kept = {name: tensor for name, tensor in seen.released.items() if not name.endswith(POSITIONS)}
    with pytest.raises(NotObserved, match="position_embeddings was not released"):
        attacked(replace(seen, released=kept))
    lenet = Architecture("lenet", (3, 32, 32), 10)
    with pytest.raises(NotObserved, match="transformer"):
        attacked(capture_gradient(Model.of(lenet.build(0), lenet), load("embedded", indices=[0]))[0])
