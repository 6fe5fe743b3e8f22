"""Token span: exact while the tokens do not fill the space in which they were seen, refused otherwise."""

from dataclasses import replace

import pytest
import torch

from gradleak.attacks.token_span import TokenSpan
from gradleak.audit.metrics import psnr_db
from gradleak.errors import NotObserved
from gradleak.modalities.networks import Architecture
from gradleak.modalities.pictures import load
from gradleak.observations.observation import Adapter, Gradient, Model
from gradleak.observations.training import Recipe
from gradleak.victims.gradient import capture_gradient

VIT = Architecture("vit", (3, 32, 32), 10)
QKV = [f"network.vit.layers.0.attention.{part}_proj" for part in "qkv"]


def adapter(rank: int) -> Adapter:
    model = Model.of(VIT.build(0), VIT)
    generator, start = torch.Generator().manual_seed(0), {}
    for module in QKV:
        start[f"{module}.lora_A"] = torch.randn(rank, 128, generator=generator) / 128**0.5
        start[f"{module}.lora_B"] = torch.zeros(128, rank)
    blank = Adapter(
        model=model,
        released={name: tensor for name, tensor in start.items() if name.endswith("lora_B")},
        start=start,
        scaling=dict.fromkeys(QKV, 1.0),
        recipe=Recipe(learning_rate=1.0, steps=1),
        batch_size=1,
    ).to(torch.float64)
    private = load("embedded", indices=[0])
    made = blank.simulate(private.images.double(), private.labels)
    return replace(blank, released={name: tensor.detach() for name, tensor in made.items()})


def attacked(observation: Gradient) -> float:
    """PSNR in dB of the only picture."""
    found = TokenSpan()(observation, generator=torch.Generator())
    return float(psnr_db(found.images, load("embedded", indices=[0]).images))


def test_the_gradient_gives_every_patch_in_its_place() -> None:
    gradient, _ = capture_gradient(VIT.build(0), VIT, load("embedded", indices=[0]))
    only = {f"{module}.weight": gradient.released[f"{module}.weight"] for module in QKV}
    frozen = tuple(name for name in gradient.model.parameters if name not in only)
    least = replace(gradient, model=replace(gradient.model, frozen=frozen), released=only)
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
        attacked(capture_gradient(lenet.build(0), lenet, load("embedded", indices=[0]))[0])
