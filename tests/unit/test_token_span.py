"""Token span: exact while the tokens do not fill the space in which they were seen, refused otherwise."""

from dataclasses import replace

import pytest
import torch

from gradleak.attacks.token_span import TokenSpan
from gradleak.audit.metrics import psnr_db
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.observations.model import Model
from gradleak.observations.observation import PictureObservation
from gradleak.observations.training import Recipe
from gradleak.victims.adapter import share_adapter
from gradleak.victims.gradient import capture_gradient, keep_secret

VIT = Architecture("vit", (3, 32, 32), 10)
QKV = [f"network.vit.layers.0.attention.{part}_proj" for part in "qkv"]


def adapter(rank: int) -> PictureObservation:
    """One SGD step of LoRA on query, key and value, in float64."""
    private = load("embedded", indices=[0])
    model = Model.of(VIT.build(0), VIT).to(torch.float64)
    secret = keep_secret(model, replace(private, images=private.images.double()))
    return share_adapter(model, secret, modules=QKV, rank=rank, recipe=Recipe(learning_rate=1.0, steps=1))


def attacked(observation: PictureObservation) -> float:
    """PSNR in dB of the only picture."""
    found = TokenSpan()(observation, generator=torch.Generator())
    return float(psnr_db(found.value, load("embedded", indices=[0]).images))


def test_the_gradient_gives_every_patch_in_its_place() -> None:
    gradient, _ = capture_gradient(Model.of(VIT.build(0), VIT), load("embedded", indices=[0]))
    least = replace(gradient, released={f"{m}.weight": gradient.released[f"{m}.weight"] for m in QKV})
    # float32 leaves 7 digits; the weakest token direction takes some. 40 dB: an error of 1 % of the range.
    assert attacked(gradient) > 40
    assert attacked(least) > 40  # no other layer and no position's gradient is needed


def test_an_adapter_gives_it_once_its_rank_exceeds_the_tokens() -> None:
    # 65 tokens; rank 96 leaves 3 x 31 equations for the 48 pixels and one scale of a patch: exact in float64.
    assert attacked(adapter(96)) > 60


def test_what_cannot_be_solved_is_refused() -> None:
    for rank in (64, 80):  # 0 and 3 x 15 equations for 49 unknowns
        with pytest.raises(NotObserved, match="rank"):
            attacked(adapter(rank))
    with pytest.raises(NotObserved, match="2 images"):
        attacked(replace(adapter(96), batch_size=2))
    lenet = Architecture("lenet", (3, 32, 32), 10)
    with pytest.raises(NotObserved, match="transformer"):
        attacked(capture_gradient(Model.of(lenet.build(0), lenet), load("embedded", indices=[0]))[0])
